"""Small banks of drawn adapters that fit no model, for tests of how banks are kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from mta_ray.lora.adapter import Adapter, Factors
from mta_ray.lora.bank import Bank, assemble, save_bank

SHAPES = {"layers.0.q": (6, 10), "layers.1.q": (6, 10)}
"""Module to (fan_in, fan_out)."""


def drawn_adapter(seed: int, *, rank: int = 2, scale: float = 2.0) -> Adapter:
    draw = torch.Generator().manual_seed(seed)
    factors = {
        module: Factors(down=torch.randn(rank, fan_in, generator=draw), up=torch.randn(fan_out, rank, generator=draw))
        for module, (fan_in, fan_out) in SHAPES.items()
    }
    return Adapter(factors=factors, scale=scale)


def drawn_bank(seeds: Sequence[int] = (1, 2, 3), *, ids: Sequence[str] | None = None, **more) -> Bank:
    """One adapter a seed; anchors are called `user-SEED`."""
    vectors = np.random.default_rng(7).normal(size=(len(seeds), 5))
    facts = {
        "task": "movie_tagging",
        "items": [10 + seed for seed in seeds],
        "losses": [[2.0, 1.0 / (1 + seed)] for seed in seeds],
    }
    fields = {"base_fingerprint": "f" * 64, "encoder": "e", "facts": facts} | more
    return assemble(
        [drawn_adapter(seed) for seed in seeds],
        anchor_ids=tuple(ids or [f"user-{seed}" for seed in seeds]),
        embeddings=(vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32),
        center=np.zeros(5, np.float32),
        **fields,
    )


def saved(out: Path | str, seeds: Sequence[int] = (1, 2, 3), **settings) -> str:
    """The path of a bank of these seeds."""
    save_bank(drawn_bank(seeds), out, settings={"seeds": list(seeds), **settings}, inputs={"users": "a" * 64})
    return str(out)
