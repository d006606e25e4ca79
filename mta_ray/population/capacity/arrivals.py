"""Who asks when for how much: arrivals drawn from a seed, and how often a Zipf crowd finds its stack on the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy import ndarray
from scipy.optimize import brentq

from mta_ray.population.capacity.service_times import no_type_check

CROWD_MAX = 1_000_000
"""Users that are told apart in one pod; more are drawn as this many."""
LENGTHS = 100_000
"""Requests that are drawn to see how many are too long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficConfig:
    """What a request is like, and how unlike the users are."""

    prompt_tokens: float = 48.0
    """Mean length of a prompt."""
    answer_tokens: float = 24.0
    """Mean length of an answer."""
    lengths: Literal["fixed", "geometric", "lognormal"] = "lognormal"
    """How both are distributed."""
    spread: float = 0.5
    """Standard deviation of a log-normal length's logarithm."""
    stream_share: float = 1.0
    """Share of requests that are streamed."""
    zipf: float = 0.9
    """Exponent of the users' activity: the user of rank r asks in proportion to 1 / r^zipf; 0: all alike."""
    stack_share: float = 0.3
    """Share of users who have a stack of their own."""

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "answer_tokens"):
            if not 1 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted at least 1")
        for name in ("stream_share", "stack_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted 0 to 1")
        for name in ("spread", "zipf"):
            if not 0 <= getattr(self, name) < 5:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted 0 to 5")


@no_type_check
@dataclass(frozen=True, slots=True)
class Arrival:
    """One request on its way."""

    at_s: float
    user: int
    prompt_tokens: int
    answer_tokens: int
    is_stream: bool = True
    has_stack: bool = False


def poisson_arrivals(
    traffic: TrafficConfig,
    *,
    per_s: float,
    seconds: float,
    users: int,
    seed: int,
    shape: Callable[[float], float] | None = None,
) -> list[Arrival]:
    """Independent arrivals, `per_s` on average; `shape` maps seconds to a share of that, 0 to 1 (a day, a crowd)."""
    rng = np.random.default_rng(seed)
    count = rng.poisson(per_s * seconds)
    times = np.sort(rng.uniform(0, seconds, count))
    if shape is not None:
        times = times[rng.random(count) < np.array([shape(t) for t in times])]
    return _requests(traffic, times, users, rng, seed)


def sample_arrivals(traffic: TrafficConfig, *, per_s: float, requests: int, users: int, seed: int) -> list[Arrival]:
    """So many Poisson arrivals. Another rate stretches the same ones: what differs then is due to the rate."""
    rng = np.random.default_rng(seed)
    return _requests(traffic, np.cumsum(rng.exponential(size=requests)) / per_s, users, rng, seed)


def share_longer(traffic: TrafficConfig, tokens: int) -> float:
    """Share of the requests whose prompt and answer have more tokens together, of many that are drawn."""
    rng = np.random.default_rng(0)
    lengths = [_lengths(traffic, mean, LENGTHS, rng) for mean in (traffic.prompt_tokens, traffic.answer_tokens)]
    return float(np.mean(lengths[0] + lengths[1] > tokens))


def draw_users(zipf: float, users: int, count: int, rng: np.random.Generator) -> ndarray:
    """(count,) users, 0 the most active."""
    total = np.cumsum(zipf_shares(zipf, min(users, CROWD_MAX)))
    return np.searchsorted(total, rng.random(count) * total[-1], side="right").clip(max=len(total) - 1)


def zipf_shares(zipf: float, users: int) -> ndarray:
    """(users,) share of the requests that each sends, the most active first."""
    if users < 1:
        raise ValueError(f"a crowd has at least one user, got {users}")
    weights = np.arange(1, users + 1, dtype=float) ** -zipf
    return weights / weights.sum()


def hit_share(shares: ndarray | Sequence[float], slots: int) -> float:
    """Share of requests that find their user's stack in a least-recently-used shelf of so many slots.

    Che's approximation (Che, Tung, Wang 2002): a stack stays for one characteristic time, the same for all.
    """
    p = np.asarray(shares, dtype=float)
    p = p / p.sum()
    if slots >= len(p):
        return 1.0
    if slots < 1:
        return 0.0
    time = brentq(lambda t: -np.expm1(-p * t).sum() - slots, 0, 1e3 * slots / p.min())
    return float((p * -np.expm1(-p * time)).sum())


def _requests(traffic: TrafficConfig, times: ndarray, users: int, rng: np.random.Generator, seed: int) -> list[Arrival]:
    count = len(times)
    ids = draw_users(traffic.zipf, users, count, rng)
    prompts = _lengths(traffic, traffic.prompt_tokens, count, rng)
    answers = _lengths(traffic, traffic.answer_tokens, count, rng)
    streams = rng.random(count) < traffic.stream_share
    stacked = np.random.default_rng((seed, 1)).random(min(users, CROWD_MAX)) < traffic.stack_share  # of each user
    return [
        Arrival(float(t), int(u), int(p), int(a), bool(s), bool(stacked[u]))
        for t, u, p, a, s in zip(times, ids, prompts, answers, streams, strict=True)
    ]


def _lengths(traffic: TrafficConfig, mean: float, count: int, rng: np.random.Generator) -> ndarray:
    if traffic.lengths == "fixed":
        return np.full(count, max(1, round(mean)))
    if traffic.lengths == "geometric":
        return rng.geometric(1 / mean, count)
    median = math.log(mean) - traffic.spread**2 / 2
    return np.maximum(1, np.rint(rng.lognormal(median, traffic.spread, count))).astype(int)
