"""A `users` artifact in, an `embeddings` artifact out: each user's mean item vector, by an actor pool of encoders."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from jaxtyping import Float
from numpy import ndarray
from ray.actor import ActorHandle

from mta_ray.artifacts import is_current, located, open_artifact, publish, read_manifest
from mta_ray.cluster import ClusterConfig, connect, fixed_cpus, room_for
from mta_ray.files import folder_identity
from mta_ray.lamp.prompts import render_item
from mta_ray.lamp.tasks import task_named
from mta_ray.lamp.users import User, from_table
from mta_ray.pipeline.actors import lets_go
from mta_ray.pipeline.prepare_users import users_dataset
from mta_ray.pipeline.progress import follow, open_board
from mta_ray.similarity.embedding import EMBEDDED, Encoder

log = logging.getLogger(__name__)
KIND = "embeddings"
USERS_PER_GROUP = 4096
"""Rows of a row group: some MiB."""

SCHEMA = pa.schema(
    [("user_id", pa.string()), ("items", pa.int64()), ("queries", pa.int64()), ("mean", pa.list_(pa.float32()))]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedUsersConfig:
    """Which users, by which encoder, with how many actors."""

    users: str = "users"
    """The `users` artifact."""
    out: str = "embeddings"
    """Folder of the artifact."""
    encoder: str = EMBEDDED
    """all-MiniLM-L6-v2 (embedded), or any sentence-transformers model by name or path."""
    max_items: int = 24
    """Latest history items of a user that are encoded."""
    max_words: int = 64
    """Words of each item's text that are encoded."""
    actors: int = 2
    """Encoders at work at once."""
    cpus_per_actor: float = 0.5
    """Below one CPU each, or the pool takes them all and Ray Data's own tasks starve."""
    gpus_per_actor: float = 0.0
    """GPUs of each encoder."""
    users_per_batch: int = 16
    """Users encoded in one call."""
    force: bool = False
    """Embed again although the result is there."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where to run."""

    def __post_init__(self) -> None:
        for name in ("max_items", "max_words", "actors", "users_per_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("cpus_per_actor", "gpus_per_actor"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class Embeddings:
    """All users' mean item vectors, by ascending user id."""

    user_ids: list[str]
    items: list[int]
    """Length of each user's whole history."""
    queries: list[int]
    """How many queries each user has."""
    means: Float[ndarray, "users dim"]
    """Neither centred nor normalised; personalize.merge_then_adapt.encode does both."""
    hash: str
    encoder: str


@lets_go
def embed_users(config: EmbedUsersConfig) -> str:
    """Publish `embeddings-0.parquet`, rows of SCHEMA: one a user, in the order of the users' files."""
    config = located(config, "users", "out")
    if Path(config.encoder).is_dir():
        config = located(config, "encoder")
    users = read_manifest(config.users, kind="users")
    settings = {"encoder": config.encoder, "max_items": config.max_items, "max_words": config.max_words}
    inputs = {"users": users.hash}
    if Path(config.encoder).is_dir():  # it may hold another one today
        inputs["encoder"] = folder_identity(config.encoder)
    if not config.force and is_current(config.out, kind=KIND, settings=settings, inputs=inputs):
        log.info("embeddings: %s is current, nothing to do", config.out)
        return config.out
    with connect(config.cluster), publish(config.out, kind=KIND, settings=settings, inputs=inputs) as draft:
        board = open_board()
        actors = room_for(config.cluster, config.actors, cpus=0, gpus=config.gpus_per_actor)
        cpus_per_actor = config.cpus_per_actor
        if (cpus := fixed_cpus(config.cluster)) is not None:  # one is for those who read, or all would wait for ever
            cpus_per_actor = min(cpus_per_actor, max(0.0, cpus - 1) / config.actors)
        with follow(board, "embed users", users.facts["users"], "users"):
            # A small artifact is one block, which would keep all actors but one idle. Who is embedded together
            # (padded to one length) shows in the last bits: batches are cut in the order of the users' files.
            blocks = users_dataset(config.users).repartition(
                target_num_rows_per_block=2 * config.users_per_batch, strict=True
            )
            blocks.context.execution_options.preserve_order = True  # this dataset's own copy
            rows = blocks.map_batches(
                _EmbedBatch,
                fn_constructor_args=(config, board),
                batch_size=config.users_per_batch,
                batch_format="pyarrow",
                zero_copy_batch=True,
                compute=ray.data.ActorPoolStrategy(size=actors),
                num_cpus=cpus_per_actor,
                num_gpus=config.gpus_per_actor,
            )
            with pq.ParquetWriter(draft.path / "embeddings-0.parquet", SCHEMA, compression="zstd") as writer:
                for table in rows.iter_batches(batch_size=USERS_PER_GROUP, batch_format="pyarrow"):
                    writer.write_table(table.select(SCHEMA.names).cast(SCHEMA))
        draft.facts.update(users=users.facts["users"], encoder=config.encoder)
    log.info("embeddings: %d users, in %s", users.facts["users"], config.out)
    return config.out


def read_embeddings(path: str | Path, *, users: str | None = None) -> Embeddings:
    """All rows, of however many files, sorted by user id.

    With `users`, the hash of a `users` artifact, embeddings of any other users are refused.
    """
    artifact = open_artifact(path, kind=KIND)
    if users is not None and artifact.inputs.get("users") != users:
        raise ValueError(f"{path} holds the embeddings of other users than those given; run embed-users on these")
    table = pa.concat_tables(pq.read_table(artifact.path / name) for name in artifact.files)
    table = table.sort_by("user_id")
    return Embeddings(
        user_ids=table["user_id"].to_pylist(),
        items=table["items"].to_pylist(),
        queries=table["queries"].to_pylist(),
        means=_matrix(table["mean"]),
        hash=artifact.hash,
        encoder=artifact.facts["encoder"],
    )


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    """(rows, dim) float32 of lists of one length."""
    flat = np.concatenate([chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks] or [[]])
    return flat.astype(np.float32).reshape(len(column), -1 if len(column) else 0)


class _EmbedBatch:
    """Loads the encoder with the first call, so that what goes wrong is told as it was raised; then a batch a call."""

    def __init__(self, config: EmbedUsersConfig, board: ActorHandle) -> None:
        self.config, self.board = config, board

    @cached_property
    def encoder(self) -> Encoder:
        return Encoder(self.config.encoder, device="cuda" if self.config.gpus_per_actor else "cpu")

    def __call__(self, batch: pa.Table) -> pa.Table:
        users = from_table(batch)
        texts = [item_texts(u, self.config.max_items, self.config.max_words) for u in users]
        means = self.encoder.embed_users(texts)
        self.board.add.remote("embed users", len(users))
        return pa.table(
            {
                "user_id": [u.id for u in users],
                "items": [len(u.history) for u in users],
                "queries": [len(u.queries) for u in users],
                "mean": list(means),
            },
            schema=SCHEMA,
        )


def item_texts(user: User, max_items: int, max_words: int) -> list[str]:
    """What is encoded of a user: the latest items, each cut to so many words."""
    task = task_named(user.task)
    return [" ".join(render_item(task, item).split()[:max_words]) for item in user.history[-max_items:]]
