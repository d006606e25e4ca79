"""Over a bfloat16 base, factors that train in float32 follow the float32 pack; bfloat16 ones round updates away."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.append(str(Path(__file__).parent.parent / "model"))

from architectures import random_backbone

from mta_ray.lora.slots import Route
from mta_ray.model.backbone import RoutedModel
from mta_ray.model.batches import collate, row_losses, tokenise
from mta_ray.personalize.engines import TorchSlotEngine
from mta_ray.personalize.lanes import PACK

TEXTS = ("a robot wakes up", "love in paris at night", "an old war", "two sisters and a dog run home", "space")
RATE, STEPS, RANK = 5e-4, 80, 4


def _losses(base: torch.dtype, factors: torch.dtype) -> np.ndarray:
    """(steps, adapters) of two adapters, by the engine that packs use in one process."""
    routed = RoutedModel(random_backbone("llama", dtype=base))
    routed.add_shelf(PACK, slots=2, rank=RANK, alpha=2.0 * RANK, dtype=factors)
    generator = torch.Generator().manual_seed(0)
    trainable = []
    for layer in routed.layers.values():
        shelf = layer.shelves[PACK]
        shelf.down.data.copy_((torch.rand(shelf.down.shape, generator=generator) - 0.5) * 0.3)
        trainable += [shelf.down.requires_grad_(True), shelf.up.requires_grad_(True)]
        assert shelf.down.dtype == factors and layer.dtype == base
    engine = TorchSlotEngine(trainable, weight_decay=0.0, max_grad_norm=1.0)
    rows = [tokenise(routed.backbone, f"film: {text}", text.split()[-1]) for text in TEXTS * 2]
    batch = collate(routed.backbone, rows, routed.device)
    routing = routed.routing([Route(slots=(n // len(TEXTS),), weights=(1.0,)) for n in range(len(rows))])
    losses = []
    for _ in range(STEPS):
        with routed.router.using(**{PACK: routing}):
            each = row_losses(routed.model, batch)
        losses.append(each.detach().view(2, -1).mean(1).numpy())
        engine.backward(each.mean())
        engine.step({0: RATE, 1: RATE})
    return np.array(losses)


def test_float32_factors_follow_the_float32_pack() -> None:
    wanted = _losses(torch.float32, torch.float32)
    kept = np.abs(_losses(torch.bfloat16, torch.float32) - wanted).max()
    rounded = np.abs(_losses(torch.bfloat16, torch.bfloat16) - wanted).max()
    learned = (wanted[0] - wanted[-1]).min()
    assert kept < 0.05 * learned
    assert rounded > 2 * kept


def test_a_shelf_has_the_bases_dtype_unless_told() -> None:
    routed = RoutedModel(random_backbone("llama", dtype=torch.bfloat16))
    routed.add_shelf("bank", slots=1, rank=1, alpha=1.0)
    assert all(layer.shelves["bank"].up.dtype == torch.bfloat16 for layer in routed.layers.values())
