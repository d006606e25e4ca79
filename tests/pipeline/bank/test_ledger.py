"""The ledger of a bank's training, against values worked out by hand."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest

from mta_ray.pipeline.bank.ledger import Ledger
from mta_ray.pipeline.bank.snapshot import GroupRow


class Clock:
    """Seconds, that pass when they are told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def reported(ledger: Ledger, clock: Clock, group: int, upto: dict[int, int], loss: float, tokens: int) -> None:
    """Two seconds pass, and the group tells what it did in them."""
    clock.now_s += 2
    ledger.stepped(group, upto, {adapter: loss + adapter for adapter in upto}, tokens=tokens, seconds=2.0)


def row(ledger: Ledger, group: int) -> GroupRow:
    return next(row for row in ledger.snapshot().groups if row.group == group)


def test_one_group_from_its_start_to_its_end(clock: Clock) -> None:
    ledger = Ledger(total=5, already_done=2, clock=clock)
    assert ledger.snapshot().groups == () and ledger.snapshot().device_seconds == 0
    clock.now_s += 100  # nothing costs anything before a group holds devices
    ledger.group_started(0, workers=2, devices=2, lanes=2)
    ledger.adapter_started(0, 7, budget=10, done=0)
    ledger.adapter_started(0, 8, budget=20, done=4)
    clock.now_s += 6
    assert row(ledger, 0) == GroupRow(
        group=0,
        state="starting",
        reason="",
        workers=2,
        devices=2,
        lanes_busy=2,
        lanes=2,
        adapters_done=0,
        tokens_per_s=0.0,
        loss=None,
    )
    assert ledger.snapshot().device_seconds == 12 and ledger.snapshot().eta_s is None

    reported(ledger, clock, 0, {7: 1, 8: 5}, loss=0.5, tokens=300)
    reported(ledger, clock, 0, {7: 3, 8: 7}, loss=0.5, tokens=500)
    assert ledger.snapshot().eta_s is None  # two reports say little
    reported(ledger, clock, 0, {7: 5, 8: 9}, loss=0.25, tokens=400)
    now = ledger.snapshot()
    assert row(ledger, 0).state == "training"
    assert row(ledger, 0).loss == (7.25 + 8.25) / 2
    assert now.tokens == 1200 and now.tokens_per_s == 200  # in 3 times 2 s
    assert now.steps == 5 + 9
    # Left: 5 and 11 steps, and 15 (the mean of 10 and 20) of the one that waits; 10 steps in 6 s were made.
    assert now.eta_s == pytest.approx((5 + 11 + 15) / (10 / 6))
    assert (now.adapters, now.adapters_done, now.adapters_done_here) == (5, 2, 0)

    ledger.adapter_finished(0, 7)
    ledger.adapter_started(0, 9, budget=6, done=0)
    ledger.adapter_failed(0, 8, "loss is nan")
    assert row(ledger, 0).lanes_busy == 1 and row(ledger, 0).loss is None
    ledger.adapter_finished(0, 9)
    assert ledger.snapshot().eta_s == 0
    ledger.group_ended(0)
    clock.now_s += 50  # nobody holds anything
    end = ledger.snapshot()
    assert end.is_over and end.failures == {8: "loss is nan"}
    assert (end.adapters_done, end.adapters_done_here, row(ledger, 0).adapters_done) == (4, 2, 2)
    assert end.elapsed_s == 12 and end.device_seconds == 24 and end.tokens_per_s == 0
    assert ledger.cost() == "cost: 12.0 device-seconds an adapter (2 adapters, 2 devices, 12 s), 50 tokens/s a device"


def test_a_lost_group_costs_until_its_loss_and_again_from_its_next_start(clock: Clock) -> None:
    ledger = Ledger(total=2, already_done=0, clock=clock)
    ledger.group_started(0, workers=1, devices=4, lanes=1)
    ledger.group_started(1, workers=1, devices=1, lanes=1)
    ledger.adapter_started(0, 0, budget=10, done=0)
    reported(ledger, clock, 0, {0: 6}, loss=1.0, tokens=10)
    ledger.group_lost(0, "worker 1 died")
    assert (row(ledger, 0).state, row(ledger, 0).reason, row(ledger, 0).lanes_busy) == ("lost", "worker 1 died", 0)
    assert not ledger.snapshot().is_over
    ledger.adapter_returned(0, 0)
    clock.now_s += 10
    ledger.stepped(0, {0: 9}, {0: 0.1}, tokens=1000, seconds=1.0)  # too late
    assert ledger.snapshot().tokens == 10 and ledger.snapshot().steps == 6
    assert ledger.snapshot().device_seconds == 4 * 2 + 1 * 12

    ledger.adapter_started(1, 0, budget=10, done=5)  # its checkpoint was older
    assert ledger.snapshot().steps == 5
    ledger.group_started(0, workers=1, devices=4, lanes=1)
    assert row(ledger, 0).state == "starting" and row(ledger, 0).reason == ""
    clock.now_s += 1
    assert ledger.snapshot().device_seconds == 4 * 3 + 1 * 13
    assert ledger.snapshot().devices == 5
    ledger.stepped(0, {0: 9}, {0: 0.1}, tokens=1, seconds=1.0)  # the lane is another group's
    assert ledger.snapshot().steps == 5 and row(ledger, 0).loss is None


def test_the_rate_is_of_the_last_half_minute_and_falls_when_reports_stay_away(clock: Clock) -> None:
    ledger = Ledger(total=1, already_done=0, clock=clock)
    ledger.group_started(0, workers=1, devices=1, lanes=1)
    ledger.adapter_started(0, 0, budget=1000, done=0)
    for n in range(1, 51):  # 100 s, the last 30 of them ten times as fast
        reported(ledger, clock, 0, {0: n}, loss=1.0, tokens=1000 if n > 35 else 100)
    assert row(ledger, 0).tokens_per_s == pytest.approx(500)
    clock.now_s += 2  # the next one is due now
    assert row(ledger, 0).tokens_per_s == pytest.approx(14 * 1000 / 28)
    clock.now_s += 14
    assert row(ledger, 0).tokens_per_s == pytest.approx(7 * 1000 / (14 + 14))
    clock.now_s += 1000
    assert row(ledger, 0).tokens_per_s < 10


def test_slow_reports_have_a_rate_too(clock: Clock) -> None:
    ledger = Ledger(total=1, already_done=0, clock=clock)
    ledger.group_started(0, workers=1, devices=1, lanes=1)
    ledger.adapter_started(0, 0, budget=10, done=0)
    for n in range(1, 6):
        clock.now_s += 60
        ledger.stepped(0, {0: n}, {0: 1.0}, tokens=600, seconds=60.0)
        assert row(ledger, 0).tokens_per_s == pytest.approx(10)
    clock.now_s += 59
    assert row(ledger, 0).tokens_per_s == pytest.approx(10)
    assert ledger.snapshot().eta_s == pytest.approx(5 * 60)


def test_the_time_left_is_at_least_what_the_longest_lane_needs(clock: Clock) -> None:
    ledger = Ledger(total=2, already_done=0, clock=clock)
    ledger.group_started(0, workers=1, devices=1, lanes=2)
    ledger.adapter_started(0, 0, budget=10, done=0)
    ledger.adapter_started(0, 1, budget=100, done=0)
    for n in (2, 4, 6):
        reported(ledger, clock, 0, {0: n, 1: n}, loss=1.0, tokens=1)
    assert ledger.snapshot().eta_s == pytest.approx(94)  # a step a second; all 98 steps at 2/s would be 49 s


def test_two_groups_add_up(clock: Clock) -> None:
    ledger = Ledger(total=40, already_done=0, clock=clock)
    for group in (1, 0):
        ledger.group_started(group, workers=2, devices=2, lanes=1)
        ledger.adapter_started(group, group, budget=50, done=0)
    for n in (1, 2, 3):
        clock.now_s += 2
        for group in (0, 1):
            ledger.stepped(group, {group: n}, {group: 1.0}, tokens=100, seconds=2.0)
    now = ledger.snapshot()
    assert [row.group for row in now.groups] == [0, 1]
    assert now.tokens_per_s == pytest.approx(100) and now.devices == 4 and now.device_seconds == 24
    assert now.eta_s == pytest.approx((2 * 47 + 38 * 50) / 1.0)
    assert pickle.loads(pickle.dumps(now)) == now


@pytest.mark.parametrize(
    ("finish", "line"),
    [
        (lambda ledger: None, "cost: no adapter done (0 adapters, 1 device, 3 s), 4,000 tokens/s a device"),
        (
            lambda ledger: ledger.adapter_finished(0, 0),
            "cost: 3.0 device-seconds an adapter (1 adapter, 1 device, 3 s), 4,000 tokens/s a device",
        ),
    ],
)
def test_the_cost_is_one_line(clock: Clock, finish: Callable[[Ledger], None], line: str) -> None:
    ledger = Ledger(total=2, already_done=1, clock=clock)
    assert ledger.cost() == "cost: no adapter done (0 adapters, 0 devices, 0 s), 0 tokens/s a device"
    ledger.group_started(0, workers=1, devices=1, lanes=1)
    ledger.adapter_started(0, 0, budget=1, done=0)
    clock.now_s += 3
    ledger.stepped(0, {0: 1}, {0: 2.0}, tokens=12_000, seconds=3.0)
    finish(ledger)
    finish(ledger)  # told twice, counted once
    assert ledger.cost() == line
