"""Choose the anchors and train their meta-LoRAs: G adapters in a pack, groups of W workers, P groups at once.

A finished adapter is published at once, beside the bank, and what is on its way is kept now and then: whoever dies, and
when the same command is run again, nothing that was finished is trained again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from mta_ray.artifacts import ArtifactError, is_current, jsonable, located, read_manifest, refuse_stranger
from mta_ray.cluster import ClusterConfig, connect, room_for
from mta_ray.lora.bank import assemble, save_bank
from mta_ray.object_store import told
from mta_ray.personalize.base_model import open_base
from mta_ray.personalize.merge_then_adapt import encode
from mta_ray.personalize.train_config import TrainConfig
from mta_ray.pipeline.bank.files import AdapterFiles, adapter_folder
from mta_ray.pipeline.bank.histories import collect_histories
from mta_ray.pipeline.bank.plan import Plan
from mta_ray.pipeline.bank.tracking import TrackingConfig, check_tracking
from mta_ray.pipeline.bank.train_adapters import train_adapters
from mta_ray.pipeline.embed_users import Embeddings, read_embeddings
from mta_ray.pipeline.group import GroupConfig
from mta_ray.pipeline.split import SplitConfig, split_users
from mta_ray.similarity.anchors import AnchorChoice, choose_anchors

log = logging.getLogger(__name__)


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
    """Folder or fsspec URL of the bank; what is finished lies in OUT.adapters until the bank is whole."""
    anchors: int = 14
    """Anchors to choose. By clusters there can be fewer: as many clusters, and each gives at most one."""
    choice: AnchorChoice = "longest"
    """Of each cluster's users the `longest` history (as the paper), or the `medoid`; or the users that `cover` all
    others best; or `random` ones."""
    min_items: int = 11
    """An anchor has at least so many history items."""
    is_centered: bool = True
    """Take the candidates' mean vector off every embedding: what all users share says nothing about who is near."""
    adapters_per_pack: int = 0
    """Adapters (G) that a group trains at once over one frozen base; 0: as many as fit its devices."""
    groups: int = 1
    """Training groups (P) at once over the cluster."""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(learning_rate=5e-3, steps=40, examples_per_step=6))
    """Of each meta-LoRA."""
    checkpoint_every_s: float = 300.0
    """Seconds between two checkpoints of the adapters on their way; a group that is told to go keeps one at once."""
    max_failures: int = 3
    """How often in a row a group may die without having finished or kept anything, before the job gives up."""
    split: SplitConfig = field(default_factory=SplitConfig)
    """Candidates are the users that teach."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Curves in TensorBoard or MLflow, beside the table and Ray's metrics."""
    group: GroupConfig = field(default_factory=GroupConfig)
    """The workers of each group."""
    force: bool = False
    """Build again although the bank is there."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where to run."""

    def __post_init__(self) -> None:
        for name, least in (("anchors", 1), ("min_items", 1), ("groups", 1), ("adapters_per_pack", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.checkpoint_every_s <= 0 or self.max_failures < 0:
            raise ValueError("checkpoint_every_s must be above 0 seconds, and max_failures at least 0")


PLACING = (
    "out",
    "force",
    "cluster",
    "users",
    "embeddings",
    "base",
    "group",
    "groups",
    "adapters_per_pack",
    "checkpoint_every_s",
    "max_failures",
    "tracking",
)
"""Settings that say where and how fast, not what; the inputs among them are recorded by their hashes."""


def build_bank(config: BuildBankConfig) -> str:
    """Publish the bank. Rerun after a stop: finished adapters are kept, those on their way go on."""
    config = located(config, "users", "embeddings", "base", "out")
    users = read_manifest(config.users, kind="users")
    base = open_base(config.base)
    table = read_embeddings(config.embeddings, users=users.hash)
    settings = {k: v for k, v in jsonable(config).items() if k not in PLACING}
    inputs = {"users": users.hash, "embeddings": table.hash, "base": base.hash}
    key = hashlib.sha256(json.dumps([settings, inputs, *_rebuilds(config)], sort_keys=True).encode()).hexdigest()
    files = AdapterFiles(root=adapter_folder(config.out), key=key)
    if not config.force and is_current(config.out, kind="bank", settings=settings, inputs=inputs):
        files.remove()  # where a run was stopped between the bank and the end
        log.info("bank: %s is current, nothing to do", told(config.out))
        return config.out

    # 1. anchors
    refuse_stranger(config.out, "bank")
    center, vectors, anchors = pick_anchors(table, config)
    ids = [table.user_ids[row] for row in anchors]
    log.info("bank: %d anchors of %d users", len(ids), len(table.user_ids))

    with files.locked():
        # 2. adapters that are missing, and those that turn out to be damaged when they are read
        failed = _train_missing(config, files, ids, inputs)
        if damaged := [
            number for number in range(len(ids)) if number not in failed and not _is_readable(files, number)
        ]:
            log.warning("bank: finished adapters %s are damaged and are trained again", damaged)
            for number in damaged:
                files.forget(number)
            failed |= _train_missing(config, files, ids, inputs, but=failed)
        _tell_failed(failed, len(ids))

        # 3. the bank
        kept = [number for number in range(len(ids)) if number not in failed]
        adapters, losses = zip(*(files.read(number) for number in kept), strict=True)
        bank = assemble(
            adapters,
            anchor_ids=tuple(ids[number] for number in kept),
            embeddings=vectors[[anchors[number] for number in kept]],
            center=center,
            base_fingerprint=base.fingerprint,
            encoder=table.encoder,
            facts={
                "task": users.facts["task"],
                "losses": list(losses),
                "items": [table.items[anchors[number]] for number in kept],
                "failed": failed,
            },
        )
        save_bank(bank, config.out, settings=settings, inputs=inputs)
        files.remove()
    log.info("bank: %d anchors, %.1f MiB, in %s", len(bank), bank.bytes / 2**20, told(config.out))
    if others := files.others():
        log.info(
            "bank: adapters of %d other settings lie in %s still; remove it if you want none",
            len(others),
            told(files.root),
        )
    return config.out


def _rebuilds(config: BuildBankConfig) -> list[str]:
    """With `force`, which bank is built anew: until another one is in its place, what is finished for that is kept."""
    if not config.force:
        return []
    try:
        return [read_manifest(config.out, kind="bank").created_at]
    except ArtifactError:
        return []


def _train_missing(
    config: BuildBankConfig,
    files: AdapterFiles,
    ids: Sequence[str],
    inputs: dict[str, str],
    but: Collection[int] = (),
) -> dict[int, str]:
    """Train what is not there, `but` those; by number, why an adapter was stopped."""
    finished = files.finished(len(ids))
    missing = [number for number in range(len(ids)) if number not in finished and number not in but]
    if not missing:
        return {}
    if finished:
        log.info("bank: %d of %d adapters are there already", len(finished), len(ids))
    with connect(config.cluster):
        room_for(config.cluster, 1, cpus=config.group.least_cpus, gpus=config.group.gpus)
        collect_histories(config.users, ids, files.histories, inputs=inputs)
        return train_adapters(_plan(config, files, len(missing)), missing, len(finished))


def _is_readable(files: AdapterFiles, number: int) -> bool:
    """Of what lies in a store, only the manifest was looked at."""
    try:
        files.read(number)
    except ArtifactError:
        return False
    return True


def _plan(config: BuildBankConfig, files: AdapterFiles, missing: int) -> Plan:
    groups = min(config.groups, missing)
    return Plan(
        base=config.base,
        files=files,
        train=config.train,
        group=config.group,
        groups=groups,
        anchors=missing,
        lanes=config.adapters_per_pack,
        max_lanes=-(-missing // groups),
        checkpoint_every_s=config.checkpoint_every_s,
        max_failures=config.max_failures,
        tracking=check_tracking(config.tracking),
    )


def _tell_failed(failed: dict[int, str], anchors: int) -> None:
    for number, reason in sorted(failed.items()):
        log.warning("bank: adapter %d was stopped: %s", number, reason)
    if len(failed) == anchors:
        raise FloatingPointError(f"none of {anchors} adapters could be trained: {next(iter(failed.values()))}")


def pick_anchors(table: Embeddings, config: BuildBankConfig) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """(centre (dim,), all users' vectors (users, dim), row numbers of the anchors)."""
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
        choice=config.choice,
    )
    return center, vectors, [rows[i] for i in chosen]
