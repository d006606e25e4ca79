"""What the tests of the stages share: a small world, embedded, with an untaught base model."""

from __future__ import annotations

from pathlib import Path

import pytest

from mta_ray.pipeline.embed_users import EmbedUsersConfig, embed_users
from mta_ray.pipeline.train_base import TrainBaseConfig, train_base
from mta_ray.population.people import WorldConfig
from mta_ray.population.synthesize import SimulateUsersConfig, simulate_users

WORLD = WorldConfig(seed=2, queries=2, max_items=15)


@pytest.fixture(scope="session")
def taught(ray_local, tmp_path_factory) -> Path:
    """A folder with users, embeddings and an untaught base."""
    home = tmp_path_factory.mktemp("run")
    simulate_users(SimulateUsersConfig(world=WORLD, users=30, out=str(home / "users")))
    embed_users(EmbedUsersConfig(users=str(home / "users"), out=str(home / "embeddings"), actors=1))
    reads = {"users": str(home / "users"), "embeddings": str(home / "embeddings")}
    train_base(TrainBaseConfig(**reads, mode="none", out=str(home / "base")))
    return home
