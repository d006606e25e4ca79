"""The calibration against a service whose times are known: a simulated one, measured as a live one is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mta_ray.population.capacity import calibrate, closed_loops
from mta_ray.population.capacity.arrivals import Arrival
from mta_ray.population.capacity.calibrate import CalibrationConfig
from mta_ray.population.capacity.closed_loops import Clocks, Loop
from mta_ray.population.capacity.meter import PROCESSES, WARM, Seen, Usage
from mta_ray.population.capacity.service_model import PodConfig, simulate_pod
from mta_ray.population.capacity.service_times import ProcessTime, ServiceTimes, StepTime

STEP = StepTime(fixed_ms=3.0, row_ms=0.1, prompt_ms=0.2, prompt_token_ms=0.01, python_share=0.5)
KNOWN = ServiceTimes(
    step=STEP,
    proxy=ProcessTime(request_ms=1.0, token_ms=0.05, native_request_ms=0.5, wake_ms=0.1),
    ingress=ProcessTime(request_ms=2.0, token_ms=0.1, wake_ms=0.2, native_wake_ms=0.05),
    replica=ProcessTime(request_ms=1.5, token_ms=0.2, native_request_ms=0.4),
    client=ProcessTime(request_ms=0.5, token_ms=0.1),
    away_ms=2.5,
    pause_ms=0.3,
)
POD = PodConfig(replicas=1, cores=4)
PROMPT, LENGTHS = 20, (4, 16, 40)


def _cpu(time: ProcessTime, tokens: int, *, alone: bool) -> dict[str, float]:
    """What the process takes for a request of so many pieces: waking up counts where nothing was to do before."""
    wake, native_wake = (time.wake_ms, time.native_wake_ms) if alone else (0.0, 0.0)
    return {
        "python": time.request_ms + tokens * (time.token_ms + wake),
        "native": time.native_request_ms + tokens * (time.native_token_ms + native_wake),
    }


def _runs(*, alone: bool) -> list[dict]:
    names = ("proxy", "ingress", "replica", "client")
    return [
        {"tokens": tokens, "prompt_tokens": PROMPT}
        | {name: _cpu(getattr(KNOWN, name), tokens, alone=alone) for name in names}
        for tokens in LENGTHS
    ]


def test_a_requests_and_a_tokens_share_and_waking_up_are_found_again() -> None:
    alone, crowd = _runs(alone=True), _runs(alone=False)
    for name in ("proxy", "ingress", "replica", "client"):
        found, wanted = calibrate._process_time(alone, crowd, name), getattr(KNOWN, name)
        for entry in ("request_ms", "token_ms", "native_request_ms", "native_token_ms", "wake_ms", "native_wake_ms"):
            assert getattr(found, entry) == pytest.approx(getattr(wanted, entry), abs=1e-6), (name, entry)


def _clocks(times: ServiceTimes) -> list[dict]:
    """The medians of a client alone."""
    told = []
    for tokens in LENGTHS:
        asked = [Arrival(n * 5.0, n, PROMPT, tokens) for n in range(40)]
        ended = simulate_pod(asked, POD, times).outcomes
        told.append(
            {
                "tokens": float(tokens),
                "prompt_tokens": float(PROMPT),
                "ttft_ms_p50": float(np.median([outcome.ttft_ms for outcome in ended])),
                "total_ms_p50": float(np.median([outcome.total_ms for outcome in ended])),
            }
        )
    return told


def test_what_a_client_alone_waits_for_besides_is_found_again() -> None:
    found = calibrate._with_rest(replace(KNOWN, away_ms=0.0, pause_ms=0.0), POD, _clocks(KNOWN))
    assert found.away_ms == pytest.approx(KNOWN.away_ms, abs=0.05)
    assert found.pause_ms == pytest.approx(KNOWN.pause_ms, abs=0.02)

    # first tokens that come before all work on a request is done: a part of it comes after the answer
    early = replace(KNOWN, away_ms=0.0, after_share=0.4)
    found = calibrate._with_rest(replace(early, pause_ms=0.0, after_share=0.0), POD, _clocks(early))
    assert found.away_ms == 0 and found.after_share == pytest.approx(0.4, abs=0.02)


def _loop(clients: int, *, others: float = 0.0) -> Loop:
    return Loop(
        clients=clients,
        requests=120,
        prompt_tokens=float(PROMPT),
        clocks=tuple(Clocks(tokens=float(tokens), ttft_ms=0.0, total_ms=0.0) for tokens in (4, 16)),
        others_cpus=others,
    )


def test_work_that_takes_longer_beside_other_work_is_found_again() -> None:
    """Clients at once, of whom a service was measured whose work takes longer than its CPU times say."""
    pod, wanted = PodConfig(replicas=1, cores=2), ((2.0, 0.9), (4.0, 1.1), (8.0, 1.3))
    slow = replace(KNOWN, longer=wanted)
    measured = [closed_loops.simulate_loop(slow, pod, _loop(int(clients))) for clients, _ in wanted]
    found = closed_loops.with_longer(KNOWN, pod, measured)
    assert [clients for clients, _ in found.longer] == [2, 4, 8]
    assert [factor for _, factor in found.longer] == pytest.approx([0.9, 1.1, 1.3], abs=0.04)
    assert closed_loops.late(found, pod, measured) < 0.3 * closed_loops.late(KNOWN, pod, measured)


def test_in_a_loop_each_client_waits_for_its_own_answer() -> None:
    """Two who share an engine without any other cost: what a request takes can be said without simulating."""
    step = StepTime(fixed_ms=10.0, row_ms=0.0, prompt_ms=0.0, prompt_token_ms=0.0, python_share=0.0)
    told = closed_loops.simulate_loop(ServiceTimes(step=step), PodConfig(replicas=1), _loop(2))
    assert [clock.total_ms for clock in told.clocks] == pytest.approx([40.0, 160.0])  # a step a token, both in each
    assert [clock.ttft_ms for clock in told.clocks] == pytest.approx([10.0, 10.0])


def test_of_a_measured_loop_each_length_has_its_medians_without_the_first_ones() -> None:
    def answer(n: int) -> dict:
        if n < 5:  # five clients ask at once: nobody waits for that later
            return {"tokens": 40, "prompt_tokens": 20, "ttft_ms": 1e6, "total_ms": 1e6}
        tokens = (4, 16)[n % 2]
        return {"tokens": tokens, "prompt_tokens": 20, "ttft_ms": tokens + n / 1e3, "total_ms": 10 * tokens + n / 1e3}

    told = closed_loops.loop_of([answer(n) for n in range(20)], 2, 5, 0.25)
    assert (told.clients, told.requests, told.prompt_tokens, told.others_cpus) == (5, 20, 20.0, 0.25)
    assert [clock.ttft_ms for clock in told.clocks] == pytest.approx([4.012, 16.012])  # of 6, 8 … 18; of 5, 7 … 19
    assert [clock.total_ms for clock in told.clocks] == pytest.approx([40.012, 160.012])


def test_at_the_fewest_requests_some_are_left_of_every_length() -> None:
    least = calibrate.REQUESTS_MIN
    with pytest.raises(ValueError, match=f"{least} requests"):
        CalibrationConfig(requests=least - 1)
    for clients in range(2, 100):
        for lengths in ((1, 2), (1, 2, 3), (1, 2, 3, 4, 5)):
            asked = closed_loops.mixed([{"body": {}}] * (least // 2), lengths, clients)
            assert len(asked) >= clients + len(lengths)


def test_lengths_take_turns_in_a_loop() -> None:
    asked = closed_loops.mixed([{"body": {"user": "a"}}, {"body": {"user": "b"}}], (4, 16, 40), 8)
    assert [(r["body"]["user"], r["body"]["max_tokens"]) for r in asked] == [
        ("a", 4), ("a", 16), ("a", 40), ("b", 4), ("b", 16), ("b", 40),
    ] * 2  # fmt: skip


def test_the_pace_of_a_slower_machine_is_found_again() -> None:
    """Of the same closed loop, on a machine on which all takes 1.4 times as long, and beside another program."""
    pod, times = PodConfig(replicas=1, cores=2), replace(KNOWN, longer=((2.0, 1.1), (8.0, 1.3)))

    def seen(pace: float, others: float) -> Loop:
        told = closed_loops.simulate_loop(times.at_pace(pace), pod, _loop(4, others=others))
        # the calibration's own error is no pace
        return replace(told, clocks=tuple(replace(clock, total_ms=1.1 * clock.total_ms) for clock in told.clocks))

    known = seen(1.0, 0.0)
    assert closed_loops.pace_of(times, pod, known, seen(1.0, 0.6)) == pytest.approx(1.0, abs=0.02)
    for others in (0.0, 0.6):
        assert closed_loops.pace_of(times, pod, known, seen(1.4, others)) == pytest.approx(1.4, abs=0.06)


def test_at_another_pace_a_client_alone_waits_so_many_times_as_long() -> None:
    times = replace(KNOWN, stack_load_ms=2.0)
    asked = [Arrival(n * 5.0, n, PROMPT, 16, has_stack=True) for n in range(20)]
    took = [
        np.array([(o.ttft_ms, o.total_ms) for o in simulate_pod(asked, POD, one).outcomes])
        for one in (times, times.at_pace(2.5))
    ]
    assert took[1] == pytest.approx(2.5 * took[0], rel=0.02)  # the engine lets others in between by the clock


def test_others_are_what_neither_the_service_nor_its_client_took() -> None:
    seen = Seen(
        seconds=10.0, machine_ms=9_000.0, used={"proxy": Usage(1_000.0, 500.0, 0.0), "x": Usage(0.0, 0.0, 2_500.0)}
    )
    assert seen.others_cpus(3_000.0) == pytest.approx(0.2)
    assert seen.others_cpus(6_000.0) == 0.0  # clocks differ a little


def test_a_runs_cpu_times_are_a_requests_without_what_an_idle_process_takes() -> None:
    told = {
        "requests": [{"status": 200, "tokens": 4, "prompt_tokens": PROMPT, "ttft_ms": 9.0, "total_ms": 20.0}] * 17,
        "cpu_ms": 68.0, "python_ms": 51.0, "life_cpu_ms": 568.0,
    }  # fmt: skip
    count = 17 + WARM
    idle = Seen(seconds=4.0, used={name: Usage(8.0, 4.0, 0.0) for name in PROCESSES})
    engine_ms = STEP.of(0, count, count * PROMPT) + STEP.fixed_ms * (count * 4 - 1) + STEP.row_ms * count * 3
    used = {name: Usage(8.0 / 4 * 10 + count * 2.0, 4.0 / 4 * 10 + count * 0.5, 0.0) for name in PROCESSES}
    used["replica"] = Usage(used["replica"].python, used["replica"].native, 1.25 * engine_ms)
    seen = Seen(seconds=10.0, machine_ms=10_000.0, used=used, steps=count * 4, tokens=count * 4)
    run = calibrate._run_of(told, seen, idle, STEP)
    assert run["client"] == {"python": pytest.approx(3.0), "native": pytest.approx(1.0)}
    assert run["proxy"] == {"python": pytest.approx(2.0), "native": pytest.approx(0.5), "engine": 0.0}
    assert run["engine_over_step"] == pytest.approx(1.25)
    ours_ms = 568.0 + sum(usage.total for usage in used.values())
    assert run["others_cpus"] == pytest.approx((10_000.0 - ours_ms) / 1e4)
