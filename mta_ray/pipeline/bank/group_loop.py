"""What every worker of a training group runs: lanes that take anchors from the foreman until none is left.

A finished adapter is published at once; what is on its way is kept now and then, and when the group must go.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.actor import ActorHandle

from mta_ray.lora.adapter import Adapter
from mta_ray.model.backbone import RoutedModel
from mta_ray.model.batches import Tokens
from mta_ray.personalize.base_model import Wording, open_base, tokenised
from mta_ray.personalize.lanes import Checkpoint, Job, Wishes, parameter_names, train_lanes
from mta_ray.personalize.train_config import budget
from mta_ray.pipeline.bank.foreman import Orders
from mta_ray.pipeline.bank.histories import open_histories, read_history
from mta_ray.pipeline.bank.lane_count import device_name, fit_lanes, is_out_of_memory
from mta_ray.pipeline.bank.plan import Plan
from mta_ray.pipeline.group import (
    broadcast_object,
    gather_objects,
    is_asked_to_stop,
    is_first_worker,
    start_worker,
)
from mta_ray.pipeline.group_engines import prepare_blocks, slot_engine

REPORT_S = 1.0
"""How often a group says how far it is."""


def train_group(settings: dict[str, Any]) -> None:
    """The loop of a group's worker."""
    start_worker(settings["cpus"])
    plan: Plan = settings["plan"]
    foreman: ActorHandle = settings["foreman"]
    group: int = settings["group"]
    if is_first_worker():  # first of all: what is set apart for a group that dies must be known
        ray.get(foreman.came.remote(group, ray.util.get_current_placement_group()))

    # 1. the frozen base; what is to be sharded over devices need not fit one, so it is loaded into the host's memory
    base = open_base(plan.base)
    is_sharded = plan.group.zero_stage == 3
    routed = RoutedModel(base.load(device="cpu" if is_sharded else plan.group.device), base.targets)
    prepare_blocks(routed.model, plan.group)

    # 2. take, train, publish, until nothing is left
    desk = _Desk(plan, foreman, group, routed, base.wording)
    lanes = desk.join()
    try:
        make = slot_engine(routed.model, plan.train, plan.group)
        train_lanes(routed, lanes, desk, plan.train, make_engine=make)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            desk.halve(lanes, error)
        raise
    desk.leave()


class _Desk:
    """A `personalize.lanes.Dispatcher`: the first worker speaks with the foreman and writes, and tells the others."""

    def __init__(self, plan: Plan, foreman: ActorHandle, group: int, routed: RoutedModel, wording: Wording) -> None:
        self.plan = plan
        self.foreman = foreman
        self.group = group
        self.routed = routed
        self.wording = wording
        self.names = parameter_names(routed)
        self.histories = open_histories(plan.files.histories)
        self.is_first = is_first_worker()
        self.number_of: dict[str, int] = {}
        """Job id to adapter."""
        self._orders = Orders(take=False, stop=False)
        self._answer: ray.ObjectRef | None = None
        self._device = ""
        self._report = _Report()
        self._kept_at_s = time.monotonic()

    def join(self) -> int:
        """Say that the group is there; how many lanes it has."""
        nodes = gather_objects(ray.get_runtime_context().get_node_id())
        self._device = broadcast_object(device_name(self.plan.group))  # one name for all, whatever each has
        lanes = fit_lanes(self.routed, self.plan, self._device, self._longest_examples) if self.is_first else 0
        if self.is_first:
            ray.get(
                self.foreman.join.remote(
                    self.group,
                    nodes=nodes,
                    workers=len(nodes),
                    devices=self.plan.devices,
                    lanes=lanes,
                    device_name=self._device,
                )
            )
        return broadcast_object(lanes)

    def leave(self) -> None:
        if self.is_first:
            ray.get(self.foreman.leave.remote(self.group))

    def halve(self, lanes: int, error: BaseException) -> None:
        """Remember that so many lanes do not fit. Raises ValueError where fewer cannot be."""
        if self.plan.lanes or lanes == 1:
            raise ValueError(
                f"{lanes} adapters do not fit this device at once; give --adapters-per-pack "
                f"{max(1, lanes // 2)} or 0 (as many as fit), fewer examples_per_step, gradient checkpointing, "
                "or zero_stage 3 with more workers"
            ) from error
        self.plan.files.remember_lanes(self._device, lanes // 2)
        ray.get(self.foreman.shrank.remote(self.group, lanes // 2))

    # What lanes ask for and say

    def take(self, lanes: int) -> list[Job]:
        jobs: list[Job] = []
        while len(jobs) < lanes and (given := self._given(lanes - len(jobs))):
            for number, start in given:
                user = read_history(self.histories, number)
                examples = tokenised(self.routed.backbone, self.wording.history(user))
                if not examples:
                    if self.is_first:
                        ray.get(self.foreman.fail.remote(self.group, number, "none of its items makes an example"))
                    continue
                jobs.append(Job(id=user.id, examples=examples, start=start))
                self.number_of[user.id] = number
                if self.is_first:
                    steps = budget(len(examples), self.plan.train)
                    self.foreman.begin.remote(self.group, number, budget=steps, done=start.state.steps if start else 0)
        if not self._report.tokens:
            self._report = _Report()  # the clock starts with the first adapter, not with the engine
        self._orders = Orders(take=False, stop=self._orders.stop)
        return jobs

    def _given(self, lanes: int) -> list[tuple[int, Checkpoint | None]]:
        """Adapters that nobody has finished, with where each goes on; the same on every worker."""
        # The first worker reads the checkpoints too: another one might see older files.
        return broadcast_object(
            [(number, self.plan.files.resume(number, self.names)) for number in self._unfinished(lanes)]
            if self.is_first
            else []
        )

    def wishes(self, has_free_lanes: bool) -> Wishes:
        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            self._orders, self._answer = ray.get(self._answer), None
        stop = is_asked_to_stop() or self._orders.stop
        if not self.is_first:
            return Wishes(stop=stop)
        is_time = time.monotonic() - self._kept_at_s >= self.plan.checkpoint_every_s
        return Wishes(take=has_free_lanes and self._orders.take, keep=is_time, stop=stop)

    def stepped(self, done: Mapping[str, int], losses: Mapping[str, float], tokens: int) -> None:
        if not self.is_first:
            return
        steps = {self.number_of[job_id]: step for job_id, step in done.items()}
        self._report.add(steps, {self.number_of[job_id]: loss for job_id, loss in losses.items()}, tokens)
        # Nobody waits for the foreman: `wishes` looks whether the answer to the last report is there.
        if self._report.seconds >= REPORT_S and self._answer is None:
            self._tell()

    def finished(self, job: Job, adapter: Adapter, losses: Sequence[float]) -> None:
        if self.is_first:
            number = self.number_of[job.id]
            self._tell()  # its last steps, while it still has its lane
            self.plan.files.publish(number, adapter, losses)
            ray.get(self.foreman.finish.remote(self.group, number))

    def failed(self, job: Job, reason: str) -> None:
        if self.is_first:
            ray.get(self.foreman.fail.remote(self.group, self.number_of[job.id], reason))

    def keep(self, checkpoints: Sequence[tuple[Job, Checkpoint]]) -> None:
        if self.is_first:
            for job, checkpoint in checkpoints:
                self.plan.files.keep(self.number_of[job.id], checkpoint, self.names)
            ray.get(self.foreman.kept.remote(self.group))
            self._kept_at_s = time.monotonic()

    def _tell(self) -> None:
        if not self._report.tokens:
            return
        if self._answer is not None:
            self._orders = ray.get(self._answer)
        self._answer = self.foreman.stepped.remote(self.group, **self._report.take())

    def _unfinished(self, lanes: int) -> list[int]:
        """What the foreman gives, but for what lies there finished: its group died before it could say so."""
        taken: list[int] = []
        while len(taken) < lanes and (given := ray.get(self.foreman.take.remote(self.group, lanes - len(taken)))):
            for number in given:
                if self.plan.files.is_finished(number):
                    ray.get(self.foreman.finish.remote(self.group, number))
                else:
                    taken.append(number)
        return taken

    def _longest_examples(self) -> list[Tokens]:
        """One adapter's step at its most expensive, of a few anchors."""
        some = [read_history(self.histories, number) for number in range(min(8, self.plan.anchors))]
        examples = [row for user in some for row in tokenised(self.routed.backbone, self.wording.history(user))]
        return sorted(examples, key=lambda row: len(row.ids))[-self.plan.train.examples_per_step :]


class _Report:
    """What has been done since the last report."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._since_s = time.monotonic()
        self._steps: dict[int, int] = {}
        self._losses: dict[int, float] = {}
        self.tokens = 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._since_s

    def add(self, steps: Mapping[int, int], losses: Mapping[int, float], tokens: int) -> None:
        self._steps.update(steps)
        self._losses.update(losses)
        self.tokens += tokens

    def take(self) -> dict[str, Any]:
        report = {"steps": self._steps, "losses": self._losses, "tokens": self.tokens, "seconds": self.seconds}
        self._clear()
        return report
