"""Simulated users as a `users` artifact, each shard of it made by a Ray Data task of its own."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from mta_ray.artifacts import is_current, located, publish
from mta_ray.cluster import ClusterConfig, connect
from mta_ray.lamp.tasks import task_named
from mta_ray.lamp.users import to_table
from mta_ray.pipeline.on_each import on_each
from mta_ray.population import words
from mta_ray.population.people import WorldConfig, simulate_user

log = logging.getLogger(__name__)
USERS_PER_SHARD = 256
"""Of what one task makes, and one file holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulateUsersConfig:
    """Which people to make, and where to put them."""

    world: WorldConfig = field(default_factory=WorldConfig)
    """What the people are like."""
    users: int = 320
    """How many."""
    first: int = 0
    """Number of the first one; user i is the same in whatever range."""
    out: str = "users"
    """Folder of the `users` artifact."""
    force: bool = False
    """Make them again although they are there."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where to run."""

    def __post_init__(self) -> None:
        if self.users < 1 or self.first < 0:
            raise ValueError(f"users must be at least 1 and first at least 0, got {self.users} and {self.first}")


def simulate_users(config: SimulateUsersConfig) -> str:
    """Publish a simulated population as a `users` artifact, as `prepare_users` does with LaMP files."""
    config = located(config, "out")
    task = task_named(config.world.task)
    settings: dict[str, Any] = {"world": asdict(config.world), "users": config.users, "first": config.first}
    if (edition := words.edition(task.name)) > 1:
        settings["edition"] = edition
    if not config.force and is_current(config.out, kind="users", settings=settings, inputs={}):
        log.info("users: %s is current, nothing to do", config.out)
        return config.out
    with connect(config.cluster), publish(config.out, kind="users", settings=settings, inputs={}) as draft:
        shards = math.ceil(config.users / USERS_PER_SHARD)
        on_each(shards, _make_shard, world=config.world, first=config.first, users=config.users, out=draft.path)
        draft.facts.update(
            task=task.name, labels=list(task.labels), users=config.users, records=config.users, rejects=0
        )
        draft.facts.update(is_simulated=True)
    log.info("users: %d simulated, in %s", config.users, config.out)
    return config.out


def _make_shard(batch: dict[str, Any], world: WorldConfig, first: int, users: int, out: Path) -> dict[str, list[str]]:
    """One file, named by its number and the same on any cluster; the names are those that readers look for."""
    number = int(batch["number"][0])
    start = number * USERS_PER_SHARD
    table = to_table(simulate_user(world, first + i) for i in range(start, min(start + USERS_PER_SHARD, users)))
    pq.write_table(table, out / f"users-{number:06d}.parquet", compression="zstd")
    return {"told": [json.dumps({"number": number})]}
