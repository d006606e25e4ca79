"""Who trains what: adapters waiting, at work in a group, finished, failed. The rules, and the actor that keeps them.

Groups come, die and come again; an adapter whose group died waits again, and goes on from its last checkpoint.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup

from mta_ray.pipeline.bank.ledger import Ledger
from mta_ray.pipeline.bank.meters import Meters
from mta_ray.pipeline.bank.snapshot import Snapshot
from mta_ray.pipeline.bank.tracking import TrackingConfig, open_tracker

SHOW_EVERY_S = 1.0
"""How often metrics and tracking look."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """What a group is told whenever it says how far it is."""

    take: bool
    """There are adapters waiting."""
    stop: bool
    """Keep checkpoints and end: a node of the group is about to go."""


@dataclass(slots=True)
class Roster:
    """The rules, without Ray. Adapters are numbers, groups too."""

    waiting: deque[int]
    at_work: dict[int, set[int]] = field(default_factory=dict)
    """Group to what it has in its lanes."""
    finished: set[int] = field(default_factory=set)
    failed: dict[int, str] = field(default_factory=dict)
    progress_of: Counter[int] = field(default_factory=Counter)
    """Of each group; grows with everything that need not be done again."""

    @property
    def progress(self) -> int:
        """Of all groups: one that dies while it grows may start again."""
        return self.progress_of.total()

    @property
    def is_done(self) -> bool:
        return not self.waiting and not any(self.at_work.values())

    @property
    def is_over(self) -> bool:
        """All is done, and every group that came has gone."""
        return not self.waiting and not self.at_work

    def join(self, group: int) -> list[int]:
        """A group begins. What it had before waits again, first in line; that is returned."""
        had = sorted(self.at_work.pop(group, set()))
        self.waiting.extendleft(reversed(had))
        self.at_work[group] = set()
        return had

    def take(self, group: int, lanes: int) -> list[int]:
        """At most so many of the waiting ones, and at most the group's share, so that all groups end together."""
        share = -(-len(self.waiting) // len(self.at_work))
        taken = [self.waiting.popleft() for _ in range(min(lanes, share))]
        self.at_work[group].update(taken)
        return taken

    def finish(self, group: int, number: int) -> None:
        self.at_work[group].remove(number)
        self.finished.add(number)
        self.got_on(group)

    def fail(self, group: int, number: int, reason: str) -> None:
        self.at_work[group].remove(number)
        self.failed[number] = reason
        self.got_on(group)

    def got_on(self, group: int) -> None:
        """Something of this group's need not be done again."""
        self.progress_of[group] += 1

    def leave(self, group: int) -> list[int]:
        """The group has ended or died; what it had waits again, and is returned."""
        had = self.join(group)
        del self.at_work[group]
        return had


class Foreman:
    """The actor. Every method is quick; groups call it, and the driver looks at it.

    What it is told it also counts (`ledger`), shows as metrics of Ray, and writes down where tracking is wanted.
    """

    def __init__(self, waiting: Sequence[int], already_done: int, tracking: TrackingConfig, run: str) -> None:
        self._roster = Roster(deque(waiting))
        self._nodes: dict[int, set[str]] = {}
        self._devices_of: dict[int, PlacementGroup | None] = {}
        self._lanes_of: dict[int, tuple[str, int]] = {}
        self._ledger = Ledger(len(waiting) + already_done, already_done)
        self._meters = Meters()
        self._tracker = open_tracker(tracking, run)
        self._shown_at_s = 0.0
        self._is_dismissing = False

    def came(self, group: int, placement_group: PlacementGroup | None) -> None:
        """The group's workers are there, with what was set apart for them; loading the base takes them a while yet."""
        self._devices_of[group] = placement_group
        self._lanes_of.pop(group, None)

    def join(
        self, group: int, *, nodes: Sequence[str], workers: int, devices: int, lanes: int, device_name: str = ""
    ) -> None:
        """A group begins on these nodes (Ray's node ids, hex)."""
        had = self._roster.join(group)
        self._nodes[group] = set(nodes)
        self._lanes_of[group] = (device_name, lanes)
        self._ledger.group_started(group, workers, devices, lanes)
        for number in had:
            self._ledger.adapter_returned(group, number)

    def take(self, group: int, lanes: int) -> list[int]:
        return self._roster.take(group, lanes)

    def begin(self, group: int, number: int, *, budget: int, done: int) -> None:
        """The adapter is in a lane, with so many steps to make in all and so many made before."""
        self._ledger.adapter_started(group, number, budget, done)

    def stepped(
        self, group: int, *, steps: dict[int, int], losses: dict[int, float], tokens: int, seconds: float
    ) -> Orders:
        """How far the group is: what it is told."""
        self._ledger.stepped(group, steps, losses, tokens, seconds)
        if self._tracker:
            self._tracker.stepped(steps, losses)
        self._show()
        leaving = self._nodes.get(group, set()) & _draining_nodes()
        return Orders(take=bool(self._roster.waiting), stop=bool(leaving) or self._is_dismissing)

    def finish(self, group: int, number: int) -> None:
        self._roster.finish(group, number)
        self._ledger.adapter_finished(group, number)

    def fail(self, group: int, number: int, reason: str) -> None:
        self._roster.fail(group, number, reason)
        self._ledger.adapter_failed(group, number, reason)

    def kept(self, group: int) -> None:
        """The group has kept checkpoints."""
        self._roster.got_on(group)

    def shrank(self, group: int, lanes: int) -> None:
        """The group had more lanes than memory; it comes again with so many."""
        self._roster.got_on(group)

    def leave(self, group: int, reason: str = "") -> None:
        """The group has ended; with a reason, it has died."""
        if group not in self._roster.at_work:
            return
        for number in self._roster.leave(group):
            self._ledger.adapter_returned(group, number)
        self._nodes.pop(group, None)
        if reason:
            self._ledger.group_lost(group, reason)
        else:
            self._ledger.group_ended(group)
        self._show(at_once=True)

    def devices_of(self) -> dict[int, PlacementGroup | None]:
        """What is set apart for each group that has come; see `ended`."""
        return self._devices_of

    def lanes_of(self, group: int) -> tuple[str, int] | None:
        """The kind of device that the group has or had, and its lanes there; none where it never began."""
        return self._lanes_of.get(group)

    def ended(self, group: int) -> None:
        """Nothing of the group runs any more, and nothing is set apart for it."""
        self._devices_of.pop(group, None)

    def dismiss(self) -> int:
        """The job is told to end: how many groups are still at work. They are told to keep checkpoints and end."""
        self._is_dismissing = True
        return len(self._roster.at_work)

    def roster(self) -> Roster:
        """A copy of the rules' state."""
        return self._roster

    def snapshot(self) -> Snapshot:
        """What there is to see."""
        return self._ledger.snapshot()

    def close(self) -> str:
        """The end; what of the tracking could not be written, empty if all was."""
        self._show(at_once=True)
        return self._tracker.close() if self._tracker else ""

    def _show(self, at_once: bool = False) -> None:
        now_s = time.monotonic()
        if at_once or now_s - self._shown_at_s >= SHOW_EVERY_S:
            self._shown_at_s = now_s
            snapshot = self._ledger.snapshot()
            self._meters.observe(snapshot)
            if self._tracker:
                self._tracker.observe(snapshot)


def _draining_nodes() -> set[str]:
    # Ray has no public way to ask this; its own Ray Data asks here.
    return set(ray._private.state.state.get_draining_nodes())


def hire_foreman(waiting: Sequence[int], already_done: int, tracking: TrackingConfig, run: str) -> ActorHandle:
    """A foreman on the driver's node, who needs no CPU of its own; it goes when its last handle goes."""
    here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=True
    )
    return ray.remote(num_cpus=0, scheduling_strategy=here)(Foreman).remote(waiting, already_done, tracking, run)
