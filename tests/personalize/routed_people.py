"""A bank of three random adapters, and three users with examples and routes of one to three anchors."""

from __future__ import annotations

import torch

from mta_ray.lora.adapter import Adapter, Factors
from mta_ray.lora.slots import Route, put
from mta_ray.model.backbone import Backbone, RoutedModel
from mta_ray.model.batches import Tokens, tokenise

RANK, SCALE = 4, 0.5
TEXTS = ("a robot wakes up", "love in paris at night", "an old war", "two sisters and a dog run home")
ROUTES = (
    Route(slots=(2, 0), weights=(0.7, 0.3)),
    Route(slots=(0, 1, 2), weights=(1 / 3, 1 / 3, 1 / 3)),
    Route(slots=(1,), weights=(0.5,)),
)


def bank_of(routed: RoutedModel) -> list[Adapter]:
    """Three random adapters, on the shelf `bank`."""
    generator = torch.Generator().manual_seed(3)
    adapters = [
        Adapter(
            factors={
                name: Factors(
                    down=torch.randn(RANK, layer.base.in_features, generator=generator) * 0.2,
                    up=torch.randn(layer.base.out_features, RANK, generator=generator) * 0.2,
                )
                for name, layer in routed.layers.items()
            },
            scale=SCALE,
        )
        for _ in range(3)
    ]
    routed.add_shelf("bank", slots=3, rank=RANK, alpha=SCALE * RANK)
    for slot, adapter in enumerate(adapters):
        put(routed.layers, "bank", slot, adapter)
    return adapters


def people(backbone: Backbone) -> list[tuple[str, list[Tokens], Route]]:
    return [
        (f"user {n}", [tokenise(backbone, f"film {n}: {t}", t.split()[-1]) for t in TEXTS[: n + 1]], route)
        for n, route in enumerate(ROUTES)
    ]
