"""The stages of a population, as Ray Data runs them: a part's number in; its users made, embedded, routed, stored.

A part is one block from beginning to end. It is done when its Parquet file is there, which is written after the store.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.actor import ActorHandle

from mta_ray.artifacts import jsonable
from mta_ray.files import replace_file
from mta_ray.lamp.users import HistoryItem
from mta_ray.lora.fusion_config import FusionConfig
from mta_ray.personalize.merge_then_adapt import encode
from mta_ray.pipeline.actors import lets_go
from mta_ray.pipeline.embed_users import item_texts
from mta_ray.population.crowd.anchors import Anchors, route_many
from mta_ray.population.crowd.vectors import EmbeddingModel
from mta_ray.population.people import WorldConfig, simulate_user, user_name
from mta_ray.serving.database import AWAY, DatabaseConfig, open_database
from mta_ray.serving.identity import UserId
from mta_ray.serving.user_state import ItemSum, UserRoute
from mta_ray.serving.user_store import NewUser, UserStore
from mta_ray.similarity.embedding import Encoder

PROGRESS = "simulate population"
BINS = np.round(np.linspace(-1, 1, 401), 3)
"""Of cosines."""
SUMMARY, HASH = b"summary", b"hash"
"""In a part's Parquet metadata."""
STORE_USERS = 5000
"""Users of one transaction."""
BUSY_TIMEOUT_S = 60.0
AWAY_S = (1.0, 5.0, 20.0)
"""Between tries of a store that is away."""
CPUS = 0.5
"""Of a task: two at once on each."""

_ITEM = pa.struct([("id", pa.string()), ("content", pa.string()), ("target", pa.string())])


@dataclass(frozen=True, slots=True, kw_only=True)
class CrowdPlan:
    """Everything that the stages need; it travels to each worker once."""

    world: WorldConfig
    users: int
    part_users: int
    cpus: float | None
    """Of the cluster, where it cannot grow."""
    anchors: Anchors
    fusion: FusionConfig
    model: EmbeddingModel | None
    """None: users are encoded."""
    texts: Sequence[tuple[HistoryItem, ...]]
    """Histories of the fitted users, which drawn users borrow."""
    max_items: int
    max_words: int
    history_items: int
    workers: int
    store: str | None
    tenant: str
    folder: str
    hash: str
    """Of all that decides what is in a part."""
    progress: str = PROGRESS
    """What the work is called on the board."""

    @property
    def parts(self) -> int:
        return -(-self.users // self.part_users)

    def rows(self, part: int) -> int:
        """Users of a part; the last one may have fewer."""
        return min(self.part_users, self.users - part * self.part_users)

    def file(self, part: int) -> Path:
        return Path(self.folder) / f"part-{part:06d}.parquet"


@lets_go
def run_parts(plan: CrowdPlan, parts: Sequence[int], board: ActorHandle) -> None:
    """Do these parts; what is known of them afterwards is in their files."""
    if not parts:
        return
    rows = ray.data.from_items([{"part": part} for part in parts], override_num_blocks=len(parts))
    # SQLite has one writer, a second one would only wait for it; files alone are little work.
    sinks = plan.workers if plan.store is not None and plan.store.startswith("postgres") else 1
    encoders = plan.workers if plan.model is None else 0
    shared: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow", "zero_copy_batch": True}
    of_tasks = shared | {"num_cpus": CPUS, "compute": ray.data.TaskPoolStrategy(size=plan.workers)}
    of_actors = shared | {"num_cpus": cpus_each(plan.cpus, encoders + sinks)}
    if plan.model is not None:
        rows = rows.map_batches(draw_part, fn_args=(plan,), **of_tasks)
    else:
        pool = ray.data.ActorPoolStrategy(size=encoders)
        rows = rows.map_batches(make_part, fn_args=(plan,), **of_tasks)
        rows = rows.map_batches(EncodePart, fn_constructor_args=(plan,), compute=pool, **of_actors)
    rows = rows.map_batches(route_part, fn_args=(plan,), **of_tasks)
    writers = ray.data.ActorPoolStrategy(size=sinks)
    done = rows.map_batches(StorePart, fn_constructor_args=(plan, board), compute=writers, **of_actors)
    for _ in done.iter_batches(batch_size=None):
        pass


def cpus_each(cpus: float | None, actors: int) -> float:
    """CPUs that each of so many actors holds: they stay for the whole job, and a task must find room beside them.

    `cpus` are those of a cluster that cannot grow; one that can makes room for a task.
    """
    if cpus is None:
        return CPUS
    return min(CPUS, max(math.floor((cpus - CPUS) / actors * 1e4) / 1e4, 0.0))


def draw_part(batch: pa.Table, plan: CrowdPlan) -> pa.Table:
    """A part's users, their vectors drawn from the model."""
    assert plan.model is not None
    (part,) = batch["part"].to_pylist()
    began_s, began_at_s = time.perf_counter(), time.time()
    first, users = part * plan.part_users, plan.rows(part)
    drawn = plan.model.draw(plan.world.seed, first, users)
    columns = {
        "number": np.arange(first, first + users),
        "items": drawn.items,
        "donor": drawn.donors,
        "mean": vectors_column(drawn.means),
    }
    return (
        _timed(pa.table(columns), "draw", began_s)
        .append_column("part", pa.array(np.full(users, part, np.int32)))
        .append_column("began_at_s", pa.array(np.full(users, began_at_s)))
    )


def make_part(batch: pa.Table, plan: CrowdPlan) -> pa.Table:
    """A part's users with what the encoder sees of them, and what is kept of their histories."""
    (part,) = batch["part"].to_pylist()
    began_s, began_at_s = time.perf_counter(), time.time()
    numbers = np.arange(part * plan.part_users, part * plan.part_users + plan.rows(part))
    users = [simulate_user(plan.world, int(number)) for number in numbers]
    kept = [
        [
            {"id": item.id, "content": item.content, "target": item.target}
            for item in user.history[-plan.history_items :]
        ]
        for user in users
    ]
    columns = {
        "part": np.full(len(users), part, np.int32),
        "began_at_s": np.full(len(users), began_at_s),
        "number": numbers,
        "items": [len(user.history) for user in users],
        "history": pa.array(kept, pa.list_(_ITEM)),
        "texts": pa.array([item_texts(user, plan.max_items, plan.max_words) for user in users], pa.list_(pa.string())),
    }
    return _timed(pa.table(columns), "generate", began_s)


class EncodePart:
    """Loads the encoder once, then one part a call."""

    def __init__(self, plan: CrowdPlan) -> None:
        self.encoder = Encoder(plan.anchors.encoder)

    def __call__(self, batch: pa.Table) -> pa.Table:
        began_s, began_at_s = time.perf_counter(), time.time()
        means = self.encoder.embed_users(batch["texts"].to_pylist())
        table = batch.drop_columns(["texts", "began_at_s"]).append_column("mean", vectors_column(means))
        # from here on the clock runs: an encoder that is being loaded encodes nothing
        table = table.append_column("began_at_s", pa.array(np.full(len(batch), began_at_s)))
        return _timed(table, "encode", began_s)


def route_part(batch: pa.Table, plan: CrowdPlan) -> pa.Table:
    """The part with each user's anchors, their weights and cosines."""
    began_s = time.perf_counter()
    vectors = encode(vectors_of(batch["mean"]), plan.anchors.center)
    routes = route_many(vectors, plan.anchors, plan.fusion, batch["items"].to_numpy())
    for name, values in (
        ("slots", routes.slots.astype(np.int32)),
        ("weights", routes.weights.astype(np.float32)),
        ("cosines", routes.cosines),
    ):
        batch = batch.append_column(name, vectors_column(values))
    return _timed(batch, "route", began_s)


class StorePart:
    """Writes a part: the store first, then the file, whose name is the mark that the part is done."""

    def __init__(self, plan: CrowdPlan, board: ActorHandle) -> None:
        self.plan, self.board = plan, board
        self.store = None
        if plan.store is not None:
            config = DatabaseConfig(url=plan.store, connections=1, busy_timeout_s=BUSY_TIMEOUT_S)
            self.store = UserStore(open_database(config))

    def __call__(self, batch: pa.Table) -> pa.Table:
        part = int(batch["part"][0].as_py())
        # A block that Ray Data had cut or joined would be lost or counted twice.
        assert batch["part"].unique().to_pylist() == [part] and len(batch) == self.plan.rows(part), (
            "a part is one block"
        )

        began_s = time.perf_counter()
        added, others = self._store(batch)
        stored_s = time.perf_counter()
        table = self._result(batch)
        seconds = {name.removesuffix("_s"): batch[name][0].as_py() for name in batch.column_names if _is_timing(name)}
        if self.store is not None:
            seconds["store"] = stored_s - began_s
        summary = {
            "part": part,
            "users": len(batch),
            "added": added,
            "others": others,
            "last": self._last(batch),
            "began_at_s": batch["began_at_s"][0].as_py(),
            "seconds": seconds,
            **self._figures(batch),
        }
        self._write(table, part, summary, stored_s)
        self.board.add.remote(self.plan.progress, len(batch))
        return pa.table({"part": [part]})

    def _store(self, batch: pa.Table) -> tuple[int, int]:
        """How many were added, and how many were there already with another route or history than theirs here."""
        if self.store is None:
            return 0, 0
        added = others = 0
        for start in range(0, len(batch), STORE_USERS):
            new = self._new_users(batch.slice(start, STORE_USERS))
            count = self._add(new)
            added += count
            if count < len(new):
                others += sum(not self._has(one) for one in new)
        return added, others

    def _add(self, new: list[NewUser]) -> int:
        """How many of them were not there; tried again where the store is away for a moment."""
        assert self.store is not None
        for wait_s in (*AWAY_S, None):
            try:
                return self.store.add_users(new)
            except AWAY as error:
                if wait_s is None:
                    raise RuntimeError(
                        f"the user store is away ({type(error).__name__}): see to it, then run the same command again; "
                        "what is stored is kept"
                    ) from None
                time.sleep(wait_s)
        raise AssertionError

    def _last(self, batch: pa.Table) -> dict[str, Any] | None:
        """The last user as the store should have him: by him a later run knows whether it has this part."""
        if self.store is None:
            return None
        (new,) = self._new_users(batch.slice(len(batch) - 1))
        return {"id": new.user.id, "route": jsonable(new.route)}

    def _has(self, new: NewUser) -> bool:
        assert self.store is not None
        found = self.store.read(new.user).route
        if found is None or new.route is None or replace(found, history_version=0) != new.route:
            return False
        known, wanted = self.store.read_history(new.user), new.history
        return [(item.content, item.target) for item in known] == [(item.content, item.target) for item in wanted]

    def _new_users(self, batch: pa.Table) -> list[NewUser]:
        plan = self.plan
        numbers, means = batch["number"].to_pylist(), vectors_of(batch["mean"])
        slots, weights = vectors_of(batch["slots"]).tolist(), vectors_of(batch["weights"]).tolist()
        donors = batch["donor"].to_pylist() if "donor" in batch.column_names else None
        texts = None if donors is not None else batch["history"].to_pylist()
        new = []
        for row, number in enumerate(numbers):
            name = user_name(plan.world.seed, number)
            if donors is not None:
                history = [
                    HistoryItem(id=f"{name}-{n}", content=item.content, target=item.target)
                    for n, item in enumerate(plan.texts[donors[row]])
                ]
            else:
                assert texts is not None
                history = [HistoryItem(**item) for item in texts[row]]
            route = UserRoute(
                anchors=tuple(plan.anchors.named[slot] for slot in slots[row]),
                weights=tuple(weights[row]),
                bank_version=plan.anchors.version,
                history_version=0,
            )
            new.append(
                NewUser(
                    user=UserId(tenant=plan.tenant, id=name),
                    task=plan.world.task,
                    history=history,
                    item_sum=ItemSum(
                        total=means[row] * np.float32(len(history)), items=len(history), encoder=plan.anchors.encoder
                    ),
                    route=route,
                )
            )
        return new

    def _result(self, batch: pa.Table) -> pa.Table:
        ids = pa.array([user_name(self.plan.world.seed, number) for number in batch["number"].to_pylist()])
        return batch.select(["number", "items", "mean", "slots", "weights", "cosines"]).add_column(0, "user_id", ids)

    def _figures(self, batch: pa.Table) -> dict[str, Any]:
        slots, weights, cosines = (vectors_of(batch[name]) for name in ("slots", "weights", "cosines"))
        anchors = len(self.plan.anchors.ids)
        return {
            "nearest": np.bincount(slots[:, 0], minlength=anchors).tolist(),
            "load": np.bincount(slots.ravel(), weights.ravel().astype(np.float64), minlength=anchors).tolist(),
            "histogram": np.histogram(cosines[:, 0].clip(-1, 1), BINS)[0].tolist(),
            "cosine_sums": cosines.sum(axis=0, dtype=np.float64).tolist(),
        }

    def _write(self, table: pa.Table, part: int, summary: dict[str, Any], began_s: float) -> None:
        metadata = {HASH: self.plan.hash.encode()}

        def write(file: Path) -> None:
            with pq.ParquetWriter(file, table.schema, compression="none", use_dictionary=False) as writer:
                writer.write_table(table)
                seconds = summary["seconds"] | {"parquet": time.perf_counter() - began_s}
                ended = summary | {"seconds": seconds, "ended_at_s": time.time()}
                writer.add_key_value_metadata(metadata | {SUMMARY: json.dumps(ended).encode()})

        replace_file(self.plan.file(part), write)  # a worker of a job that was killed may still be at it


def vectors_column(values: np.ndarray) -> pa.Array:
    """(rows, width) as an Arrow column, without a copy."""
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).ravel()), values.shape[1])


def vectors_of(column: pa.ChunkedArray) -> np.ndarray:
    """The inverse of `vectors_column`."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0)
    return array.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)


def _timed(table: pa.Table, stage: str, began_s: float) -> pa.Table:
    return table.append_column(f"{stage}_s", pa.array(np.full(len(table), time.perf_counter() - began_s)))


def _is_timing(name: str) -> bool:
    return name in ("draw_s", "generate_s", "encode_s", "route_s")
