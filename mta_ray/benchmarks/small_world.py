"""Users, embeddings and an untaught base model to train small banks from; nobody looks at what is learnt."""

from __future__ import annotations

from pathlib import Path

from mta_ray.cluster import ClusterConfig, connect
from mta_ray.pipeline.embed_users import EmbedUsersConfig, embed_users
from mta_ray.pipeline.train_base import TrainBaseConfig, train_base
from mta_ray.population.people import WorldConfig
from mta_ray.population.synthesize import SimulateUsersConfig, simulate_users

WORLD = WorldConfig(seed=2, queries=2, max_items=15)
USERS_PER_ANCHOR = 8
"""Enough to choose from."""
ITEMS = 4
"""Of each user that are encoded."""


def make_world(home: Path, *, users: int) -> None:
    """`users`, `embeddings` and `base` in a folder, by a small cluster of its own or the connected one."""
    with connect(ClusterConfig(cpus=2)):
        simulate_users(SimulateUsersConfig(world=WORLD, users=users, out=str(home / "users")))
        embed = EmbedUsersConfig(users=str(home / "users"), out=str(home / "embeddings"), actors=1, max_items=ITEMS)
        embed_users(embed)
        train_base(
            TrainBaseConfig(
                users=str(home / "users"), embeddings=str(home / "embeddings"), mode="none", out=str(home / "base")
            )
        )
