"""The planner: its search against a scan, its sums against a hand's, and that more of anything never costs less."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from mta_ray.population.capacity.arrivals import TrafficConfig, sample_arrivals
from mta_ray.population.capacity.autoscaler import AutoscalerConfig
from mta_ray.population.capacity.fleet import (
    DAY_POINTS,
    DemandConfig,
    FleetConfig,
    Planner,
    SampleConfig,
    TargetConfig,
    day_shares,
    largest,
)
from mta_ray.population.capacity.service_model import PodConfig, saturation_per_s, simulate_pod
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
    assert plan.cost_per_month == pytest.approx(77 * (0.5 * 2 + 1) * 730)
    assert plan.cost_per_1000_users == pytest.approx(plan.cost_per_month / 1000)
    assert plan.store_bytes == pytest.approx(1e6 * (1000 + 0.5 * 4000) * 2)
    assert plan.at_peak.per_s == pytest.approx(694.444 / 70, rel=0.02)
    assert 0.3 * plan.cost_per_month < plan.cost_per_month_scaled < 0.5 * plan.cost_per_month  # mean load: a third


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
