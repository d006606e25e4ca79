"""Two training groups next to one, on a real Ray cluster of two CPUs: adapters per second while all groups train.

    python -m mta_ray.benchmarks.bank_groups

Each group has one worker of one thread. What it takes to start Ray Train is not in the figure: time counts from when
every group trains to when the first one ends.
"""

from __future__ import annotations

import json
import logging
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from mta_ray.artifacts import open_artifact
from mta_ray.benchmarks.pack_training import PackBenchmarkConfig
from mta_ray.benchmarks.random_base import random_base
from mta_ray.benchmarks.small_world import USERS_PER_ANCHOR, make_world
from mta_ray.cluster import ClusterConfig, connect
from mta_ray.model.backbone import RoutedModel
from mta_ray.model.batches import Tokens
from mta_ray.personalize.lanes import Job
from mta_ray.personalize.train_config import TrainConfig
from mta_ray.personalize.training import train_pack
from mta_ray.pipeline.bank.files import AdapterFiles
from mta_ray.pipeline.bank.foreman import hire_foreman
from mta_ray.pipeline.bank.group_loop import train_group
from mta_ray.pipeline.bank.histories import collect_histories
from mta_ray.pipeline.bank.plan import Plan
from mta_ray.pipeline.bank.snapshot import Snapshot
from mta_ray.pipeline.bank.tracking import TrackingConfig
from mta_ray.pipeline.group import GroupConfig, start_group
from mta_ray.pipeline.prepare_users import read_users

log = logging.getLogger(__name__)
LOOK_S = 0.1
GROUPS = (1, 2)
POINTS_MIN = 4
"""A rate stands on so many reports."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupsConfig:
    """The same anchors for one group and for two."""

    anchors: int = 16
    lanes: int = 4
    """Adapters at once in a group; anchors / lanes / 2 should be whole, so that two groups end together."""
    steps: int = 20
    examples_per_step: int = 2
    rounds: int = 2
    """Times that each number of groups has its turn."""
    plain_s: float = 10.0
    """So long plain torch runs, in one process and in two; 0: not at all."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen at one moment."""

    at_s: float
    snapshot: Snapshot


def groups_benchmark(config: GroupsConfig, world: Path) -> dict[str, Any]:
    """`group_scaling`, and `group_scaling_plain`: of two processes of plain torch that know nothing of each other.

    `world` is `make_world`'s.
    """
    rates: dict[int, list[float]] = {groups: [] for groups in GROUPS}
    with tempfile.TemporaryDirectory(prefix="mta-groups-") as name, connect(ClusterConfig(cpus=max(GROUPS))):
        tokens = 0.0
        for turn in range(config.rounds):
            for groups in GROUPS:
                seen = _train(config, world, groups, f"{name}/{groups}-{turn}.adapters")
                tokens = max(tokens, seen[-1].snapshot.tokens / config.anchors)
                rates[groups].append(tokens_per_s(seen, groups))
                log.info("%d groups: %.0f tokens/s", groups, rates[groups][-1])
    one, two = (statistics.median(rates[groups]) for groups in GROUPS)
    found: dict[str, Any] = {"group_scaling": two / one}
    if config.plain_s:
        plain = {processes: _plain_rate(config, processes) for processes in GROUPS}
        found["group_scaling_plain"] = plain[2] / plain[1]
    return found | {
        "groups": {
            "adapters_per_s": {1: one / tokens, 2: two / tokens},
            "tokens_per_s": rates,
            "tokens_per_adapter": tokens,
            "config": asdict(config),
        },
    }


def tokens_per_s(seen: Sequence[Seen], groups: int) -> float:
    """Slope of the tokens that were reported, from when all groups train to when the first one ends.

    The same anchors have the same tokens however many groups share them. Raises ValueError for too short a training.
    """
    together = [
        one
        for one in seen
        if len(one.snapshot.groups) == groups and all(row.state == "training" for row in one.snapshot.groups)
    ]
    changes = [
        new for old, new in zip(together, together[1:], strict=False) if new.snapshot.tokens > old.snapshot.tokens
    ]
    if len(changes) < POINTS_MIN:
        raise ValueError(f"{groups} groups trained together for {len(changes)} reports; give more steps or anchors")
    slope, _ = np.polyfit([one.at_s for one in changes], [one.snapshot.tokens for one in changes], 1)
    return float(slope)


def _train(config: GroupsConfig, world: Path, groups: int, folder: str) -> list[Seen]:
    """As `train_adapters`, but that every picture of the foreman's is kept; whoever dies is an error here."""
    users = str(world / "users")
    longest = sorted(read_users(users), key=lambda user: -len(user.history))[: config.anchors]
    files = AdapterFiles(root=folder, key="groups")
    inputs = {"users": open_artifact(users, kind="users", verify=False).hash}
    collect_histories(users, [user.id for user in longest], files.histories, inputs=inputs)
    plan = Plan(
        base=str(world / "base"),
        files=files,
        train=TrainConfig(steps=config.steps, examples_per_step=config.examples_per_step),
        group=GroupConfig(cpus_per_worker=1),
        groups=groups,
        anchors=config.anchors,
        lanes=config.lanes,
        max_lanes=config.lanes,
        checkpoint_every_s=300.0,
        max_failures=0,
        tracking=TrackingConfig(),
    )
    foreman = hire_foreman(range(config.anchors), 0, plan.tracking, "groups")
    tasks = [
        start_group(train_group, {"plan": plan, "foreman": foreman, "group": n}, plan.group, 1, n)
        for n in range(groups)
    ]
    seen = []
    waiting = tasks
    while waiting:
        _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=LOOK_S)
        snapshot: Snapshot = ray.get(foreman.snapshot.remote())
        seen.append(Seen(time.monotonic(), snapshot))
    ray.get(tasks)
    assert seen[-1].snapshot.adapters_done == config.anchors
    return seen


def _plain_rate(config: GroupsConfig, processes: int) -> float:
    """Steps per second of so many processes at once: what this machine has to give."""
    with tempfile.TemporaryDirectory(prefix="mta-plain-") as folder:
        context = torch.multiprocessing.get_context("spawn")
        barrier = context.Barrier(processes)
        workers = [
            context.Process(target=_plain_worker, args=(config, barrier, f"{folder}/{number}"))
            for number in range(processes)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return sum(float((Path(folder) / str(number)).read_text()) for number in range(processes))


def _plain_worker(config: GroupsConfig, barrier: Any, out: str) -> None:
    torch.set_num_threads(1)
    routed = RoutedModel(random_base(PackBenchmarkConfig().shape))
    rows = [Tokens(tuple(range(1000, 1060)), 8)] * 4
    jobs = [Job(id=str(number), examples=rows) for number in range(config.lanes)]
    train = TrainConfig(steps=2, examples_per_step=config.examples_per_step)
    train_pack(routed, jobs, train)
    barrier.wait()
    steps, start_s = 0, time.perf_counter()
    while time.perf_counter() - start_s < config.plain_s:
        train_pack(routed, jobs, train)
        steps += train.steps
    Path(out).write_text(str(steps / (time.perf_counter() - start_s)))


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    log.setLevel(logging.INFO)
    with tempfile.TemporaryDirectory(prefix="mta-world-") as folder:
        make_world(Path(folder), users=USERS_PER_ANCHOR * GroupsConfig().anchors)
        print(json.dumps(groups_benchmark(GroupsConfig(), Path(folder)), indent=2))
