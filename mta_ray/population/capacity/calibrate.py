"""What a running service spends on a request: CPU times of its processes while one client asks, and a few at once.

These wait for each answer before they ask again. Nothing comes from the loads that are predicted, whose arrivals wait
for nobody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.optimize import nnls

from mta_ray.population.capacity.arrivals import Arrival
from mta_ray.population.capacity.closed_loops import (
    Loop,
    at_most,
    late,
    measure_loop,
    middle_of,
    mixed,
    simulate_loop,
    with_longer,
)
from mta_ray.population.capacity.meter import KINDS, WARM, Meter, Seen, answered, ask
from mta_ray.population.capacity.service_model import PodConfig, simulate_pod
from mta_ray.population.capacity.service_times import COEFFICIENTS, ProcessTime, ServiceTimes, StepTime

ALONE = 40
"""Simulated requests of each length."""
TURNS = (1, 2, 4, 8)
"""What `turns` may be."""
REQUESTS_MIN = 10
"""So that of half of them some are left without the first ones of each client, whatever the number of clients."""
APART_S = 5.0
"""Between two requests of a simulated client that asks one at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationConfig:
    """How clients are measured who wait for their answers: one alone, and several at once."""

    answer_tokens: tuple[int, ...] = (4, 16, 40)
    """Lengths of answers: what grows with them is a token's, the rest a request's."""
    requests: int = 60
    """Of each length; of more than 8 clients, as many again for every 8."""
    clients: tuple[int, ...] = (2, 4, 8, 16, 32)
    """Who ask at once, each again when it is answered: of each number it is seen how much longer work takes beside so
    much other work, and of the last, as many as keep every row busy, what a request costs."""

    def __post_init__(self) -> None:
        if len(set(self.answer_tokens)) < 2 or min(self.answer_tokens) < 1 or self.requests < REQUESTS_MIN:
            raise ValueError(
                f"answer_tokens is {self.answer_tokens} and requests {self.requests}, wanted at least two different "
                f"lengths of 1 or more, and at least {REQUESTS_MIN} requests"
            )
        if not self.clients or not all(a < b for a, b in pairwise((1, *self.clients))):
            raise ValueError(f"clients is {self.clients}, wanted at least one number, ascending from 2")


def calibrate(
    url: str,
    requests: Sequence[Mapping[str, Any]],
    step: StepTime,
    pod: PodConfig,
    config: CalibrationConfig,
    *,
    stack_load_ms: float = 0.0,
) -> tuple[ServiceTimes, list[Loop], dict[str, Any]]:
    """Service times, the clients at once from whom they are, and the facts behind them.

    `requests`: streamed completions without max_tokens, `config.requests` of them. Whoever has a stack should find it
    on the device: what loads cost here would count as work that takes longer.
    """
    # 1. CPU times at each length of answer, of one client alone and of as many as keep every row busy
    meter = Meter()
    most = config.clients[-1]
    ask(url, mixed(requests, (max(config.answer_tokens),), 1), clients=most)
    idle = meter.idle()
    runs: dict[int, list[dict[str, Any]]] = {1: [], most: []}
    for clients, each in runs.items():
        for tokens in config.answer_tokens:
            with meter.watch() as seen:
                told = ask(url, mixed(requests, (tokens,), clients), clients=clients)
            each.append(_run_of(told, seen, idle, step) | {"clients": clients})
    alone, crowd = runs[1], runs[most]
    # Up and down again, each with half of the requests: a machine that becomes slower does so for all of them.
    up = [measure_loop(meter, url, requests[::2], config.answer_tokens, clients) for clients in config.clients]
    down = [measure_loop(meter, url, requests[::2], config.answer_tokens, loop.clients) for loop in reversed(up)]
    loops = [middle_of(one, other) for one, other in zip(up, reversed(down), strict=True)]

    # 2. what is a request's, and what a token's
    scale = float(np.mean([run["engine_over_step"] for run in crowd]))
    times = ServiceTimes(
        step=replace(step, **{name: getattr(step, name) * scale for name in COEFFICIENTS}),
        proxy=_process_time(alone, crowd, "proxy"),
        ingress=_process_time(alone, crowd, "ingress"),
        replica=_process_time(alone, crowd, "replica"),
        client=_process_time(alone, crowd, "client"),
        stack_load_ms=stack_load_ms,
        source=f"one client alone, and {' and '.join(map(str, config.clients))} at once",
    )

    # 3. what one client alone waits for besides: between tokens, and before the first one
    # As any load is predicted: beside what else the machine did meanwhile.
    pod = replace(pod, others=at_most(float(np.mean([run["others_cpus"] for run in alone])), pod))
    tried = [_with_rest(replace(times, turns=turns), pod, alone) for turns in TURNS]

    # 4. how much longer work takes than CPU times say while several are at it
    tried = [with_longer(one, pod, loops) for one in tried]
    times = min(tried, key=lambda one: late(one, pod, loops))
    for run, (ttft_ms, total_ms) in zip(alone, _alone(times, pod, alone), strict=True):
        run |= {"simulated_ttft_ms": ttft_ms, "simulated_total_ms": total_ms}
    return (
        times,
        loops,
        {
            "one_at_a_time": alone,
            "crowd": crowd,
            "at_once": [
                {"up": asdict(one), "down": asdict(other), "simulated": asdict(simulate_loop(times, pod, loop))}
                for one, other, loop in zip(up, reversed(down), loops, strict=True)
            ],
            "engine_over_step": scale,
            "prompt_tokens": round(float(np.mean([run["prompt_tokens"] for run in alone]))),
        },
    )


def _run_of(told: Mapping[str, Any], seen: Seen, idle: Seen, step: StepTime) -> dict[str, Any]:
    """One length of answer: CPU milliseconds of each process a request, and the client's clock."""
    answers = answered(told)
    count = len(answers) + WARM
    run: dict[str, Any] = {
        "tokens": float(np.mean([answer["tokens"] for answer in answers])),
        "prompt_tokens": float(np.mean([answer["prompt_tokens"] for answer in answers])),
        "ttft_ms_p50": float(np.median([answer["ttft_ms"] for answer in answers])),
        "total_ms_p50": float(np.median([answer["total_ms"] for answer in answers])),
        "others_cpus": seen.others_cpus(told["life_cpu_ms"]),
        "client": {
            "python": told["python_ms"] / len(answers),
            "native": max(0.0, told["cpu_ms"] - told["python_ms"]) / len(answers),
        },
    }
    for name, usage in seen.used.items():
        rest = idle.used[name].scaled(seen.seconds / idle.seconds)
        run[name] = {kind: max(0.0, getattr(usage, kind) - getattr(rest, kind)) / count for kind in KINDS}
    expected_ms = (
        step.of(0, count, count * run["prompt_tokens"])
        + step.fixed_ms * (seen.steps - 1)
        + step.row_ms * (seen.tokens - count)
    )
    return run | {"engine_over_step": run["replica"]["engine"] * count / expected_ms, "rows": seen.tokens / seen.steps}


def _process_time(alone: Sequence[Mapping[str, Any]], crowd: Sequence[Mapping[str, Any]], name: str) -> ProcessTime:
    """A request's and a token's share with many at once; what a token costs more alone is the waking up."""
    fitted = {}
    for kind in ("python", "native"):
        for runs in (alone, crowd):
            x = np.array([(1.0, run["tokens"]) for run in runs])
            request, token = nnls(x, np.array([run[name][kind] for run in runs]))[0]
            fitted[kind, runs is alone] = float(request), float(token)
    return ProcessTime(
        request_ms=fitted["python", False][0],
        token_ms=fitted["python", False][1],
        native_request_ms=fitted["native", False][0],
        native_token_ms=fitted["native", False][1],
        wake_ms=max(0.0, fitted["python", True][1] - fitted["python", False][1]),
        native_wake_ms=max(0.0, fitted["native", True][1] - fitted["native", False][1]),
    )


def _with_rest(times: ServiceTimes, pod: PodConfig, measured: Sequence[Mapping[str, Any]]) -> ServiceTimes:
    """`pause_ms`, and `away_ms` or `after_share`, so that a client alone waits as long as was measured."""
    first, last = measured[0], measured[-1]
    tokens = last["tokens"] - first["tokens"]

    def per_token_ms(short_ms: float, long_ms: float) -> float:
        return (long_ms - short_ms) / tokens

    wanted_ms = per_token_ms(first["total_ms_p50"], last["total_ms_p50"])
    said = _alone(times, pod, measured)
    times = replace(times, pause_ms=max(0.0, wanted_ms - per_token_ms(said[0][1], said[-1][1])))

    def missing_ms(tried: ServiceTimes) -> float:
        said = _alone(tried, pod, measured)
        late = [run["ttft_ms_p50"] - ttft for run, (ttft, _) in zip(measured, said, strict=True)]
        return float(np.mean(late))

    missing = missing_ms(times)
    if missing >= 0:
        return replace(times, away_ms=missing)
    low, high = 0.0, 1.0
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (middle, high) if missing_ms(replace(times, after_share=middle)) < 0 else (low, middle)
    return replace(times, after_share=high)


def _alone(times: ServiceTimes, pod: PodConfig, measured: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Medians of (time to first token, total) of requests of each length with nobody beside them, milliseconds."""
    lengths = [round(run["tokens"]) for run in measured]
    prompt_tokens = round(measured[0]["prompt_tokens"])
    arrivals = [Arrival(n * APART_S, n, prompt_tokens, lengths[n % len(lengths)]) for n in range(ALONE * len(lengths))]
    outcomes = simulate_pod(arrivals, pod, times).outcomes
    said = []
    for length in lengths:
        these = [outcome for outcome in outcomes if outcome.tokens == length]
        clocks = ([o.ttft_ms for o in these], [o.total_ms for o in these])
        said.append((float(np.median(clocks[0])), float(np.median(clocks[1]))))
    return said
