"""Clients who ask again when they are answered: measured, simulated, and how much longer work takes beside other work.

Answers of several lengths take turns in one loop. Clients whose answers are all alike soon ask in step, and never meet
what a load is full of: prompts and hand-overs in the middle of other answers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mta_ray.population.capacity.arrivals import Arrival
from mta_ray.population.capacity.meter import Meter, answered, ask
from mta_ray.population.capacity.service_model import PodConfig, simulate_pod
from mta_ray.population.capacity.service_times import ServiceTimes

OTHERS_MAX = 0.8
"""Share of the machine's CPUs that other programs are taken to have at most."""
TRIED = (0.6, 2.5)
"""Within what work is taken to be longer than CPU times say, or shorter."""
FACTORS_TRIED = 6
"""So many steps of the secant method; the best counts, for medians of simulated answers jump a little."""
ROUND = 8
"""For every so many clients at once, as many requests again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clocks:
    """Medians of the answers of one length, as their clients saw them."""

    tokens: float
    ttft_ms: float
    total_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """What so many clients saw."""

    clients: int
    requests: int
    prompt_tokens: float
    clocks: tuple[Clocks, ...]
    """Of each length, in the order in which they take turns."""
    others_cpus: float = 0.0
    """CPUs that other programs took meanwhile."""


def mixed(requests: Sequence[Mapping[str, Any]], lengths: Sequence[int], clients: int) -> list[dict[str, Any]]:
    """Each of the requests with each length, in turns; more of them where there are more clients."""
    many = [request for request in requests for _ in lengths] * (1 + clients // ROUND)
    return [
        {**request, "body": {**request["body"], "max_tokens": lengths[n % len(lengths)]}}
        for n, request in enumerate(many)
    ]


def measure_loop(
    meter: Meter, url: str, requests: Sequence[Mapping[str, Any]], lengths: Sequence[int], clients: int
) -> Loop:
    """A RuntimeError if a request fails."""
    with meter.watch() as seen:
        told = ask(url, mixed(requests, lengths, clients), clients=clients)
    return loop_of(answered(told), len(lengths), clients, seen.others_cpus(told["life_cpu_ms"]))


def loop_of(answers: Sequence[Mapping[str, Any]], lengths: int, clients: int, others_cpus: float) -> Loop:
    """Of answers in the order in which they were asked for, of so many lengths in turns."""
    tokens = [float(np.mean([answer["tokens"] for answer in answers[n::lengths]])) for n in range(lengths)]
    clocks = [(answer["ttft_ms"], answer["total_ms"]) for answer in answers]
    return Loop(
        clients=clients,
        requests=len(answers),
        prompt_tokens=float(np.mean([answer["prompt_tokens"] for answer in answers])),
        clocks=_medians(tokens, clocks, clients),
        others_cpus=others_cpus,
    )


def middle_of(one: Loop, other: Loop) -> Loop:
    """The same clients at two times: geometric means of the clocks."""
    clocks = [
        Clocks(
            tokens=(a.tokens + b.tokens) / 2,
            ttft_ms=math.sqrt(a.ttft_ms * b.ttft_ms),
            total_ms=math.sqrt(a.total_ms * b.total_ms),
        )
        for a, b in zip(one.clocks, other.clocks, strict=True)
    ]
    return replace(one, clocks=tuple(clocks), others_cpus=(one.others_cpus + other.others_cpus) / 2)


def simulate_loop(times: ServiceTimes, pod: PodConfig, loop: Loop) -> Loop:
    """What the same clients see of the simulated service."""
    lengths = [round(clock.tokens) for clock in loop.clocks]
    asked = [Arrival(0.0, n, round(loop.prompt_tokens), lengths[n % len(lengths)]) for n in range(loop.requests)]
    pod = replace(pod, others=at_most(loop.others_cpus, pod))
    ended = simulate_pod(asked[: loop.clients], pod, times, then=asked[loop.clients :]).outcomes
    clocks = [(o.ttft_ms, o.total_ms) for o in sorted(ended, key=lambda outcome: outcome.arrival.user)]
    return replace(loop, clocks=_medians([clock.tokens for clock in loop.clocks], clocks, loop.clients))


def _medians(tokens: Sequence[float], clocks: Sequence[tuple[float, float]], clients: int) -> tuple[Clocks, ...]:
    """Of (ttft_ms, total_ms) of each request, lengths in turns; without the first ones, which came all at once."""
    told = []
    for number, of_length in enumerate(tokens):
        later = [clock for n, clock in enumerate(clocks) if n % len(tokens) == number and n >= clients]
        ttft_ms, total_ms = (float(middle) for middle in np.median(later, axis=0))
        told.append(Clocks(tokens=of_length, ttft_ms=ttft_ms, total_ms=total_ms))
    return tuple(told)


def with_longer(times: ServiceTimes, pod: PodConfig, measured: Sequence[Loop]) -> ServiceTimes:
    """`longer`, so that whole answers take what was measured of each loop, that of the fewest clients first.

    Threads that share caches and cores get in each other's way; near saturation a tenth of that doubles the waiting.
    """
    known: tuple[tuple[float, float], ...] = ()
    for loop in measured:
        clients, factor, slope = float(loop.clients), known[-1][1] if known else 1.0, 1.0
        before: tuple[float, float] | None = None
        found: list[tuple[float, float]] = []
        for _ in range(FACTORS_TRIED):
            tried = replace(times, longer=(*known, (clients, factor)))
            missing = math.log(over(loop, simulate_loop(tried, pod, loop)))
            found.append((abs(missing), factor))
            if before is not None and abs(math.log(factor) - before[0]) > 1e-3:
                slope = min(3.0, max(0.3, (before[1] - missing) / (math.log(factor) - before[0])))
            before = math.log(factor), missing
            factor = min(TRIED[1], max(TRIED[0], factor * math.exp(missing / slope)))
        known = (*known, (clients, min(found)[1]))
    return replace(times, longer=known)


def late(times: ServiceTimes, pod: PodConfig, measured: Sequence[Loop]) -> float:
    """How far the simulated first tokens are from the measured ones."""
    return sum(
        abs(math.log(one.ttft_ms / other.ttft_ms))
        for loop in measured
        for one, other in zip(simulate_loop(times, pod, loop).clocks, loop.clocks, strict=True)
    )


def over(one: Loop, other: Loop) -> float:
    """How many times as long whole answers take in one as in the other, a geometric mean over lengths."""
    return math.exp(
        float(np.mean([math.log(a.total_ms / b.total_ms) for a, b in zip(one.clocks, other.clocks, strict=True)]))
    )


def at_most(others: float, pod: PodConfig) -> float:
    """CPUs of other programs as the simulation takes them: something is left for the service."""
    return min(others, OTHERS_MAX * (pod.cores or 1))


def pace_of(times: ServiceTimes, pod: PodConfig, known: Loop, now: Loop) -> float:
    """How many times as long all work takes now as at the calibration, of which `known` is; other programs apart."""
    return over(now, simulate_loop(times, pod, now)) / over(known, simulate_loop(times, pod, known))


class Pace:
    """How fast the machine is now: one of a calibration's loops again, beside what it was then.

    Where others share the machine, the same work takes half as long again a minute later. A prediction takes service
    times as given; this gives those of the day, and nothing of the load that is predicted.
    """

    def __init__(
        self,
        meter: Meter,
        url: str,
        requests: Sequence[Mapping[str, Any]],
        lengths: Sequence[int],
        times: ServiceTimes,
        pod: PodConfig,
        known: Sequence[Loop],
    ) -> None:
        """`known`: the calibration's loops, the middle one of which is done again."""
        self._meter, self._url, self._requests, self._lengths = meter, url, requests, lengths
        self._times, self._pod, self._known = times, pod, known[len(known) // 2]

    def now(self) -> float:
        """See `pace_of`."""
        loop = measure_loop(self._meter, self._url, self._requests, self._lengths, self._known.clients)
        return pace_of(self._times, self._pod, self._known, loop)
