"""Simulated users as a Ray Data source, any range of them in any order, and as a `users` artifact."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data.datasource import FilenameProvider

from mta_ray.artifacts import is_current, located, publish
from mta_ray.cluster import ClusterConfig, connect
from mta_ray.lamp.tasks import task_named
from mta_ray.lamp.users import to_table
from mta_ray.population.people import WorldConfig, simulate_user

log = logging.getLogger(__name__)


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


def simulated_users(world: WorldConfig, *, first: int, users: int) -> ray.data.Dataset:
    """Users first … first + users - 1 as rows of `lamp.users.SCHEMA`, made where and when they are read."""

    return ray.data.range(users).map_batches(
        _make_users, fn_kwargs={"world": world, "first": first}, batch_size=256, num_cpus=0.5
    )


def _make_users(batch: dict[str, np.ndarray], *, world: WorldConfig, first: int) -> pa.Table:
    return to_table(simulate_user(world, first + int(number)) for number in batch["id"])


def simulate_users(config: SimulateUsersConfig) -> str:
    """Publish a simulated population as a `users` artifact, as `prepare_users` does with LaMP files."""
    config = located(config, "out")
    task = task_named(config.world.task)
    settings: dict[str, Any] = {"world": asdict(config.world), "users": config.users, "first": config.first}
    if not config.force and is_current(config.out, kind="users", settings=settings, inputs={}):
        log.info("users: %s is current, nothing to do", config.out)
        return config.out
    with connect(config.cluster), publish(config.out, kind="users", settings=settings, inputs={}) as draft:
        rows = simulated_users(config.world, first=config.first, users=config.users)
        rows.write_parquet(str(draft.path), filename_provider=_ShardNames())
        draft.facts.update(
            task=task.name, labels=list(task.labels), users=config.users, records=config.users, rejects=0
        )
        draft.facts.update(is_simulated=True)
    log.info("users: %d simulated, in %s", config.users, config.out)
    return config.out


class _ShardNames(FilenameProvider):
    """users-<write>-<task>.parquet: the names that readers of a `users` artifact look for."""

    def get_filename_for_task(self, write_uuid: str, task_index: int) -> str:
        return f"users-{write_uuid}-{task_index:06d}.parquet"
