"""The method on one page, used alike by evaluation and serving: encode, nearest, route; the stack is a pack on top."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from mta_ray.lora.adapter import Adapter, Factors
from mta_ray.lora.bank import Bank
from mta_ray.lora.fusion import fuse, fusion_weights
from mta_ray.lora.fusion_config import FusionConfig, FusionMode
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


def encode(means: Float[ndarray, "users dim"], center: Float[ndarray, " dim"]) -> Float[ndarray, "users dim"]:
    """Users' mean item vectors in the bank's space: centred, unit length. A user without items becomes zero."""
    known = np.abs(means).sum(axis=1, keepdims=True) > 0
    return unit(np.where(known, means - center, 0.0).astype(np.float32))


def route_users(
    vectors: Float[ndarray, "users dim"],
    bank: Bank,
    config: FusionConfig,
    *,
    without: Collection[int] = (),
    items: Sequence[int] | None = None,
) -> list[Route]:
    """Each user's route through the bank: the k nearest anchors with their weights (MTA, stage 2).

    `vectors` are what `encode` gives with the bank's centre. A zero vector (no history yet) is the documented cold
    start: every anchor alike. `without` are slots whose anchors are out of service; the others take their place.
    `items` are the users' history items, which only shrinkage asks for: then one without history has weights of 0.
    Raises ValueError where all anchors are out of service, and for shrinkage without items.
    """
    in_service = np.array([slot for slot in range(len(bank)) if slot not in without])
    if not len(in_service):
        raise ValueError(f"all {len(bank)} anchors of the bank are out of service; build it again")
    if config.shrinkage and items is None:
        raise ValueError("shrinkage goes by how many history items a user has; give items, or leave shrinkage at 0")
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
    if not config.shrinkage or items is None:
        return routes
    return [_shrunk(route, count / (count + config.shrinkage)) for route, count in zip(routes, items, strict=True)]


def fused_adapter(route: Route, bank: Bank, mode: FusionMode) -> Adapter:
    """The route as one adapter, with its coefficients: for export and for the modes that are not sums of ΔW."""
    anchors = [bank.adapter(slot) for slot in route.slots]
    if route.coefficients:
        anchors = [
            _scaled(anchor, {m: c[j] for m, c in route.coefficients.items()}) for j, anchor in enumerate(anchors)
        ]
    return fuse(anchors, route.weights, mode=mode)


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


def _shrunk(route: Route, strength: float) -> Route:
    return replace(route, weights=tuple(weight * strength for weight in route.weights))


def _scaled(adapter: Adapter, by: Mapping[str, Float[Tensor, " #rank"]]) -> Adapter:
    factors = {m: Factors(down=by[m][:, None] * f.down, up=f.up) for m, f in adapter.factors.items()}
    return Adapter(factors=factors, scale=adapter.scale)
