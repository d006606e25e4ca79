"""From one simulated pod to a fleet: how many replicas so many users need, what they wait for, and what it costs.

Replicas share nothing but the user store: one pod is simulated at the load of each of its replicas, and counted.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import i0

from mta_ray.population.capacity.arrivals import (
    CROWD_MAX,
    TrafficConfig,
    hit_share,
    sample_arrivals,
    share_longer,
    zipf_shares,
)
from mta_ray.population.capacity.service_model import Outcome, PodConfig, saturation_per_s, simulate_pod
from mta_ray.population.capacity.service_times import ServiceTimes

log = logging.getLogger(__name__)
DAY_S, MONTH_H = 86_400, 730
DAY_POINTS = 96
MOST, BYTES_MAX = 1e6, 1e12
"""Beyond these a setting is a slip of the pen."""
PEAK_MAX = 60.0
LOAD_MAX = 0.85
"""Of what a replica that always has more to do gets through: nearer to it, waiting grows faster than a sample shows."""
PROVED_BY = 5
"""So many times the sample the limit must hold for, with other arrivals."""
STEP_DOWN = 0.95
WARM_SHARE = 0.1
"""Of a sample's requests, the first: they find an empty pod, and are not counted."""
TOO_LONG_TOLD, TOO_LONG_MAX = 0.01, 0.05
"""Share of the requests that are longer than a replica takes: above the one it is told, above the other refused."""
GPU_SHARE_MIN = 1e-4
"""Of a GPU; Ray counts no smaller ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetConfig:
    """What there is to serve with."""

    name: str = "a fleet"
    """For the report."""
    gpus_per_replica: float = 1.0
    """As `gpus_per_replica` of the service: whole, or a share of one GPU; 0: replicas on CPUs."""
    price_per_gpu_hour: float = 2.5
    """In whatever currency; a planning figure, not a quotation."""
    price_per_replica_hour: float = 0.1
    """CPUs and memory of a replica, and its share of proxy and ingress."""
    min_replicas: int = 2
    """However few the users are: one may die."""
    spare_share: float = 0.05
    """More replicas than the peak needs, for nodes that are dead; at least one."""
    pod: PodConfig = field(default_factory=PodConfig)
    """What is simulated."""

    def __post_init__(self) -> None:
        for name in ("gpus_per_replica", "price_per_gpu_hour", "price_per_replica_hour", "spare_share"):
            if not 0 <= getattr(self, name) <= MOST:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted 0 to {MOST:g}")
        gpus = self.gpus_per_replica
        if gpus > 1 and gpus != int(gpus) or 0 < gpus < GPU_SHARE_MIN:
            raise ValueError(
                f"gpus_per_replica is {gpus}, wanted 0, a share of one GPU (at least {GPU_SHARE_MIN:g}), or a whole "
                "number; Ray gives out no other"
            )
        if self.min_replicas < 1:
            raise ValueError(f"min_replicas must be at least 1, got {self.min_replicas}")

    def gpus(self, replicas: int) -> int:
        """That so many replicas need; a replica's share is of one GPU, never of two."""
        if not 0 < self.gpus_per_replica < 1:
            return replicas * int(self.gpus_per_replica)
        return math.ceil(replicas / math.floor(1 / self.gpus_per_replica + 1e-9))

    def price_per_hour(self, replicas: int) -> float:
        """Of so many, and of their GPUs, whole ones."""
        return self.price_per_gpu_hour * self.gpus(replicas) + self.price_per_replica_hour * replicas


@dataclass(frozen=True, slots=True, kw_only=True)
class DemandConfig:
    """How much users ask, and how much is kept of each."""

    users: tuple[float, ...] = (1e4, 1e5, 1e6, 1e7, 1e8, 1e9)
    """For how many users to plan."""
    requests_per_day: float = 10.0
    """Of a user, on average."""
    peak_factor: float = 2.5
    """The busiest moment of a day over the mean of the day."""
    bytes_per_user: float = 2_900.0
    """Of a user with a few history items in the store (benchmarks/store.py)."""
    bytes_per_stack: float = 21_300.0
    """More of a user with a stack."""
    store_copies: int = 2
    """Of the store: itself and its standby."""

    def __post_init__(self) -> None:
        if not self.users or not all(1 <= count <= 1e10 for count in self.users):
            raise ValueError(f"users are {self.users}, wanted at least one number, each 1 to 10^10")
        if not (1 / MOST <= self.requests_per_day <= MOST and self.peak_factor >= 1):
            raise ValueError(
                f"requests_per_day is {self.requests_per_day} and peak_factor {self.peak_factor}, "
                f"wanted {1 / MOST:g} to {MOST:g} and at least 1"
            )
        if self.peak_factor > PEAK_MAX:
            raise ValueError(f"peak_factor is {self.peak_factor}, wanted at most {PEAK_MAX}: a day's curve has no more")
        sizes = (self.bytes_per_user, self.bytes_per_stack)
        if not all(0 <= size <= BYTES_MAX for size in sizes) or not 1 <= self.store_copies <= MOST:
            raise ValueError(
                f"bytes_per_user and bytes_per_stack are 0 to {BYTES_MAX:g}, store_copies 1 to {MOST:g}; got {self}"
            )

    @property
    def peak_per_user_s(self) -> float:
        """Requests a second of one user at the busiest moment."""
        return self.requests_per_day / DAY_S * self.peak_factor


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetConfig:
    """What users are promised at the busiest moment."""

    ttft_ms_p99: float = 500.0
    """To the first token, of all but one request in a hundred."""
    total_ms_p99: float = 5_000.0
    """To the last token."""
    refused_share: float = 0.001
    """503s."""

    def __post_init__(self) -> None:
        is_finite = 0 < self.ttft_ms_p99 < math.inf and 0 < self.total_ms_p99 < math.inf
        if not (is_finite and 0 <= self.refused_share < 1):
            raise ValueError(
                f"a target is more than 0 ms and finite, and a share of refused requests 0 to 1; got {self}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleConfig:
    """How much is simulated for one figure."""

    requests: int = 1500
    """For each replica of the pod; the time in which they come depends on the rate."""
    curve_points: int = 8
    """Rates of the figure of latency against rate."""
    precision: float = 0.02
    """Of the rate that a replica can take."""
    seed: int = 0
    """Of arrivals."""

    def __post_init__(self) -> None:
        if self.requests < 50 or self.curve_points < 2 or not 0 < self.precision < 0.5 or self.seed < 0:
            raise ValueError(
                "requests is at least 50, curve_points at least 2, precision between 0 and 0.5, seed at least 0"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A pod at one rate."""

    per_s: float
    """Requests a second for each replica."""
    ttft_ms_p50: float
    ttft_ms_p99: float
    total_ms_p50: float
    total_ms_p99: float
    refused_share: float
    engine_busy: float
    ingress_busy: float
    rows: float
    """Decoding rows of a step, on average."""
    stack_hits: float | None
    """Share of the requests with a stack that find it on the device; none: no such request."""

    def misses(self, target: TargetConfig) -> list[str]:
        """What of the target does not hold."""
        return [
            name
            for name in ("ttft_ms_p99", "total_ms_p99", "refused_share")
            if getattr(self, name) > getattr(target, name)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The answer for one number of users."""

    users: float
    peak_per_s: float
    replicas: int
    """With the spare ones."""
    gpus: int
    at_peak: Point
    """With the spare replicas dead."""
    cost_per_month: float
    """All replicas all the time."""
    cost_per_month_scaled: float
    """Replicas follow the day's curve."""
    cost_per_1000_users: float
    """A month, as `cost_per_month`."""
    store_bytes: float


def check_lengths(pod: PodConfig, traffic: TrafficConfig) -> float:
    """The share of requests that are longer than a replica takes; ValueError where that is more than a few."""
    mean = traffic.prompt_tokens + traffic.answer_tokens
    takes = (
        f"and a replica takes at most {pod.max_tokens} (fleet.pod.max_tokens, as engine.max_tokens of the service); "
        "measure one that takes more, or plan for shorter requests"
    )
    if mean > pod.max_tokens:
        raise ValueError(f"a prompt and its answer have {mean:.0f} tokens on average, {takes}")
    share = share_longer(traffic, pod.max_tokens)
    if share > TOO_LONG_MAX:
        raise ValueError(f"{share:.0%} of the prompts have too many tokens with their answers, {takes}")
    return share


class Planner:
    """Simulates a pod where that is needed, and remembers it."""

    def __init__(
        self,
        fleet: FleetConfig,
        times: ServiceTimes,
        traffic: TrafficConfig,
        demand: DemandConfig,
        target: TargetConfig,
        sample: SampleConfig | None = None,
    ) -> None:
        self.fleet, self.times, self.traffic, self.demand = fleet, times, traffic, demand
        self.target, self.sample = target, sample or SampleConfig()
        self._known: dict[float, Point] = {}
        # A replica's rate is asked for, so their number stays.
        self._pod = replace(fleet.pod, autoscaler=None)
        self.too_long_share = check_lengths(fleet.pod, traffic)
        if self.too_long_share > TOO_LONG_TOLD:
            log.warning(
                "%.1f%% of the requests are longer than the %d tokens of a replica: the service refuses them, the plan "
                "serves them",
                self.too_long_share * 100,
                fleet.pod.max_tokens,
            )

    @cached_property
    def can_per_s(self) -> float:
        """What a replica that always has more to do gets through."""
        return saturation_per_s(self._pod, self.times, self.traffic) / self._pod.replicas

    def at(self, per_s: float) -> Point:
        """A pod whose replicas get that many requests a second each."""
        if per_s not in self._known:
            self._known[per_s] = self._simulated(per_s, self.sample.requests, self.sample.seed)
        return self._known[per_s]

    def _simulated(self, per_s: float, requests: int, seed: int) -> Point:
        pod = self._pod
        arrivals = sample_arrivals(
            self.traffic,
            per_s=per_s * pod.replicas,
            requests=requests * pod.replicas,
            users=max(1, round(per_s * pod.replicas / self.demand.peak_per_user_s)),
            seed=seed,
        )
        run = simulate_pod(arrivals, pod, self.times, seed=seed)
        begin_s = arrivals[int(len(arrivals) * WARM_SHARE)].at_s
        counted = [outcome for outcome in run.outcomes if outcome.arrival.at_s >= begin_s]
        rows = run.rows / run.steps if run.steps else 0.0
        point = _point(per_s, counted, run.busy["engine"], run.busy["ingress"], rows)
        log.info("%.3g requests/s a replica: total p99 %.0f ms", per_s, point.total_ms_p99)
        return point

    def limit_per_s(self) -> float:
        """The most that a replica can take while the target holds, also for longer. ValueError where it never holds."""

        def why(per_s: float) -> str:
            return (
                f"even at {per_s:.3g} requests/s a replica {' and '.join(self._missed(per_s))}; "
                "relax the target, or take faster replicas"
            )

        least = self.can_per_s / 50
        limit = largest(
            lambda per_s: not self.at(per_s).misses(self.target),
            least,
            LOAD_MAX * self.can_per_s,
            self.sample.precision,
            why,
        )
        while True:
            self._known[limit] = self._simulated(limit, PROVED_BY * self.sample.requests, self.sample.seed + 1)
            if not self._known[limit].misses(self.target):
                return limit
            if limit * STEP_DOWN < least:
                raise ValueError(why(limit))
            limit *= STEP_DOWN

    def curve(self, limit_per_s: float) -> list[Point]:
        """Points from little load to more than the limit."""
        for share in np.linspace(0.1, 1.25, self.sample.curve_points):
            self.at(float(share * limit_per_s))
        return sorted(self._known.values(), key=lambda point: point.per_s)

    def plan(self, users: float, limit_per_s: float) -> Plan:
        """Replicas, latency and cost for so many users."""
        fleet, demand = self.fleet, self.demand
        peak_per_s = users * demand.peak_per_user_s
        needed = max(1, math.ceil(peak_per_s / limit_per_s))
        replicas = self._with_spare(needed)
        per_s = peak_per_s / needed
        per_s = limit_per_s if per_s > limit_per_s * (1 - self.sample.precision) else per_s
        day = [
            self._with_spare(math.ceil(peak_per_s * share / limit_per_s)) for share in day_shares(demand.peak_factor)
        ]
        month = fleet.price_per_hour(replicas) * MONTH_H
        return Plan(
            users=users,
            peak_per_s=peak_per_s,
            replicas=replicas,
            gpus=fleet.gpus(replicas),
            at_peak=self.at(per_s),
            cost_per_month=month,
            cost_per_month_scaled=float(np.mean([fleet.price_per_hour(count) for count in day])) * MONTH_H,
            cost_per_1000_users=month / users * 1000,
            store_bytes=users
            * (demand.bytes_per_user + self.traffic.stack_share * demand.bytes_per_stack)
            * demand.store_copies,
        )

    def expected_hits(self, per_s: float) -> float:
        """Stack hits of a replica by Che's approximation, to set against the simulated ones."""
        users = per_s / self.demand.peak_per_user_s * self.traffic.stack_share
        return hit_share(
            zipf_shares(self.traffic.zipf, max(1, min(round(users), CROWD_MAX))), self.fleet.pod.stack_slots
        )

    def _with_spare(self, needed: int) -> int:
        spare = max(1, math.ceil(needed * self.fleet.spare_share))
        return max(self.fleet.min_replicas, needed + spare)

    def _missed(self, per_s: float) -> list[str]:
        point = self.at(per_s)
        return [
            f"{name} is {getattr(point, name):.3g}, wanted {getattr(self.target, name):.3g}"
            for name in point.misses(self.target)
        ]


def largest(
    holds: Callable[[float], bool], low: float, high: float, precision: float, why: Callable[[float], str]
) -> float:
    """The largest value of a range at which something holds that stops holding once, by bisection."""
    if not holds(low):
        raise ValueError(why(low))
    if holds(high):
        return high
    while high - low > precision * high:
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def day_shares(peak_factor: float) -> np.ndarray:
    """Load over a day as shares of its peak: a bell on a circle whose top is `peak_factor` times its mean."""
    if peak_factor == 1:
        return np.ones(DAY_POINTS)
    sharpness = brentq(lambda k: np.exp(k) / i0(k) - peak_factor, 1e-9, 700)
    hours = np.linspace(0, 2 * np.pi, DAY_POINTS, endpoint=False)
    return np.exp(sharpness * (np.cos(hours) - 1))


def _point(per_s: float, outcomes: list[Outcome], engine_busy: float, ingress_busy: float, rows: float) -> Point:
    answered = [outcome for outcome in outcomes if outcome.status == 200]
    clocks: dict[str, Any] = {}
    for clock in ("ttft_ms", "total_ms"):
        for p in (50, 99):
            values = [getattr(outcome, clock) for outcome in answered]
            clocks[f"{clock}_p{p}"] = float(np.percentile(values, p)) if values else 0.0
    stacked = [outcome for outcome in answered if outcome.arrival.has_stack]
    return Point(
        per_s=per_s,
        **clocks,
        refused_share=1 - len(answered) / len(outcomes),
        engine_busy=engine_busy,
        ingress_busy=ingress_busy,
        rows=rows,
        stack_hits=1 - float(np.mean([outcome.is_miss for outcome in stacked])) if stacked else None,
    )
