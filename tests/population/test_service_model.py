"""The simulated pod against queueing theory, against the engine's own schedule, and against itself."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from mta_ray.population.capacity.arrivals import Arrival, TrafficConfig, poisson_arrivals, sample_arrivals
from mta_ray.population.capacity.autoscaler import AutoscalerConfig, Scaler
from mta_ray.population.capacity.service_model import PodConfig, saturation_per_s, simulate_pod
from mta_ray.population.capacity.service_times import ProcessTime, ServiceTimes, StepTime

MANY = 10**6
ONE_BY_ONE = PodConfig(replicas=1, max_requests=1, max_step_tokens=MANY, max_waiting=MANY, routing="random")
STEP_MS = 10.0
TIMES = ServiceTimes(step=StepTime(fixed_ms=STEP_MS, row_ms=0.0, prompt_token_ms=0.0))
SERVED = TrafficConfig(prompt_tokens=1.0, answer_tokens=1.0, lengths="fixed", zipf=0.0, stack_share=0.0)
"""One step each: a service of exactly STEP_MS."""
ALL = ServiceTimes(
    step=StepTime(fixed_ms=2.0, row_ms=0.2, prompt_ms=0.5, prompt_token_ms=0.02),
    proxy=ProcessTime(request_ms=1.0, token_ms=0.2, native_request_ms=0.3, native_token_ms=0.1),
    ingress=ProcessTime(request_ms=2.0, token_ms=0.3),
    replica=ProcessTime(request_ms=2.0, token_ms=0.3, native_token_ms=0.1),
    client=ProcessTime(request_ms=0.5, token_ms=0.1),
    away_ms=1.5,
    after_share=0.3,
    stack_load_ms=3.0,
)


def waits(arrivals: list[Arrival], config: PodConfig, *, service_ms: float = 0.0, seed: int = 0) -> np.ndarray:
    return np.array([o.total_ms for o in simulate_pod(arrivals, config, TIMES, seed=seed).outcomes]) - service_ms


def test_one_row_with_equal_answers_waits_as_m_d_1() -> None:
    load = 0.7
    arrivals = sample_arrivals(SERVED, per_s=load / STEP_MS * 1e3, requests=40_000, users=1, seed=1)
    expected_ms = load * STEP_MS / (2 * (1 - load))  # Pollaczek-Khinchine, no variance of service
    assert waits(arrivals, ONE_BY_ONE, service_ms=STEP_MS).mean() == pytest.approx(expected_ms, rel=0.06)


def geometric(per_s: float, mean_tokens: float, requests: int, seed: int) -> list[Arrival]:
    traffic = replace(SERVED, answer_tokens=mean_tokens, lengths="geometric")
    return [
        replace(a, prompt_tokens=1)
        for a in sample_arrivals(traffic, per_s=per_s, requests=requests, users=1, seed=seed)
    ]


def test_one_row_with_memoryless_answers_waits_as_m_g_1() -> None:
    """Geometric lengths: the discrete exponential. Its own first two moments, in Pollaczek and Khinchine's formula."""
    load, tokens = 0.6, 20.0
    mean_ms = tokens * STEP_MS
    arrivals = geometric(load / mean_ms * 1e3, tokens, 40_000, 2)
    second = STEP_MS**2 * (2 - 1 / tokens) * tokens**2  # E[S²] of a geometric law with mean 20
    expected_ms = load / mean_ms * second / (2 * (1 - load))
    waited = [o.total_ms - STEP_MS * o.tokens for o in simulate_pod(arrivals, ONE_BY_ONE, TIMES).outcomes]
    assert np.mean(waited) == pytest.approx(expected_ms, rel=0.1)


def test_what_finds_no_room_is_refused_as_often_as_in_m_m_1_k() -> None:
    load, tokens, room = 0.9, 20.0, 3
    arrivals = geometric(load / (tokens * STEP_MS) * 1e3, tokens, 40_000, 3)
    outcomes = simulate_pod(arrivals, replace(ONE_BY_ONE, max_waiting=room - 1), TIMES).outcomes
    expected = (1 - load) * load**room / (1 - load ** (room + 1))
    assert np.mean([o.status == 503 for o in outcomes]) == pytest.approx(expected, rel=0.06)
    assert len(outcomes) == len(arrivals)


def test_random_routing_makes_queues_of_their_own() -> None:
    """Each of c replicas is an M/D/1 of a c-th of the arrivals; the less busy of two waits less than that."""
    load, replicas = 0.7, 4
    arrivals = sample_arrivals(SERVED, per_s=replicas * load / STEP_MS * 1e3, requests=60_000, users=1, seed=4)
    alone_ms = load * STEP_MS / (2 * (1 - load))
    config = replace(ONE_BY_ONE, replicas=replicas)
    assert waits(arrivals, config, service_ms=STEP_MS).mean() == pytest.approx(alone_ms, rel=0.08)
    chosen = replace(config, routing="two_choices")
    assert waits(arrivals, chosen, service_ms=STEP_MS).mean() < 0.6 * alone_ms


def test_littles_law_holds_through_all_processes() -> None:
    """Requests in the pod, counted moment by moment, are arrivals a second times seconds in it."""
    traffic = TrafficConfig(answer_tokens=8.0, stack_share=0.5)
    arrivals = poisson_arrivals(traffic, per_s=20.0, seconds=60.0, users=40, seed=5)
    outcomes = simulate_pod(arrivals, PodConfig(replicas=2, cores=3), ALL).outcomes
    assert all(o.status == 200 for o in outcomes)
    begins = np.array([o.arrival.at_s for o in outcomes])
    ends = begins + np.array([o.total_ms for o in outcomes]) / 1e3
    moments = np.linspace(0, ends.max(), 50_000)
    inside = ((begins[None, :] <= moments[:, None]) & (moments[:, None] < ends[None, :])).sum(axis=1).mean()
    per_s = len(outcomes) / ends.max()
    assert inside == pytest.approx(per_s * np.mean([o.total_ms for o in outcomes]) / 1e3, rel=0.01)


@pytest.mark.parametrize("config", [PodConfig(), PodConfig(replicas=1, cores=2), PodConfig(max_step_tokens=20)])
def test_every_token_asked_for_is_said_and_a_seed_repeats_itself(config: PodConfig) -> None:
    arrivals = poisson_arrivals(TrafficConfig(stream_share=0.5), per_s=15.0, seconds=10.0, users=30, seed=6)
    one, other = (simulate_pod(arrivals, config, ALL, seed=1) for _ in range(2))
    assert one.outcomes == other.outcomes
    assert sorted(o.arrival.at_s for o in one.outcomes) == [a.at_s for a in arrivals]
    assert all(o.tokens == o.arrival.answer_tokens and 0 < o.ttft_ms <= o.total_ms for o in one.outcomes)
    assert sum(a.answer_tokens - 1 for a in arrivals) == one.rows  # each but the first takes a row of a step


def test_steps_are_those_of_the_engines_own_schedule() -> None:
    """The engine's `Schedule`, stepped by hand over the same arrivals with the same step times."""
    from mta_ray.model.requests import Request, Ticket
    from mta_ray.model.schedule import Schedule

    step = StepTime(fixed_ms=3.0, row_ms=0.5, prompt_ms=1.0, prompt_token_ms=0.1)
    config = PodConfig(replicas=1, max_requests=4, max_step_tokens=24, max_waiting=MANY)
    traffic = TrafficConfig(prompt_tokens=20.0, answer_tokens=6.0, stack_share=0.0)
    arrivals = poisson_arrivals(traffic, per_s=40.0, seconds=5.0, users=50, seed=7)
    simulated = {o.arrival.at_s: o for o in simulate_pod(arrivals, config, ServiceTimes(step=step)).outcomes}

    schedule, now_ms = Schedule(config.max_requests, config.max_step_tokens), 0.0
    coming = list(arrivals)
    first_ms: dict[float, float] = {}
    last_ms: dict[float, float] = {}
    arrived: dict[Ticket, Arrival] = {}
    while coming or schedule.waiting or schedule.running:
        if not (schedule.waiting or schedule.running):
            now_ms = max(now_ms, coming[0].at_s * 1e3)
        while coming and coming[0].at_s * 1e3 <= now_ms:
            arrival = coming.pop(0)
            request = Request(prompt=(1,) * arrival.prompt_tokens, max_new_tokens=arrival.answer_tokens)
            ticket = Ticket(request, 0, seed="", cancel=lambda _: None, asynchronous=False)
            arrived[ticket] = arrival
            schedule.waiting.append(ticket)
        schedule.admit()
        decoding, chunks = schedule.plan()
        now_ms += step.of(len(decoding), len(chunks), sum(turn.count for turn in chunks))
        spoken = [turn.running for turn in (*decoding, *chunks) if turn.is_last_of_known]
        for turn in (*decoding, *chunks):
            turn.running.cached += turn.count
        for running in spoken:
            running.tokens.append(0)
            at_s = arrived[running.ticket].at_s
            first_ms.setdefault(at_s, now_ms - at_s * 1e3)
            if running.generated == running.ticket.request.max_new_tokens:
                last_ms[at_s] = now_ms - at_s * 1e3
                schedule.remove(running, lambda *_: None)

    assert {at: o.ttft_ms for at, o in simulated.items()} == pytest.approx(first_ms)
    assert {at: o.total_ms for at, o in simulated.items()} == pytest.approx(last_ms)


@pytest.mark.parametrize("turns", [1, 4])
def test_a_request_alone_takes_what_its_parts_take(turns: int) -> None:
    """In however many turns: nobody is there to wait for."""
    arrivals = [Arrival(0.0, 0, 10, 5)]
    step, work = ALL.step, [ALL.client, ALL.proxy, ALL.ingress, ALL.replica]
    prompt_ms = step.fixed_ms + step.prompt_ms + 10 * step.prompt_token_ms
    in_ms = sum((t.request_ms + t.native_request_ms) * (1 - ALL.after_share) for t in work)
    out_ms = sum(t.token_ms + t.native_token_ms for t in work)
    (outcome,) = simulate_pod(arrivals, PodConfig(replicas=1), replace(ALL, turns=turns)).outcomes
    assert outcome.ttft_ms == pytest.approx(in_ms + ALL.away_ms + prompt_ms + out_ms)
    # every later token is a step, held up by the replica's own loop, which shares the interpreter with the engine
    per_token_ms = (outcome.total_ms - outcome.ttft_ms) / 4
    assert step.of(1, 0, 0) <= per_token_ms <= step.of(1, 0, 0) + ALL.replica.token_ms + 1e-9


@pytest.mark.parametrize("turns", [1, 4])
def test_an_idle_process_is_woken_up_once_for_a_request_and_once_for_a_piece(turns: int) -> None:
    wakes = replace(ALL, turns=turns, ingress=replace(ALL.ingress, wake_ms=0.7))
    took = [
        simulate_pod([Arrival(0.0, 0, 10, 1)], PodConfig(replicas=1), times).outcomes[0].ttft_ms
        for times in (ALL, wakes)
    ]
    assert took[1] - took[0] == pytest.approx(2 * 0.7)


def test_fewer_cpus_than_processes_slow_everybody() -> None:
    arrivals = sample_arrivals(
        TrafficConfig(answer_tokens=8.0, stack_share=0.0), per_s=15.0, requests=150, users=9, seed=8
    )
    means = [
        np.mean([o.total_ms for o in simulate_pod(arrivals, PodConfig(replicas=2, cores=cores), ALL).outcomes])
        for cores in (1, 2, 8, None)
    ]
    assert means[0] > 1.1 * means[1] and means[1] > means[2] >= means[3] * 0.999


def test_clients_who_ask_again_wait_for_each_other() -> None:
    """One row that is never idle, and five clients: each waits for all five (Little's law)."""
    asked = [Arrival(0.0, n, 1, 1) for n in range(40)]
    run = simulate_pod(asked[:5], ONE_BY_ONE, TIMES, then=asked[5:])
    assert [o.total_ms for o in run.outcomes] == pytest.approx([10.0, 20.0, 30.0, 40.0] + [50.0] * 36)
    assert run.outcomes[-1].arrival.at_s == pytest.approx(0.35)


@pytest.mark.parametrize(("clients", "longer"), [(1, 1.0), (2, 1.5), (3, 1.75), (4, 2.0), (8, 2.0)])
def test_work_takes_longer_the_more_requests_are_under_way(clients: int, longer: float) -> None:
    times = replace(TIMES, longer=((2.0, 1.5), (4.0, 2.0)))
    asked = [Arrival(0.0, n, 1, 1) for n in range(100)]
    ended = simulate_pod(asked[:clients], ONE_BY_ONE, times, then=asked[clients:]).outcomes
    ends_ms = sorted(o.arrival.at_s * 1e3 + o.total_ms for o in ended)
    middle = np.diff(ends_ms[clients : len(asked) - clients])  # one row: as many steps as answers
    assert middle == pytest.approx(STEP_MS * longer)


def test_work_in_turns_waits_for_a_cpu_each_time() -> None:
    """One CPU, and a foreign program that takes it for 3 ms whenever it can."""
    pod = replace(ONE_BY_ONE, cores=1, others=0.99)
    alone = ServiceTimes(
        step=StepTime(fixed_ms=1.0, row_ms=0.0, prompt_token_ms=0.0), proxy=ProcessTime(request_ms=8.0)
    )
    asked = [Arrival(n * 1.0, n, 1, 1) for n in range(60)]
    one, four = (
        np.mean([o.ttft_ms for o in simulate_pod(asked, pod, replace(alone, turns=turns)).outcomes]) for turns in (1, 4)
    )
    assert 6 < four - one < 9.1  # three more times that a turn of the other program is waited for, or most of it


def test_home_keeps_a_stack_on_one_replica() -> None:
    """A shelf for half the users on each of two replicas holds all of them, if each comes to one replica only."""
    traffic = TrafficConfig(prompt_tokens=1.0, answer_tokens=2.0, lengths="fixed", zipf=0.0, stack_share=1.0)
    arrivals = poisson_arrivals(traffic, per_s=20.0, seconds=100.0, users=40, seed=9)
    misses = {}
    for routing in ("home", "two_choices"):
        config = PodConfig(replicas=2, stack_slots=30, routing=routing)
        ended = simulate_pod(arrivals, config, ServiceTimes()).outcomes
        misses[routing] = np.mean([o.is_miss for o in ended if o.arrival.at_s > 20])
    assert misses["home"] < 0.05 < misses["two_choices"]


def test_saturation_is_one_over_the_time_of_service() -> None:
    assert saturation_per_s(replace(ONE_BY_ONE, replicas=3), TIMES, SERVED) == pytest.approx(
        3 * 1e3 / STEP_MS, rel=0.02
    )


def test_what_is_done_on_the_way_in_counts_towards_saturation() -> None:
    """One CPU for all: 8 ms in the ingress and a step of 10 ms a request, whichever comes first in a crowd."""
    pod = replace(ONE_BY_ONE, cores=1)
    times = replace(TIMES, ingress=ProcessTime(request_ms=8.0))
    assert saturation_per_s(pod, times, SERVED) == pytest.approx(1e3 / (8 + STEP_MS), rel=0.02)


def test_replicas_come_after_the_delays_and_go() -> None:
    scaler = AutoscalerConfig(
        min_replicas=1, max_replicas=3, target_ongoing_requests=2.0, upscale_delay_s=5.0, downscale_delay_s=20.0,
        look_back_s=5.0, startup_s=10.0, metrics_interval_s=1.0,
    )  # fmt: skip
    config = replace(ONE_BY_ONE, max_requests=2, autoscaler=scaler)
    crowd = [Arrival(20.0 + n * 0.05, 0, 1, 20) for n in range(600)]  # 200 ms of work each, for 30 s
    calm = [Arrival(60.0 + n * 1.0, 0, 1, 1) for n in range(60)]
    run = simulate_pod([*crowd, *calm], config, TIMES)
    counts = [count for _, count in run.replicas]
    assert counts[0] == 1 and max(counts) == 3 and counts[-1] == 1
    grown_s = next(at for at, count in run.replicas if count > 1)
    assert 20 + 5 + 10 <= grown_s <= 20 + 5 + 10 + 3
    assert len(run.outcomes) == 660

    # what is under way is told each ten seconds only, at 21 s and at 31 s: of a crowd that comes at 22 s, so late
    told = replace(config, autoscaler=replace(scaler, metrics_interval_s=10.0))
    crowd = [replace(arrival, at_s=arrival.at_s + 2) for arrival in crowd]
    later = [(at, count) for at, count in simulate_pod([*crowd, *calm], told, TIMES).replicas if count > 1]
    assert 31 + 5 + 10 <= later[0][0] <= 31 + 5 + 10 + 3


def test_who_has_least_to_do_goes() -> None:
    """One replica is at work on a long answer when one is enough: the next question goes to it too."""
    scaler = AutoscalerConfig(
        max_replicas=2, target_ongoing_requests=2.0, downscale_delay_s=0.0, metrics_interval_s=1.0
    )
    pod = PodConfig(replicas=2, max_requests=2, routing="two_choices", autoscaler=scaler)
    run = simulate_pod([Arrival(0.0, 0, 1, 1000), Arrival(5.0, 1, 1, 1)], pod, TIMES)
    assert [count for _, count in run.replicas] == [2, 1]
    assert len({outcome.replica for outcome in run.outcomes}) == 1


def test_a_stack_that_is_not_there_takes_its_time_to_load() -> None:
    asked = [Arrival(float(n), 0, 1, 1, has_stack=has) for n, has in enumerate((True, True, False))]
    took = [o.total_ms for o in simulate_pod(asked, ONE_BY_ONE, replace(TIMES, stack_load_ms=7.0)).outcomes]
    assert took == pytest.approx([STEP_MS + 7, STEP_MS, STEP_MS])


def test_fewer_are_wanted_for_a_while_before_one_goes() -> None:
    scaler = Scaler(AutoscalerConfig(target_ongoing_requests=1.0, downscale_delay_s=20.0, look_back_s=0.5), 3)
    assert [scaler.decide(float(at), 1) for at in (0, 10, 19, 20)] == [3, 3, 3, 1]


def test_requests_are_averaged_over_the_time_looked_back() -> None:
    scaler = Scaler(AutoscalerConfig(target_ongoing_requests=1.0, upscale_delay_s=0.0, look_back_s=10.0), 1)
    assert [scaler.decide(at, ongoing) for at, ongoing in ((0.0, 1), (1.0, 3), (10.5, 4), (30.0, 4))] == [1, 2, 4, 4]


def test_a_wish_that_passes_changes_nothing() -> None:
    scaler = Scaler(AutoscalerConfig(target_ongoing_requests=1.0, upscale_delay_s=3.0, look_back_s=0.5), 1)
    assert [scaler.decide(float(at), ongoing) for at, ongoing in enumerate((3, 3, 1, 3, 3, 3, 3))] == [1] * 6 + [3]


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: PodConfig(replicas=0), "replicas"),
        (lambda: PodConfig(max_requests=32, max_step_tokens=16), "max_step_tokens"),
        (lambda: PodConfig(cores=0), "cores"),
        (lambda: PodConfig(cores=2, others=math.nan), "others"),
        (lambda: AutoscalerConfig(look_back_s=math.nan), "look_back_s"),
        (lambda: StepTime(fixed_ms=0.0, row_ms=0.0), "no time"),
        (lambda: TrafficConfig(answer_tokens=0.5), "answer_tokens"),
        (lambda: TrafficConfig(stack_share=1.5), "stack_share"),
        (lambda: StepTime(fixed_ms=math.nan), "fixed_ms"),
        (lambda: ProcessTime(token_ms=-1.0), "token_ms"),
        (lambda: ServiceTimes(after_share=2.0), "after_share"),
        (lambda: ServiceTimes(turns=0), "turns"),
        (lambda: AutoscalerConfig(min_replicas=5, max_replicas=4), "min_replicas"),
    ],
)
def test_bad_settings_are_refused(make, complaint) -> None:  # noqa: ANN001
    with pytest.raises(ValueError, match=complaint):
        make()
