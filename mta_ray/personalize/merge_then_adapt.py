"""The method on one page, used alike by evaluation and serving: encode, nearest, route; the stack is a pack on top."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from mta_ray.lora.adapter import Adapter
from mta_ray.lora.bank import Bank
from mta_ray.lora.fusion import FusionMode, fuse, fusion_weights
from mta_ray.lora.slots import Route
from mta_ray.model.backbone import RoutedModel
from mta_ray.model.batches import Tokens
from mta_ray.personalize.lanes import Job
from mta_ray.personalize.train_config import TrainConfig
from mta_ray.personalize.training import PackResult, train_pack
from mta_ray.similarity.anchors import unit
from mta_ray.similarity.neighbours import nearest

BANK = "bank"
"""The shelf that holds the meta-LoRAs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FusionConfig:
    """How a user's anchors are weighed."""

    k: int = 4
    """Anchors a user is made of; fewer where the bank is smaller."""
    temperature: float = 0.05
    """Of the softmax over cosines; lower trusts the nearest anchor more."""
    mode: FusionMode = "exact"
    """`exact` (ours) needs no merging; the others are materialised as one adapter a user."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be above 0 and finite, got {self.temperature}")


def encode(means: Float[ndarray, "users dim"], center: Float[ndarray, " dim"]) -> Float[ndarray, "users dim"]:
    """Users' mean item vectors in the bank's space: centred, unit length. A user without items becomes zero."""
    known = np.abs(means).sum(axis=1, keepdims=True) > 0
    return unit(np.where(known, means - center, 0.0).astype(np.float32))


def route_users(
    vectors: Float[ndarray, "users dim"], bank: Bank, config: FusionConfig, *, without: Collection[int] = ()
) -> list[Route]:
    """Each user's route through the bank: the k nearest anchors with their weights (MTA, stage 2).

    `vectors` are what `encode` gives with the bank's centre. A zero vector (no history yet) is the documented cold
    start: every anchor alike. `without` are slots whose anchors are out of service; the others take their place.
    """
    in_service = np.array([slot for slot in range(len(bank)) if slot not in without])
    if not len(in_service):
        raise ValueError(f"all {len(bank)} anchors of the bank are out of service; build it again")
    k = min(config.k, len(in_service))
    found = nearest(vectors, bank.embeddings[in_service], k)
    everyone = Route(slots=tuple(in_service.tolist()), weights=(1 / len(in_service),) * len(in_service))
    routes = []
    for vector, slots, cosines in zip(vectors, in_service[found.indices], found.similarities, strict=True):
        if not vector.any():
            routes.append(everyone)
            continue
        weights = fusion_weights(cosines.tolist(), mode=config.mode, temperature=config.temperature)
        routes.append(Route(slots=tuple(slots.tolist()), weights=weights))
    return routes


def fused_adapter(route: Route, bank: Bank, mode: FusionMode) -> Adapter:
    """The route as one adapter, for export and for the modes that are not sums of ΔW."""
    return fuse([bank.adapter(slot) for slot in route.slots], route.weights, mode=mode)


def stack_users(
    routed: RoutedModel,
    users: Sequence[tuple[str, Sequence[Tokens], Mapping[str, Route] | None]],
    config: TrainConfig,
    *,
    on_step: Callable[[int], None] | None = None,
) -> PackResult:
    """Train one own adapter for each (user id, examples, frozen route below) in one pack (MTA, stage 3).

    Without a route below it is OPPU: one LoRA a user on the bare base model.
    """
    jobs = [Job(id=user_id, examples=examples, background=below) for user_id, examples, below in users]
    return train_pack(routed, jobs, config, on_step=on_step)
