"""The service's own figures, through ray.serve.metrics: Prometheus reads them from each node's metrics port."""

from __future__ import annotations

from ray.serve import metrics

from mta_ray.model.engine import EngineStats

_MS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 30000]


class Meters:
    """One replica's."""

    def __init__(self) -> None:
        self.ttft_ms = metrics.Histogram(
            "mta_time_to_first_token_ms", "From a request's arrival at the replica to its first token.", boundaries=_MS
        )
        self.tpot_ms = metrics.Histogram(
            "mta_time_per_output_token_ms", "Mean time of an answer's tokens after the first.", boundaries=_MS
        )
        self.personalise_ms = metrics.Histogram(
            "mta_personalise_ms", "Reading a user's state, and routing it anew where needed.", boundaries=_MS
        )
        self.prompt_tokens = metrics.Counter("mta_prompt_tokens", "Tokens of prompts.")
        self.answer_tokens = metrics.Counter("mta_answer_tokens", "Tokens of answers.")
        self.refused = metrics.Counter("mta_refused_requests", "Requests that found no room.")
        self.stack_hits = metrics.Counter("mta_stack_hits", "Stacks that were on the device when asked for.")
        self.stack_misses = metrics.Counter("mta_stack_misses", "Stacks that were loaded for a request.")
        self.waiting = metrics.Gauge("mta_waiting_requests", "Requests that wait for a row of the batch.")
        self.running = metrics.Gauge("mta_batch_requests", "Requests that are decoded together.")
        self.users = metrics.Gauge("mta_batch_users", "Distinct users among them.")

    def observe(self, stats: EngineStats) -> None:
        """The engine as it is now."""
        self.waiting.set(stats.waiting)
        self.running.set(stats.running)
        self.users.set(stats.owners)

    def answered(self, *, prompt_tokens: int, tokens: int, first_s: float | None, total_s: float) -> None:
        """One answer is over, `first_s` after its arrival the first token, `total_s` the last."""
        self.prompt_tokens.inc(max(prompt_tokens, 1))
        if tokens:
            self.answer_tokens.inc(tokens)
        if first_s is not None:
            self.ttft_ms.observe(first_s * 1e3)
            if tokens > 1:
                self.tpot_ms.observe((total_s - first_s) * 1e3 / (tokens - 1))
