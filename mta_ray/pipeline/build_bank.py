"""Choose the anchors and train their meta-LoRAs: packs of G adapters, groups of W workers, P groups at once.

A finished pack is published at once, beside the bank; a rerun trains only the packs that are missing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle
from safetensors.torch import load_file, save_file

from mta_ray.artifacts import is_current, jsonable, located, open_artifact, publish, refuse_stranger
from mta_ray.cluster import ClusterConfig, connect
from mta_ray.lora.adapter import Adapter, Factors
from mta_ray.lora.bank import assemble, save_bank
from mta_ray.model.backbone import RoutedModel
from mta_ray.personalize.base_model import open_base, tokenised
from mta_ray.personalize.merge_then_adapt import encode
from mta_ray.personalize.training import Job, TrainConfig, train_pack
from mta_ray.pipeline.embed_users import Embeddings, read_embeddings
from mta_ray.pipeline.group import (
    GroupConfig,
    cpus_per_worker,
    engine_factory,
    is_first_worker,
    start_group,
    start_worker,
)
from mta_ray.pipeline.prepare_users import read_users
from mta_ray.pipeline.progress import follow, open_board
from mta_ray.pipeline.split import SplitConfig, split_users
from mta_ray.similarity.anchors import choose_anchors

log = logging.getLogger(__name__)
PROGRESS = "train bank"


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildBankConfig:
    """Which anchors, trained how, on what."""

    users: str = "users"
    """The `users` artifact."""
    embeddings: str = "embeddings"
    """The `embeddings` artifact of the same users."""
    base: str = "base"
    """The `base` artifact."""
    out: str = "bank"
    """Folder of the bank; finished packs lie in OUT.packs until the bank is whole."""
    anchors: int = 14
    """Clusters of candidate users; each gives at most one anchor."""
    min_items: int = 11
    """An anchor has at least so many history items."""
    is_centered: bool = True
    """Take the candidates' mean vector off every embedding: what all users share says nothing about who is near."""
    adapters_per_pack: int = 14
    """Adapters (G) trained at once over one frozen base."""
    groups: int = 1
    """Training groups (P) at once over the cluster."""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(learning_rate=5e-3, steps=40, examples_per_step=6))
    """Of each meta-LoRA."""
    split: SplitConfig = field(default_factory=SplitConfig)
    """Candidates are the users that teach."""
    group: GroupConfig = field(default_factory=GroupConfig)
    """The workers of each group."""
    force: bool = False
    """Build again although the bank is there."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where to run."""

    def __post_init__(self) -> None:
        for name in ("anchors", "min_items", "adapters_per_pack", "groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def build_bank(config: BuildBankConfig) -> str:
    """Publish the bank. Rerun after a stop: finished packs are kept, the rest is trained."""
    config = located(config, "users", "embeddings", "base", "out")
    users = open_artifact(config.users, kind="users", verify=False)
    base = open_base(config.base)
    table = read_embeddings(config.embeddings, users=users.hash)
    placing = ("out", "force", "cluster", "users", "embeddings", "base", "group", "groups")
    settings = {k: v for k, v in jsonable(config).items() if k not in placing}
    inputs = {"users": users.hash, "embeddings": table.hash, "base": base.hash}
    if not config.force and is_current(config.out, kind="bank", settings=settings, inputs=inputs):
        log.info("bank: %s is current, nothing to do", config.out)
        return config.out

    # 1. anchors
    refuse_stranger(config.out, "bank")
    center, vectors, anchors = _anchors(table, config)
    ids = [table.user_ids[row] for row in anchors]
    packs = [ids[i : i + config.adapters_per_pack] for i in range(0, len(ids), config.adapters_per_pack)]
    key = hashlib.sha256(json.dumps([settings, inputs], sort_keys=True).encode()).hexdigest()
    folder = Path(f"{config.out}.packs")
    if config.force:
        shutil.rmtree(folder, ignore_errors=True)
    log.info("bank: %d anchors of %d users in %d packs", len(ids), len(table.user_ids), len(packs))

    # 2. packs that are missing, shared out over the groups
    paths = [folder / f"pack-{n:05d}" for n in range(len(packs))]
    missing = [
        n
        for n, path in enumerate(paths)
        if not is_current(path, kind="pack", settings={"key": key, "pack": n}, inputs={}, verify=True)
    ]
    if missing:
        if len(missing) < len(packs):
            log.info("bank: %d of %d packs are there already", len(packs) - len(missing), len(packs))
        with connect(config.cluster):
            _train(config, packs, missing, folder, key)

    # 3. the bank
    adapters: list[Adapter] = []
    losses: list[list[float]] = []
    for path in paths:
        pack = open_artifact(path, kind="pack")
        adapters += _read_pack(pack.path, pack.facts["scale"])
        losses += pack.facts["losses"]
    bank = assemble(
        adapters,
        anchor_ids=tuple(ids),
        embeddings=vectors[anchors],
        center=center,
        base_fingerprint=base.fingerprint,
        encoder=table.encoder,
        facts={"task": users.facts["task"], "losses": losses, "items": [table.items[row] for row in anchors]},
    )
    save_bank(bank, config.out, settings=settings, inputs=inputs)
    shutil.rmtree(folder, ignore_errors=True)
    log.info("bank: %d anchors, %.1f MiB, in %s", len(bank), bank.bytes / 2**20, config.out)
    return config.out


def _anchors(table: Embeddings, config: BuildBankConfig) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """(centre, all users' vectors, row numbers of the anchors)."""
    rows = split_users(table.user_ids, table.items, table.queries, config.split).teachers
    center = table.means[rows].mean(axis=0) if config.is_centered else np.zeros_like(table.means[0])
    vectors = encode(table.means, center)
    chosen = choose_anchors(
        [table.user_ids[row] for row in rows],
        vectors[rows],
        [table.items[row] for row in rows],
        anchors=config.anchors,
        min_items=config.min_items,
        seed=config.train.seed,
    )
    return center, vectors, [rows[i] for i in chosen]


def _train(config: BuildBankConfig, packs: list[list[str]], missing: list[int], folder: Path, key: str) -> None:
    board = open_board()
    groups = min(config.groups, len(missing))
    cpus = cpus_per_worker(config.group, groups)
    with follow(board, PROGRESS, len(missing) * config.train.steps, "steps"):
        running = [
            start_group(
                _loop,
                {
                    "config": config,
                    "packs": {n: packs[n] for n in missing[group::groups]},
                    "folder": str(folder.absolute()),
                    "key": key,
                    "board": board,
                },
                config.group,
                cpus,
            )
            for group in range(groups)
        ]
        ray.get(running)


def _loop(settings: dict[str, Any]) -> None:
    """What every worker of a group runs: its queue of packs, each published when it is finished."""
    start_worker(settings["cpus"])
    config: BuildBankConfig = settings["config"]
    packs: dict[int, list[str]] = settings["packs"]
    board: ActorHandle = settings["board"]

    # 1. the frozen base, and the histories of this group's anchors
    base = open_base(config.base)
    routed = RoutedModel(base.load(device=config.group.device), base.targets)
    wanted = {user_id for ids in packs.values() for user_id in ids}
    examples = {
        user.id: tokenised(routed.backbone, base.wording.history(user))
        for user in read_users(config.users)
        if user.id in wanted
    }

    for number, ids in packs.items():
        # 2. train the pack
        def on_step(step: int, source: str = f"pack {number}") -> None:
            if is_first_worker():
                board.report.remote(PROGRESS, source, step)

        jobs = [Job(id=user_id, examples=examples[user_id]) for user_id in ids]
        make = engine_factory(routed.model, config.train, config.group, per_slot=True)
        result = train_pack(routed, jobs, config.train, make_engine=make, on_step=on_step)

        # 3. publish it
        if is_first_worker():
            path = Path(settings["folder"]) / f"pack-{number:05d}"
            path.parent.mkdir(parents=True, exist_ok=True)
            with publish(path, kind="pack", settings={"key": settings["key"], "pack": number}, inputs={}) as draft:
                save_file(
                    {
                        f"{slot}.{module}.{side}": getattr(factors, side).contiguous()
                        for slot, adapter in enumerate(result.adapters)
                        for module, factors in adapter.factors.items()
                        for side in ("down", "up")
                    },
                    draft.path / "adapters.safetensors",
                )
                draft.facts.update(scale=result.adapters[0].scale, losses=result.losses.T.astype(float).tolist())


def _read_pack(folder: Path, scale: float) -> list[Adapter]:
    factors: dict[int, dict[str, dict[str, Any]]] = {}
    for name, tensor in load_file(folder / "adapters.safetensors").items():
        slot, rest = name.split(".", 1)
        module, side = rest.rsplit(".", 1)
        factors.setdefault(int(slot), {}).setdefault(module, {})[side] = tensor
    return [
        Adapter(factors={m: Factors(**sides) for m, sides in sorted(factors[slot].items())}, scale=scale)
        for slot in sorted(factors)
    ]
