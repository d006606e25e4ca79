"""Who asks for what, and when: a schedule of sessions that depends on a seed and on nothing else.

Sessions arrive by a Poisson process whose rate follows a day and a flash crowd; they belong to Zipf-distributed users.
Arrivals do not wait for answers (an open loop). Knows no service; numpy alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

Kind = Literal["ask", "history", "stack", "delete"]
PHASES = ("warm-up", "steady", "flash crowd", "recovery")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficConfig:
    """How much is asked, by whom, and how that changes over the run."""

    seconds: float = 900.0
    """How long sessions arrive; phases are shares of it."""
    sessions_per_s: float = 1.5
    """Average rate of new sessions without the flash crowd."""
    diurnal: float = 0.3
    """How far the rate rises above its average and falls below it in a day, as a share of it."""
    day_s: float = 600.0
    """Length of a simulated day, in seconds of the run."""
    warmup: float = 1 / 15
    """Share of the run that is a warm-up, told apart from the rest."""
    flash_start: float = 0.45
    """When the flash crowd comes, as a share of the run."""
    flash_share: float = 2 / 15
    """How long it stays, as a share of the run; the rest is recovery."""
    flash_factor: float = 4.0
    """What the rate is multiplied with meanwhile."""
    users: int = 10_000
    """Size of the population; user n is the (n + 1)-th most frequent one. Newcomers have higher numbers."""
    zipf: float = 1.1
    """Exponent of the users' frequencies, above 1: user n is drawn in proportion to (n + 1) ** -zipf."""
    questions: float = 1.8
    """Mean of a session's questions: 1 and more, geometric."""
    think_s: float = 4.0
    """Mean time between a session's requests, exponential."""
    stream_share: float = 0.5
    """Share of questions whose answer is streamed."""
    least_tokens: int = 8
    """Shortest answer that is asked for."""
    most_tokens: int = 24
    """Longest one; lengths are uniform."""
    new_share: float = 0.05
    """Share of sessions of users who are new: they send a history, then ask."""
    update_share: float = 0.05
    """Share of sessions that begin with another history of a known user."""
    stack_share: float = 0.01
    """Share of sessions that ask for a stack of the user's own; only of users that are new in this run."""
    delete_share: float = 0.02
    """Share of sessions that delete a user; only of users that are new in this run."""
    settled_s: float = 15.0
    """Who is deleted, or asks for a stack, sent the first history at least so long before, so that it is there."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("seconds", "sessions_per_s", "day_s", "flash_factor", "think_s", "settled_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)}")
        for name in ("diurnal", "warmup", "flash_start", "flash_share", "stream_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        shares = [self.new_share, self.update_share, self.stack_share, self.delete_share]
        if not (all(share >= 0 for share in shares) and sum(shares) <= 1):
            raise ValueError(f"shares of new, update, stack and delete must be 0 or more and 1 together, got {shares}")
        if not self.warmup <= self.flash_start <= 1 - self.flash_share:
            raise ValueError(
                f"warmup ({self.warmup}) must end before flash_start ({self.flash_start}), and the flash crowd "
                f"({self.flash_share}) before the run does"
            )
        if not (1 < self.zipf < math.inf and 1 <= self.questions < math.inf) or self.users < 1 or self.seed < 0:
            raise ValueError(
                "zipf must be above 1 and questions at least 1, both finite, users at least 1, seed at least 0; got "
                f"{self.zipf}, {self.questions}, {self.users}, {self.seed}"
            )
        if not 1 <= self.least_tokens <= self.most_tokens:
            raise ValueError(f"least_tokens is {self.least_tokens}, wanted 1 to most_tokens, {self.most_tokens}")

    @property
    def bounds_s(self) -> tuple[float, float, float]:
        """Where the warm-up ends, and where the flash crowd begins and ends."""
        start_s = self.flash_start * self.seconds
        return self.warmup * self.seconds, start_s, start_s + self.flash_share * self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A request to come."""

    at_s: float
    """Seconds after the start of the run."""
    kind: Kind
    is_stream: bool = False
    tokens: int = 0
    """That the answer may have; 0 where there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """What one user does, one after the other."""

    user: int
    """The user's number."""
    requests: tuple[Planned, ...]


def phase_at(config: TrafficConfig, at_s: float) -> str:
    """One of PHASES."""
    return PHASES[sum(at_s >= bound for bound in config.bounds_s)]


def rate(config: TrafficConfig, at_s: float) -> float:
    """Sessions per second at that time."""
    _, start_s, end_s = config.bounds_s
    factor = config.flash_factor if start_s <= at_s < end_s else 1.0
    return config.sessions_per_s * factor * (1 + config.diurnal * math.sin(2 * math.pi * at_s / config.day_s))


def expected_sessions(config: TrafficConfig, from_s: float, to_s: float) -> float:
    """Mean number of sessions that arrive between the two times: the integral of the rate."""
    _, start_s, end_s = config.bounds_s
    flash = max(0.0, _integral(config, min(to_s, end_s)) - _integral(config, max(from_s, start_s)))
    return _integral(config, to_s) - _integral(config, from_s) + (config.flash_factor - 1) * flash


def _integral(config: TrafficConfig, to_s: float) -> float:
    """Of the rate without a flash crowd, from 0."""
    turn = 2 * math.pi / config.day_s
    return config.sessions_per_s * (to_s + config.diurnal / turn * (1 - math.cos(turn * to_s)))


def arrivals(config: TrafficConfig, rng: np.random.Generator) -> Iterator[float]:
    """Times of a Poisson process with that rate: one of the highest rate, thinned (Lewis and Shedler, 1979)."""
    highest = config.sessions_per_s * max(1.0, config.flash_factor) * (1 + config.diurnal)
    at_s = 0.0
    while (at_s := at_s + rng.exponential(1 / highest)) < config.seconds:
        if rng.random() * highest < rate(config, at_s):
            yield at_s


def zipf_user(config: TrafficConfig, rng: np.random.Generator) -> int:
    """A user's number: numpy's Zipf, drawn again where it is outside the population; memory does not grow with that."""
    while (rank := int(rng.zipf(config.zipf))) > config.users:
        pass
    return rank - 1


def sessions(config: TrafficConfig, *, known: int = 0) -> Iterator[Session]:
    """All sessions by their beginning. Users below `known` have a history already; others send one at first."""
    rng = np.random.default_rng([config.seed, 2])
    crowd = _Crowd(config, known)
    for at_s in arrivals(config, np.random.default_rng([config.seed, 1])):
        yield _session(config, crowd, at_s, rng)


def _session(config: TrafficConfig, crowd: _Crowd, at_s: float, rng: np.random.Generator) -> Session:
    # 1. what for, and whose
    what = rng.choice(
        ["new", "update", "stack", "delete", "return"],
        p=_padded([config.new_share, config.update_share, config.stack_share, config.delete_share]),
    )
    settled = crowd.settled(at_s, rng) if what in ("stack", "delete") else None
    if what == "delete" and settled is not None:
        crowd.forget(settled)
        return Session(user=settled, requests=(Planned(at_s=at_s, kind="delete"),))
    first: Kind | None
    if what == "stack" and settled is not None:
        user, first = settled, "stack"
    elif what == "new":
        user, first = crowd.newcomer(at_s), "history"
    else:
        user = zipf_user(config, rng)
        first = "history" if crowd.meet(user, at_s) or what == "update" else None

    # 2. the requests
    requests = []
    if first is not None:
        requests.append(Planned(at_s=at_s, kind=first))
        at_s += rng.exponential(config.think_s)
    for number in range(int(rng.geometric(1 / config.questions))):
        at_s += rng.exponential(config.think_s) if number else 0.0
        is_stream = bool(rng.random() < config.stream_share)
        tokens = int(rng.integers(config.least_tokens, config.most_tokens + 1))
        requests.append(Planned(at_s=at_s, kind="ask", is_stream=is_stream, tokens=tokens))
    return Session(user=user, requests=tuple(requests))


def _padded(shares: list[float]) -> list[float]:
    return [*shares, max(0.0, 1 - sum(shares))]


class _Crowd:
    """Who has been seen in the run: as large as the number of users that were."""

    def __init__(self, config: TrafficConfig, known: int) -> None:
        self._known, self._next, self._settled_s = known, config.users, config.settled_s
        self._since_s: dict[int, float] = {}  # in the order in which they came

    def newcomer(self, at_s: float) -> int:
        """The number of somebody whom nobody has seen."""
        self._next += 1
        self._since_s[self._next - 1] = at_s
        return self._next - 1

    def meet(self, user: int, at_s: float) -> bool:
        """Whether the user is seen for the first time, or again after a deletion."""
        if user < self._known or user in self._since_s:
            return False
        self._since_s[user] = at_s
        return True

    def settled(self, at_s: float, rng: np.random.Generator) -> int | None:
        """Somebody who came a while ago, if there is anybody."""
        old = [user for user, since_s in self._since_s.items() if since_s < at_s - self._settled_s]
        return old[int(rng.integers(len(old)))] if old else None

    def forget(self, user: int) -> None:
        """The user was deleted."""
        del self._since_s[user]
