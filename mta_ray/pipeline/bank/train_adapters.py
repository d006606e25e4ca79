"""The groups that train a bank's adapters, from the driver: start them, watch them, start them again when they die."""

from __future__ import annotations

import logging
import math
import time
from contextlib import suppress
from dataclasses import dataclass

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import remove_placement_group

from mta_ray.errors import is_lasting, root_cause
from mta_ray.pipeline.bank.foreman import Roster, hire_foreman
from mta_ray.pipeline.bank.group_loop import train_group
from mta_ray.pipeline.bank.plan import Plan
from mta_ray.pipeline.bank.watch import live
from mta_ray.pipeline.group import cpus_per_worker, start_group, sweep_devices

log = logging.getLogger(__name__)
POLL_S = 1.0
STOP_S = 30.0
"""How long the driver waits, when it is told to stop, for the groups to keep their checkpoints."""
SWEEP_S = 10.0
"""How long one waits for a controller to die whose group was ended."""
SWEEP_EVERY_S = 10.0
"""And how often one looks for what others have left that were killed."""
DEATHS_OF_MEMORY = 2
"""Deaths of a group in a row, while it did not get on, from which on each one halves its lanes."""
RUN_CHARS = 12
"""Of the bank's key: the name of its run where it is tracked, the same when it is resumed."""


def train_adapters(plan: Plan, numbers: list[int], already_done: int) -> dict[int, str]:
    """Train these adapters, in `plan.groups` groups on the connected cluster; those that were stopped, with the reason.

    A group that dies is started again, as long as it gets on. Raises what our own code raised in a worker, at once, or
    the last failure after `plan.max_failures` in a row without progress.
    """
    foreman = hire_foreman(numbers, already_done, plan.tracking, plan.files.key[:RUN_CHARS])
    with live(lambda: ray.get(foreman.snapshot.remote(), timeout=5)):
        roster = _watch_groups(plan, foreman)
    log.info(ray.get(foreman.snapshot.remote()).cost())
    if untold := ray.get(foreman.close.remote()):
        log.warning(untold)
    return roster.failed


def _watch_groups(plan: Plan, foreman: ActorHandle) -> Roster:
    """Until all is done; the roster of then."""
    crew = [_Group(number, plan, foreman, cpus_per_worker(plan.group, plan.groups)) for number in range(plan.groups)]
    at_work = {group.start(): group for group in crew}
    try:
        _follow(at_work, foreman)
    except (KeyboardInterrupt, Exception):
        with suppress(ray.exceptions.RayError):
            _dismiss(foreman)
            _end(at_work)
        raise
    roster = ray.get(foreman.roster.remote())
    assert roster.is_done, roster
    return roster


def _follow(at_work: dict[ray.ObjectRef, _Group], foreman: ActorHandle) -> None:
    over_since_s = math.inf
    swept_at_s = time.monotonic()
    while at_work:
        ended, waiting = ray.wait(list(at_work), num_returns=1, timeout=POLL_S)
        if ended or time.monotonic() - swept_at_s > SWEEP_EVERY_S:
            sweep_devices()
            swept_at_s = time.monotonic()
        for task in ended:
            group = at_work.pop(task)
            try:
                ray.get(task)
            except Exception as error:
                group.failed(error)
            group.give_back()
            roster: Roster = ray.get(foreman.roster.remote())
            if roster.waiting:
                at_work[group.start()] = group
        if not ended and ray.get(foreman.roster.remote()).is_over:
            over_since_s = min(over_since_s, time.monotonic())
            has_come = ray.get(foreman.devices_of.remote())
            is_late = time.monotonic() - over_since_s > STOP_S
            # who has come is on its way out; who has not has no devices
            late = {task: at_work.pop(task) for task in waiting if is_late or at_work[task].number not in has_come}
            _end(late)


def _end(at_work: dict[ray.ObjectRef, _Group]) -> None:
    """End these groups' tasks, and wait until nothing is set apart for anybody who is gone."""
    for task, group in at_work.items():
        ray.cancel(task, force=True)
        group.give_back()
    deadline_s = time.monotonic() + SWEEP_S
    while at_work and sweep_devices() and time.monotonic() < deadline_s:
        time.sleep(0.2)


def _dismiss(foreman: ActorHandle) -> None:
    """Ctrl-C or SIGTERM: let the groups keep what is on its way. A second one ends the waiting."""
    groups = ray.get(foreman.dismiss.remote())
    if groups:
        log.info("bank: stopping; %d groups keep what is on its way", groups)
    deadline_s = time.monotonic() + STOP_S
    while groups and time.monotonic() < deadline_s:
        time.sleep(0.2)
        groups = ray.get(foreman.dismiss.remote())


@dataclass(slots=True)
class _Group:
    number: int
    plan: Plan
    foreman: ActorHandle
    cpus: int
    failures: int = 0
    """In a row, while nobody got on."""
    progress: int = 0
    deaths: int = 0
    """In a row, while the group itself did not get on."""
    own_progress: int = 0

    def start(self) -> ray.ObjectRef:
        settings = {"plan": self.plan, "foreman": self.foreman, "group": self.number}
        return start_group(train_group, settings, self.plan.group, self.cpus, self.number)

    def give_back(self) -> None:
        """Free at once what was set apart for the group, also where its end was none of Ray Train's own."""
        devices = ray.get(self.foreman.devices_of.remote()).get(self.number)
        if devices is not None:
            remove_placement_group(devices)  # nothing where it is gone
        ray.get(self.foreman.ended.remote(self.number))

    def failed(self, error: Exception) -> None:
        """Raises where a new try would end in the same way, or has too often."""
        if is_lasting(error):
            raise error
        roster: Roster = ray.get(self.foreman.roster.remote())
        self.failures = 1 if roster.progress > self.progress else self.failures + 1
        self.progress = roster.progress
        own = roster.progress_of[self.number]
        self.deaths = 1 if own > self.own_progress else self.deaths + 1
        self.own_progress = own
        reason = type(root_cause(error)).__name__
        ray.get(self.foreman.leave.remote(self.number, reason))
        if self.deaths >= DEATHS_OF_MEMORY:
            self._halve()
        if self.failures > self.plan.max_failures:
            raise error
        log.warning("bank: group %d died (%s); it starts again", self.number, reason)

    def _halve(self) -> None:
        """Begin with half of the lanes next time, where that can be. Linux and Ray end a process that takes too much
        memory without a word to it, so this is all that is seen of it."""
        device, lanes = ray.get(self.foreman.lanes_of.remote(self.number)) or ("", 0)
        if self.plan.lanes or lanes < 2:
            return
        self.plan.files.remember_lanes(device, lanes // 2)
        log.warning(
            "bank: group %d died %d times without getting on, perhaps for memory; it goes on with %d adapters at once",
            self.number, self.deaths, lanes // 2,
        )  # fmt: skip
