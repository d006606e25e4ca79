"""What an engine holds, and how a request is drawn. Knows no torch: whoever only asks the engine needs none."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How much the engine holds at once. All of it is allocated at the start."""

    max_requests: int = 16
    """Requests decoded together: rows of the cache."""
    max_tokens: int = 512
    """Prompt and answer of one request together; at most what the model takes."""
    max_step_tokens: int = 512
    """Tokens of one forward pass: one for each decoding request, the rest for prompts."""
    max_waiting: int = 64
    """Requests that wait for a row; one more is refused with QueueFull."""
    coefficients: bool = False
    """Room for routes with a weight for each (module, slot, rank)."""
    seed: int = 0
    """Of requests that bring none."""

    def __post_init__(self) -> None:
        if self.max_requests < 1 or self.max_tokens < 2 or self.max_waiting < 0:
            raise ValueError(f"max_requests ≥ 1, max_tokens ≥ 2, max_waiting ≥ 0 are needed; got {self}")
        if self.max_step_tokens <= self.max_requests:
            raise ValueError(
                f"max_step_tokens {self.max_step_tokens} leaves no room for prompts beside {self.max_requests} "
                "decoding requests; raise it"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one request's tokens are drawn."""

    temperature: float = 0.0
    """0: the most likely token, always."""
    top_p: float = 1.0
    """Draw from the smallest set of most likely tokens that together have this probability."""
    seed: int | None = None
    """Same seed, same logits: same tokens, whoever shares the batch. None: another one for each request."""
    logprobs: int | None = None
    """How many alternatives come with each token and its log-probability; None: no log-probabilities."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise ValueError(f"temperature must be between 0 and 100, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.logprobs is not None and not 0 <= self.logprobs <= 20:
            raise ValueError(f"logprobs must be between 0 and 20, got {self.logprobs}")
