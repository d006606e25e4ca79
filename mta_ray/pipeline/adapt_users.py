"""Users' routes and stacks: a `user-states` artifact of one row a user, made by actors that each hold base and bank."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mta_ray.artifacts import is_current, jsonable, located, open_artifact, publish
from mta_ray.cluster import ClusterConfig, connect
from mta_ray.console import progress
from mta_ray.lamp.users import User
from mta_ray.lora.adapter import Adapter, from_bytes, to_bytes
from mta_ray.lora.bank import load_bank
from mta_ray.lora.fusion_config import FusionConfig
from mta_ray.lora.slots import Route
from mta_ray.model.backbone import RoutedModel
from mta_ray.personalize.base_model import BaseModel, open_base, tokenised
from mta_ray.personalize.merge_then_adapt import BANK, encode, route_users, stack_users
from mta_ray.personalize.train_config import TrainConfig
from mta_ray.pipeline.actors import ActorConfig, crew
from mta_ray.pipeline.embed_users import read_embeddings
from mta_ray.pipeline.group import start_worker
from mta_ray.pipeline.prepare_users import read_users
from mta_ray.pipeline.split import SplitConfig, check_same_line, split_users

log = logging.getLogger(__name__)
KIND = "user-states"
PROGRESS = "stack users"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptUsersConfig:
    """Which users to fuse and stack, and how."""

    users: str = "users"
    """The `users` artifact."""
    embeddings: str = "embeddings"
    """The `embeddings` artifact of the same users."""
    base: str = "base"
    """The `base` artifact."""
    bank: str = "bank"
    """The bank."""
    out: str = "user-states"
    """Folder of the artifact."""
    fusion: FusionConfig = field(default_factory=FusionConfig)
    """How anchors are weighed."""
    stack: TrainConfig = field(
        default_factory=lambda: TrainConfig(rank=1, alpha=2.0, learning_rate=1e-2, steps=12, examples_per_step=4)
    )
    """Of each user's own LoRA on top of the fused ones; rank 1 or 2, and never fewer steps than these."""
    everybody: bool = False
    """Adapt all users of the artifact that have a history; else only the tested ones."""
    split: SplitConfig = field(default_factory=SplitConfig)
    """Who is tested."""
    workers: ActorConfig = field(default_factory=ActorConfig)
    """The actors."""
    force: bool = False
    """Adapt again although the result is there."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where to run."""

    def __post_init__(self) -> None:
        if self.stack.rank > 4:
            raise ValueError(f"stack.rank is {self.stack.rank}; a user's own LoRA has rank 1 or 2 (at most 4)")
        if self.fusion.mode != "exact":
            raise ValueError("only fusion mode exact is served without merging; the other modes are for evaluation")


@dataclass(frozen=True, slots=True, kw_only=True)
class UserState:
    """Everything that is kept of a user."""

    user_id: str
    route: Route
    stack: Adapter | None
    """None where none of the user's items makes an example."""
    bytes: int
    """Of the route and of the stack, as they are kept."""
    seconds: float
    """To train the stack: its share of the pack's time."""


_SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("slots", pa.list_(pa.int32())),
        ("weights", pa.list_(pa.float32())),
        ("stack", pa.binary()),
        ("scale", pa.float32()),
        ("bytes", pa.int64()),
        ("seconds", pa.float64()),
    ]
)


def adapt_users(config: AdaptUsersConfig) -> str:
    """Publish `states.parquet`: user_id, slots, weights, stack (safetensors bytes), scale, bytes, seconds."""
    config = located(config, "users", "embeddings", "base", "bank", "out")
    users = open_artifact(config.users, kind="users", verify=False)
    table = read_embeddings(config.embeddings, users=users.hash)
    base = open_base(config.base)
    bank = load_bank(config.bank, base_fingerprint=base.fingerprint)
    if bank.encoder != table.encoder:
        raise ValueError(
            f"bank {config.bank} was built on encoder {bank.encoder!r}, {config.embeddings} holds {table.encoder!r}; "
            "embed the users with the bank's encoder"
        )
    made = open_artifact(config.bank, kind="bank", verify=False)
    if not config.everybody:
        check_same_line(config.split, made.settings.get("split"), "bank")
    bank_hash = made.hash
    kept = ("fusion", "stack", "everybody", "split", "workers")
    settings = {k: v for k, v in jsonable(config).items() if k in kept}
    inputs = {"users": users.hash, "embeddings": table.hash, "base": base.hash, "bank": bank_hash}
    if not config.force and is_current(config.out, kind=KIND, settings=settings, inputs=inputs):
        log.info("user states: %s is current, nothing to do", config.out)
        return config.out

    # 1. routes: a nearest-neighbour search, no training
    tested = split_users(table.user_ids, table.items, table.queries, config.split).tested
    rows = [r for r in range(len(table.user_ids)) if table.items[r]] if config.everybody else tested
    if not rows:
        raise ValueError("the split leaves nobody to adapt; raise split.max_few_shot or split.max_rest")
    vectors, items = encode(table.means[rows], bank.center), [table.items[row] for row in rows]
    routes = route_users(vectors, bank, config.fusion, items=items)
    route_of = {table.user_ids[row]: route for row, route in zip(rows, routes, strict=True)}

    # 2. stacks: packs of users, over the actors
    with connect(config.cluster), publish(config.out, kind=KIND, settings=settings, inputs=inputs) as draft:
        with (
            progress(PROGRESS, len(rows), "users") as meter,
            pq.ParquetWriter(draft.path / "states.parquet", _SCHEMA) as out,
            crew(_Stacker, config, workers=config.workers, cluster=config.cluster) as actors,
        ):
            packs = packs_of(read_users(config.users), list(route_of), config.workers)
            work = ([(user, route_of[user.id]) for user in pack] for pack in packs)
            for states in actors.map(lambda actor, pack: actor.stack.remote(pack), work):
                out.write_table(pa.Table.from_pylist(states, schema=_SCHEMA))
                meter.advance(len(states))
        draft.facts.update(users=len(rows))
    log.info("user states: %d users, in %s", len(rows), config.out)
    return config.out


def read_states(path: str | Path, user_ids: Iterable[str]) -> dict[str, UserState]:
    """The states of some users, by id; users without one are left out."""
    artifact = open_artifact(path, kind=KIND)
    wanted = pa.array(list(user_ids), type=pa.string())
    table = pq.read_table(artifact.path / "states.parquet", filters=pc.field("user_id").isin(wanted))
    return {row["user_id"]: _state(row) for row in table.to_pylist()}


def packs_of(users: Iterable[User], wanted: list[str], config: ActorConfig) -> list[list[User]]:
    """The wanted users in packs, users of like history lengths together, by id where those are equal.

    Packs are of one size (but for one user more or less), at most `users_per_pack`, and as many for each actor.
    """
    chosen = set(wanted)
    found = sorted((u for u in users if u.id in chosen), key=lambda u: (len(u.history), u.id))
    rounds = math.ceil(len(found) / (config.users_per_pack * config.actors))
    packs = min(len(found), rounds * config.actors)
    return [found[len(found) * n // packs : len(found) * (n + 1) // packs] for n in range(packs)]


class _Stacker:
    """An actor: base and bank are loaded once, then one pack a call."""

    def __init__(self, config: AdaptUsersConfig) -> None:
        start_worker(config.workers.cpus)
        self.config = config

    @cached_property
    def loaded(self) -> tuple[BaseModel, RoutedModel]:
        """With the first call: what goes wrong is then told as it was raised."""
        base = open_base(self.config.base)
        return base, base.load_routed(self.config.bank, device=self.config.workers.device)[0]

    def stack(self, pack: list[tuple[User, Route]]) -> list[dict[str, Any]]:
        started_s = time.perf_counter()
        base, routed = self.loaded
        backbone, wording = routed.backbone, base.wording
        work = [(user.id, tokenised(backbone, wording.history(user)), {BANK: route}) for user, route in pack]
        able = [one for one in work if one[1]]
        trained = stack_users(routed, able, self.config.stack).adapters if able else []
        adapters = {user_id: adapter for (user_id, _, _), adapter in zip(able, trained, strict=True)}
        seconds = (time.perf_counter() - started_s) / len(pack)
        stacks = {user_id: to_bytes(adapter) for user_id, adapter in adapters.items()}
        return [
            {
                "user_id": user.id,
                "slots": list(route.slots),
                "weights": list(route.weights),
                "stack": stacks.get(user.id),
                "scale": adapters[user.id].scale if user.id in adapters else None,
                "bytes": route.bytes + len(stacks.get(user.id, b"")),
                "seconds": seconds,
            }
            for user, route in pack
        ]


def _state(row: dict[str, Any]) -> UserState:
    return UserState(
        user_id=row["user_id"],
        route=Route(slots=tuple(row["slots"]), weights=tuple(row["weights"])),
        stack=None if row["stack"] is None else from_bytes(row["stack"], row["scale"]),
        bytes=row["bytes"],
        seconds=row["seconds"],
    )
