"""Whom a population is routed to: the anchors of a bank, or some of the users that were encoded as a sample."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from mta_ray.artifacts import open_artifact
from mta_ray.lora.bank import load_bank
from mta_ray.lora.bank_store import version_of
from mta_ray.lora.fusion_config import FusionConfig
from mta_ray.personalize.merge_then_adapt import encode
from mta_ray.serving.banks import Banks, NewBank
from mta_ray.serving.database import Database
from mta_ray.serving.identity import DEFAULT_TENANT, UserId
from mta_ray.similarity.anchors import choose_anchors
from mta_ray.similarity.neighbours import nearest

ANCHOR_ITEMS_MIN = 11
"""As build-bank has it: a user with a shorter history is no anchor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchors:
    """What routing needs of a bank, without its adapters."""

    ids: tuple[str, ...]
    embeddings: Float[ndarray, "anchors dim"]
    center: Float[ndarray, " dim"]
    encoder: str
    hash: str
    """Of the bank artifact, or of what stands here."""
    version: str
    base_fingerprint: str = ""
    is_bank: bool = False
    """Whether there are adapters behind them."""
    named: tuple[UserId, ...] = ()
    """Their names in the store; none: there is no store."""
    retired: tuple[int, ...] = ()
    """Slots out of service there."""

    @property
    def in_service(self) -> ndarray:
        """The other slots, ascending."""
        return np.array([slot for slot in range(len(self.ids)) if slot not in self.retired], dtype=np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Routes:
    """`merge_then_adapt.route_users` of many users, as arrays; each user's nearest anchor first."""

    slots: Int[ndarray, "users k"]
    weights: Float[ndarray, "users k"]
    cosines: Float[ndarray, "users k"]


def anchors_of_bank(path: str) -> Anchors:
    """Those of a bank artifact."""
    bank, artifact = load_bank(path), open_artifact(path, kind="bank", verify=False)
    return Anchors(
        ids=bank.anchor_ids,
        embeddings=bank.embeddings,
        center=bank.center,
        encoder=bank.encoder,
        hash=artifact.hash,
        version=version_of(artifact.hash),
        base_fingerprint=bank.base_fingerprint,
        is_bank=True,
    )


def anchors_of_sample(
    user_ids: Sequence[str],
    means: Float[ndarray, "users dim"],
    items: Sequence[int],
    *,
    anchors: int,
    encoder: str,
    seed: int,
) -> Anchors:
    """Anchors as `build-bank` chooses them, with nothing trained."""
    center = means.mean(axis=0)
    vectors = encode(means, center)
    rows = choose_anchors(user_ids, vectors, items, anchors=anchors, min_items=ANCHOR_ITEMS_MIN, seed=seed)
    ids = tuple(user_ids[row] for row in rows)
    digest = hashlib.sha256("\0".join((encoder, *ids)).encode() + vectors[rows].tobytes() + center.tobytes())
    return Anchors(
        ids=ids,
        embeddings=vectors[rows],
        center=center,
        encoder=encoder,
        hash=digest.hexdigest(),
        version=f"simulated-{digest.hexdigest()[:12]}",
        base_fingerprint="simulated",
    )


def route_many(
    vectors: Float[ndarray, "users dim"], anchors: Anchors, fusion: FusionConfig, items: Int[ndarray, " users"]
) -> Routes:
    """The k nearest anchors of each user and their weights; every user has a history (no vector is zero)."""
    in_service = anchors.in_service
    if not len(in_service):
        raise ValueError(f"all {len(anchors.ids)} anchors of the bank are out of service; build it again")
    found = nearest(vectors, anchors.embeddings[in_service], min(fusion.k, len(in_service)))
    cosines = found.similarities.astype(np.float64)
    if fusion.mode in ("exact", "svd"):
        shares = np.exp((cosines - cosines[:, :1]) / fusion.temperature)
    else:
        # Dissimilar anchors have no share; all-dissimilar ones share alike.
        shares = cosines.clip(min=0)
        shares[shares.sum(axis=1) == 0] = 1.0
        shares = shares[:, ::-1] if fusion.mode == "as-released" else shares
    strength = items / (items + fusion.shrinkage)
    weights = shares / shares.sum(axis=1, keepdims=True) * strength[:, None]
    return Routes(slots=in_service[found.indices], weights=weights, cosines=found.similarities)


def publish_anchors(database: Database, anchors: Anchors, *, tenant: str, path: str) -> Anchors:
    """Make the anchors known to a store, so that routes can name them: how they are named there, and who is retired.

    A bank that is published there keeps its version, and its anchors their tenant; in a store that does not know it
    they are users of the tenant `default` (a service of another tenant has to publish it first). Anchors without a bank
    are users of `tenant`. A bank is activated where none is; anchors without adapters never are: no service could load
    them.
    """
    banks = Banks(database)
    version = banks.known_as(anchors.hash) or anchors.version
    tenant = DEFAULT_TENANT if anchors.is_bank else tenant
    banks.publish(
        NewBank(
            version=version,
            path=path,
            hash=anchors.hash,
            base_fingerprint=anchors.base_fingerprint,
            encoder=anchors.encoder,
            anchors=tuple(UserId(tenant=tenant, id=name) for name in anchors.ids),
        )
    )
    if anchors.is_bank and banks.active() is None:
        banks.activate(version)
    known = banks.get(version)
    return replace(anchors, version=version, named=known.bank.anchors, retired=tuple(sorted(known.retired_slots)))
