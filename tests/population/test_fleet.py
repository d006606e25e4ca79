"""The planner: its search against a scan, its sums against a hand's, and that more of anything never costs less."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from mta_ray.population.capacity.arrivals import Arrival, TrafficConfig, sample_arrivals
from mta_ray.population.capacity.autoscaler import AutoscalerConfig
from mta_ray.population.capacity.fleet import (
    DAY_POINTS,
    DemandConfig,
    FleetConfig,
    Planner,
    Point,
    SampleConfig,
    TargetConfig,
    _point,
    day_shares,
    largest,
)
from mta_ray.population.capacity.service_model import Outcome, PodConfig, saturation_per_s, simulate_pod
from mta_ray.population.capacity.service_times import ServiceTimes, StepTime

TIMES = ServiceTimes(step=StepTime(fixed_ms=5.0, row_ms=0.5, prompt_token_ms=0.05), stack_load_ms=2.0)
TRAFFIC = TrafficConfig(prompt_tokens=20.0, answer_tokens=8.0, stack_share=0.5)
TARGET = TargetConfig(ttft_ms_p99=100.0, total_ms_p99=1000.0)
SAMPLE = SampleConfig(requests=200, curve_points=4)
FLEET = FleetConfig(pod=PodConfig(replicas=1, max_requests=8))


def planner(**changes) -> Planner:  # noqa: ANN003
    parts = {"fleet": FLEET, "times": TIMES, "traffic": TRAFFIC, "demand": DemandConfig(), "target": TARGET}
    return Planner(**(parts | changes), sample=SAMPLE)


def test_bisection_finds_what_a_scan_finds() -> None:
    """On the bisection's own sample, and within what may be asked of a replica."""
    limit = planner().limit_per_s()
    scan = planner()
    can_per_s = saturation_per_s(FLEET.pod, TIMES, scan.traffic) / FLEET.pod.replicas
    rates = np.arange(0.5, 1.5, 0.02) * limit
    holding = max(rate for rate in rates if not scan.at(float(rate)).misses(TARGET))
    most = min(holding, 0.85 * can_per_s)
    assert 0.85 * most <= limit <= 1.04 * most


def test_the_limit_holds_for_longer_with_other_arrivals() -> None:
    ours = planner(target=TargetConfig(ttft_ms_p99=1e6, total_ms_p99=1e6, refused_share=0.001))
    limit = ours.limit_per_s()
    pod = FLEET.pod
    assert limit <= 0.86 * saturation_per_s(pod, TIMES, ours.traffic) / pod.replicas
    users = round(limit * pod.replicas / DemandConfig().peak_per_user_s)
    asked = sample_arrivals(
        ours.traffic,
        per_s=limit * pod.replicas,
        requests=10 * ours.sample.requests * pod.replicas,
        users=users,
        seed=77,
    )
    ended = simulate_pod(asked, pod, TIMES, seed=77).outcomes
    assert np.mean([outcome.status == 503 for outcome in ended]) <= 0.002


def test_more_replicas_that_might_come_take_nothing_from_the_one_that_is_asked_for() -> None:
    grows = replace(FLEET, pod=replace(FLEET.pod, autoscaler=AutoscalerConfig(max_replicas=8)))
    assert planner(fleet=grows).limit_per_s() == planner().limit_per_s()


def test_longer_requests_than_a_replica_takes_are_refused() -> None:
    with pytest.raises(ValueError, match="5400 tokens on average"):
        planner(traffic=TrafficConfig(prompt_tokens=5000.0, answer_tokens=400.0))
    with pytest.raises(ValueError, match=r"(39|40)% of the prompts .* at most 512"):
        planner(traffic=TrafficConfig(prompt_tokens=350.0, answer_tokens=150.0))


def test_a_few_that_are_longer_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """Both lengths geometric with mean 50: so many are longer than 239 (negative binomial)."""
    takes = replace(FLEET, pod=replace(FLEET.pod, max_tokens=239))
    few = planner(fleet=takes, traffic=replace(TRAFFIC, prompt_tokens=50.0, answer_tokens=50.0, lengths="geometric"))
    expected = 0.98**239 + 239 * 0.02 * 0.98**238
    assert few.too_long_share == pytest.approx(expected, rel=0.05) and 0.04 < expected < 0.05
    assert "longer than the 239 tokens" in caplog.text


def test_a_pods_rate_is_each_of_its_replicas() -> None:
    """Two replicas between which requests are drawn by lot are two M/D/1 queues, each of its own share."""
    step = StepTime(fixed_ms=10.0, row_ms=0.0, prompt_token_ms=0.0)
    pod = PodConfig(replicas=2, max_requests=1, max_step_tokens=10**6, max_waiting=10**6, routing="random")
    traffic = TrafficConfig(prompt_tokens=1.0, answer_tokens=1.0, lengths="fixed", stack_share=0.0)
    load = 0.7
    ours = Planner(
        FleetConfig(pod=pod), ServiceTimes(step=step), traffic, DemandConfig(), TARGET, SampleConfig(requests=20_000)
    )
    point = ours.at(load / 10.0 * 1e3)
    # of an M/D/1 queue: the median and the 99th percentile of the wait, by its own recursion (Lindley)
    rng, wait, waits = np.random.default_rng(0), 0.0, []
    for gap in rng.exponential(10.0 / load, 200_000):
        wait = max(0.0, wait + 10.0 - gap)
        waits.append(wait)
    assert point.total_ms_p50 == pytest.approx(10.0 + np.percentile(waits, 50), rel=0.1)
    assert point.total_ms_p99 == pytest.approx(10.0 + np.percentile(waits, 99), rel=0.1)
    assert point.engine_busy == pytest.approx(load, rel=0.05)


@pytest.mark.parametrize("edge", [0.37, 5.0, 99.0])
def test_the_largest_is_just_below_the_edge(edge: float) -> None:
    found = largest(lambda x: x <= edge, 0.1, 100.0, 0.001, lambda _: "")
    assert edge * 0.998 <= found <= edge


def test_a_range_that_holds_or_does_not() -> None:
    assert largest(lambda _: True, 1.0, 7.0, 0.01, lambda _: "") == 7.0
    with pytest.raises(ValueError, match="not even at 1"):
        largest(lambda _: False, 1.0, 7.0, 0.01, lambda x: f"not even at {x:g}")


def test_a_plan_is_a_hands_arithmetic() -> None:
    demand = DemandConfig(
        requests_per_day=20.0, peak_factor=3.0, bytes_per_user=1000.0, bytes_per_stack=4000.0, store_copies=2
    )
    fleet = replace(FLEET, gpus_per_replica=0.5, price_per_gpu_hour=2.0, price_per_replica_hour=1.0, spare_share=0.1)
    plan = planner(fleet=fleet, demand=demand).plan(1e6, 10.0)
    assert plan.peak_per_s == pytest.approx(1e6 * 20 / 86_400 * 3)  # 694.4
    assert plan.replicas == 70 + 7
    assert plan.gpus == 39
    assert plan.cost_per_month == pytest.approx((39 * 2 + 77 * 1) * 730)
    assert plan.cost_per_1000_users == pytest.approx(plan.cost_per_month / 1000)
    assert plan.store_bytes == pytest.approx(1e6 * (1000 + 0.5 * 4000) * 2)
    assert plan.at_peak.per_s == pytest.approx(694.444 / 70, rel=0.02)
    assert 0.3 * plan.cost_per_month < plan.cost_per_month_scaled < 0.5 * plan.cost_per_month  # mean load: a third


def test_a_day_without_a_peak_costs_the_same_scaled_or_not() -> None:
    """All hours are alike, spare replicas too."""
    plan = planner(demand=DemandConfig(requests_per_day=20.0, peak_factor=1.0)).plan(1e6, 10.0)
    assert plan.replicas == 24 + 2
    assert plan.cost_per_month_scaled == pytest.approx(plan.cost_per_month)


@pytest.mark.parametrize(
    ("gpus_per_replica", "replicas", "gpus"),
    [(0.0, 74, 0), (0.6, 74, 74), (0.5, 75, 38), (1 / 3, 7, 3), (0.1, 100, 10), (1.0, 74, 74), (2.0, 5, 10)],
)
def test_a_replicas_share_is_of_one_gpu(gpus_per_replica: float, replicas: int, gpus: int) -> None:
    fleet = FleetConfig(gpus_per_replica=gpus_per_replica, price_per_gpu_hour=3.0, price_per_replica_hour=0.5)
    assert fleet.gpus(replicas) == gpus
    assert fleet.price_per_hour(replicas) == pytest.approx(3 * gpus + 0.5 * replicas)


class _Known(Planner):
    """Whose pods are a formula: the promise fails above `edge` in a short sample, above `later` in a longer one."""

    edge, later = math.inf, math.inf

    def _simulated(self, per_s: float, requests: int, seed: int) -> Point:
        asked = self.sample
        assert (requests, seed) in ((asked.requests, asked.seed), (5 * asked.requests, asked.seed + 1))
        is_late = per_s > (self.edge if requests == asked.requests else self.later)
        return _point(per_s, [_outcome(2e3 if is_late else 1.0)], 0.0, 0.0, 0.0)


def _outcome(total_ms: float, *, status: int = 200) -> Outcome:
    return Outcome(
        arrival=Arrival(0.0, 0, 1, 1), replica=0, status=status, ttft_ms=1.0, total_ms=total_ms, tokens=1, is_miss=False
    )


def test_the_limit_is_what_holds_in_the_longer_sample_or_85_percent_of_saturation() -> None:
    ours = _Known(FLEET, TIMES, TRAFFIC, DemandConfig(), TARGET, SAMPLE)
    assert ours.limit_per_s() == pytest.approx(0.85 * ours.can_per_s)
    ours = _Known(FLEET, TIMES, TRAFFIC, DemandConfig(), TARGET, SAMPLE)
    ours.edge, ours.later = 0.6 * ours.can_per_s, 0.4 * ours.can_per_s
    assert 0.95 * ours.later <= ours.limit_per_s() <= ours.later


def test_the_first_requests_of_a_sample_are_not_counted() -> None:
    """Three users, all with a stack: each misses once, among the first."""
    crowd = TrafficConfig(prompt_tokens=4.0, answer_tokens=2.0, lengths="fixed", zipf=0.0, stack_share=1.0)
    asks = DemandConfig(requests_per_day=8640.0, peak_factor=1.0)  # 0.1 a second
    assert planner(traffic=crowd, demand=asks).at(0.3).stack_hits == 1.0


def test_refused_requests_are_counted_but_not_timed() -> None:
    point = _point(1.0, [_outcome(10.0), _outcome(30.0)] + [_outcome(0.0, status=503)] * 6, 0.0, 0.0, 0.0)
    assert (point.total_ms_p50, point.refused_share) == (20.0, 0.75)


def test_users_alike_find_their_stack_as_often_as_there_are_slots() -> None:
    alike = replace(TRAFFIC, zipf=0.0, stack_share=0.5)
    fleet = replace(FLEET, pod=replace(FLEET.pod, stack_slots=20))
    asks = DemandConfig(requests_per_day=8640.0, peak_factor=1.0)  # 0.1 a second: 200 users, 100 with a stack
    assert planner(fleet=fleet, traffic=alike, demand=asks).expected_hits(20.0) == pytest.approx(0.2)


def test_more_users_more_replicas_and_a_stricter_target_too() -> None:
    loose, strict = planner(), planner(target=replace(TARGET, total_ms_p99=150.0))
    limits = [each.limit_per_s() for each in (loose, strict)]
    assert limits[1] < limits[0]
    users = [1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9]
    many, more = (
        [each.plan(n, limit).replicas for n in users] for each, limit in zip((loose, strict), limits, strict=True)
    )
    assert many == sorted(many) and many[0] == 2  # one, and a spare one
    assert all(a <= b for a, b in zip(many, more, strict=True))
    assert many[-1] == pytest.approx(1.05 * 1e9 * DemandConfig().peak_per_user_s / limits[0], rel=0.01)


def test_slower_steps_take_less_load() -> None:
    slow = replace(TIMES, step=replace(TIMES.step, fixed_ms=10.0))
    assert planner(times=slow).limit_per_s() < 0.8 * planner().limit_per_s()


def test_a_day_has_its_peak_and_its_mean() -> None:
    for peak_factor in (1.0, 1.5, 2.5, 6.0):
        shares = day_shares(peak_factor)
        assert len(shares) == DAY_POINTS and shares.max() == pytest.approx(1.0)
        assert shares.mean() == pytest.approx(1 / peak_factor, rel=0.01)


def test_a_promise_that_cannot_be_kept_is_told() -> None:
    with pytest.raises(ValueError, match=r"even at .* ttft_ms_p99 is .* wanted 1"):
        planner(target=replace(TARGET, ttft_ms_p99=1.0)).limit_per_s()


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: FleetConfig(gpus_per_replica=-1.0), "gpus_per_replica"),
        (lambda: FleetConfig(gpus_per_replica=1.5), "whole number"),
        (lambda: FleetConfig(gpus_per_replica=1e-5), "whole number"),
        (lambda: TargetConfig(ttft_ms_p99=math.inf), "finite"),
        (lambda: TargetConfig(total_ms_p99=math.inf), "finite"),
        (lambda: FleetConfig(spare_share=math.inf), "spare_share"),
        (lambda: DemandConfig(users=()), "users"),
        (lambda: DemandConfig(users=(1e11,)), "users"),
        (lambda: DemandConfig(users=(math.nan,)), "users"),
        (lambda: DemandConfig(requests_per_day=math.inf), "requests_per_day"),
        (lambda: TargetConfig(ttft_ms_p99=math.nan), "target"),
        (lambda: DemandConfig(peak_factor=0.5), "peak_factor"),
        (lambda: TargetConfig(ttft_ms_p99=0.0), "target"),
        (lambda: SampleConfig(requests=1), "requests"),
    ],
)
def test_bad_settings_are_refused(make, complaint) -> None:  # noqa: ANN001
    with pytest.raises(ValueError, match=complaint):
        make()
