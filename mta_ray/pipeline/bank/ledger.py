"""What happens while the bank is trained, counted: events of groups and lanes in, one picture of it all out.

A group trains up to `lanes` adapters at once; an adapter that is done gives its lane to the next one. Nothing is known
here of Ray or of a screen. Adapters and groups are numbers, never users' ids.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from mta_ray.pipeline.bank.snapshot import GroupRow, Snapshot, State

WINDOW_S = 30.0
"""Rates are those of the last seconds, so many; where reports come slower, of the last REPORTS_MIN."""
REPORTS_MIN = 3
"""A group's rate stands on so many reports at least, unless it has given fewer; the time left waits for them."""


class Ledger:
    """Told of every event by the one who hands out the adapters; `snapshot` tells how things stand.

    A report of a group that does not run, or of an adapter that is not in one of its lanes, is late and does not count.
    """

    def __init__(self, total: int, already_done: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`total` adapters make the bank, `already_done` of them are there; `clock` gives seconds."""
        self._total, self._already_done, self._clock = total, already_done, clock
        self._groups: dict[int, _Group] = {}
        self._step: dict[int, int] = {}  # of each adapter that was ever in a lane
        self._budget: dict[int, int] = {}
        self._done: set[int] = set()
        self._failures: dict[int, str] = {}
        self._tokens = 0
        self._devices = 0
        self._started_s: float | None = None
        self._ended_s = 0.0

    # ---- groups

    def group_started(self, group: int, workers: int, devices: int, lanes: int) -> None:
        """The group holds its devices from now on; also again, after it was lost."""
        now_s = self._clock()
        if self._started_s is None:
            self._started_s = now_s
        one = self._groups.setdefault(group, _Group())
        one.release(now_s)  # where nobody told that it was lost
        one.lane_losses.clear()
        one.reports.clear()
        one.state, one.reason, one.since_s = "starting", "", now_s
        one.workers, one.devices, one.lanes = workers, devices, lanes
        self._devices = max(self._devices, sum(g.devices for g in self._groups.values() if g.is_running))

    def group_lost(self, group: int, reason: str) -> None:
        """A worker of it died, and its devices are free. Its adapters wait again: `adapter_returned` says which."""
        self._stop(group, "lost", reason)

    def group_ended(self, group: int) -> None:
        """It has nothing more to do, and its devices are free."""
        self._stop(group, "ended", "")

    # ---- adapters

    def adapter_started(self, group: int, adapter: int, budget: int, done: int) -> None:
        """The adapter has a lane of the group, for `budget` steps of which `done` lie behind it."""
        self._budget[adapter], self._step[adapter] = budget, done
        self._failures.pop(adapter, None)
        self._groups[group].lane_losses[adapter] = None

    def stepped(self, group: int, steps: dict[int, int], losses: dict[int, float], tokens: int, seconds: float) -> None:
        """The group reports: the step that each adapter has reached, its loss in nats, and what that took.

        `tokens` (of prompts and targets) and wall `seconds` are those since the report before.
        """
        one = self._groups.get(group)
        if one is None or not one.is_running:
            return
        one.state = "training"
        gained = 0
        for adapter in steps.keys() & one.lane_losses.keys():
            gained += max(steps[adapter] - self._step[adapter], 0)
            self._step[adapter] = steps[adapter]
            one.lane_losses[adapter] = losses.get(adapter, one.lane_losses[adapter])
        self._tokens += tokens
        one.reports.append(_Report(at_s=self._clock(), seconds=seconds, steps=gained, tokens=tokens))

    def adapter_finished(self, group: int, adapter: int) -> None:
        """The adapter has had its budget and is kept; its lane is free."""
        self._leave(group, adapter)
        if adapter not in self._done:
            self._done.add(adapter)
            self._groups[group].adapters_done += 1

    def adapter_failed(self, group: int, adapter: int, reason: str) -> None:
        """The adapter is given up; its lane is free."""
        self._leave(group, adapter)
        self._failures[adapter] = reason

    def adapter_returned(self, group: int, adapter: int) -> None:
        """The adapter waits for a lane again, with its last checkpoint."""
        self._leave(group, adapter)

    # ---- reading

    def snapshot(self) -> Snapshot:
        """How things stand now."""
        now_s = self._clock()
        rows = tuple(self._row(number, one, now_s) for number, one in sorted(self._groups.items()))
        running = any(one.is_running for one in self._groups.values())
        started_s = now_s if self._started_s is None else self._started_s
        return Snapshot(
            groups=rows,
            adapters=self._total,
            adapters_done=self._already_done + len(self._done),
            adapters_done_here=len(self._done),
            failures=dict(self._failures),
            steps=sum(self._step.values()),
            tokens=self._tokens,
            tokens_per_s=math.fsum(row.tokens_per_s for row in rows),
            elapsed_s=(now_s if running or self._started_s is None else self._ended_s) - started_s,
            devices=self._devices,
            device_seconds=math.fsum(one.device_seconds(now_s) for one in self._groups.values()),
            eta_s=self._eta_s(now_s),
        )

    def cost(self) -> str:
        """The line at the end: `Snapshot.cost`."""
        return self.snapshot().cost()

    def _stop(self, group: int, state: State, reason: str) -> None:
        one = self._groups[group]
        now_s = self._clock()
        one.release(now_s)
        one.state, one.reason = state, reason
        one.lane_losses.clear()
        one.reports.clear()
        self._ended_s = now_s

    def _leave(self, group: int, adapter: int) -> None:
        self._groups[group].lane_losses.pop(adapter, None)

    def _row(self, number: int, one: _Group, now_s: float) -> GroupRow:
        losses = [loss for loss in one.lane_losses.values() if loss is not None]
        return GroupRow(
            group=number,
            state=one.state,
            reason=one.reason,
            workers=one.workers,
            devices=one.devices,
            lanes_busy=len(one.lane_losses),
            lanes=one.lanes,
            adapters_done=one.adapters_done,
            tokens_per_s=one.rate(now_s).tokens,
            loss=sum(losses) / len(losses) if losses else None,
        )

    def _eta_s(self, now_s: float) -> float | None:
        """All steps left at the rate of all groups, but no less than the longest lane needs at its own.

        An adapter that has not started yet has the mean of the budgets that are known.
        """
        over = self._done | self._failures.keys()
        begun = {adapter for adapter in self._budget if adapter not in over}
        fresh = max(self._total - self._already_done - len(over) - len(begun), 0)
        if not begun and not fresh:
            return 0.0

        rates = {number: one.rate(now_s).steps for number, one in self._groups.items()}
        total_rate = sum(rates.values())
        reports = sum(len(one.reports) for one in self._groups.values())
        if reports < REPORTS_MIN or total_rate <= 0:
            return None
        mean_budget = sum(self._budget.values()) / len(self._budget)
        left = sum(self._left(adapter) for adapter in begun) + fresh * mean_budget
        longest = [
            max(self._left(adapter) for adapter in one.lane_losses) * len(one.lane_losses) / rates[number]
            for number, one in self._groups.items()
            if one.lane_losses and rates[number] > 0
        ]
        return max([left / total_rate, *longest])

    def _left(self, adapter: int) -> int:
        return max(self._budget[adapter] - self._step[adapter], 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Report:
    at_s: float
    seconds: float
    steps: int
    tokens: int


@dataclass(frozen=True, slots=True)
class _Rate:
    steps: float
    tokens: float


@dataclass(slots=True)
class _Group:
    state: State = "ended"
    reason: str = ""
    workers: int = 0
    devices: int = 0
    lanes: int = 0
    adapters_done: int = 0
    since_s: float = 0.0
    held_device_seconds: float = 0.0
    lane_losses: dict[int, float | None] = field(default_factory=dict)
    reports: deque[_Report] = field(default_factory=deque)

    @property
    def is_running(self) -> bool:
        return self.state in ("starting", "training")

    def device_seconds(self, now_s: float) -> float:
        return self.held_device_seconds + (self.devices * (now_s - self.since_s) if self.is_running else 0.0)

    def release(self, now_s: float) -> None:
        self.held_device_seconds = self.device_seconds(now_s)
        self.since_s = now_s

    def rate(self, now_s: float) -> _Rate:
        """Per second, over the reports of the window and the time from the first one's beginning.

        The next report is awaited for as long as a report takes on average; from then on the rate falls.
        """
        while len(self.reports) > REPORTS_MIN and self.reports[0].at_s <= now_s - WINDOW_S:
            self.reports.popleft()
        if not self.reports:
            return _Rate(0.0, 0.0)
        first, last = self.reports[0], self.reports[-1]
        awaited_s = sum(report.seconds for report in self.reports) / len(self.reports)
        span_s = max(last.at_s, now_s - awaited_s) - (first.at_s - first.seconds)
        if span_s <= 0:
            return _Rate(0.0, 0.0)
        return _Rate(
            sum(report.steps for report in self.reports) / span_s,
            sum(report.tokens for report in self.reports) / span_s,
        )
