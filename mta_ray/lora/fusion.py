"""From similarities to weights, and from weighted adapters to one adapter: the four fusion modes of the method.

`exact` is Σ w_i ΔW_i, ours and the default. `linear` averages A and B apart, as the paper's code does, and so adds
cross terms; `svd` truncates the exact sum to the anchors' rank; `as-released` is `linear` with the two weights swapped.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mta_ray.lora.adapter import Adapter, Factors
from mta_ray.lora.fusion_config import FusionMode


def fusion_weights(similarities: Sequence[float], *, mode: FusionMode, temperature: float) -> tuple[float, ...]:
    """Weights that sum to one, in the order of `similarities` (cosines, nearest first).

    exact, svd: softmax(s / temperature) (MTA, stage 2). linear: s / Σs. as-released: the same, in reverse order.
    """
    s = torch.tensor(similarities, dtype=torch.float64)
    if mode in ("exact", "svd"):
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        return tuple(torch.softmax(s / temperature, dim=0).tolist())
    # Dissimilar anchors have no share; all-dissimilar ones share alike.
    positive = s.clamp(min=0)
    shares = positive / positive.sum() if positive.sum() > 0 else torch.full_like(s, 1 / len(s))
    return tuple((shares.flip(0) if mode == "as-released" else shares).tolist())


def fuse(
    adapters: Sequence[Adapter], weights: Sequence[float], *, mode: FusionMode = "exact", rank: int | None = None
) -> Adapter:
    """One adapter that stands for the weighted adapters.

    exact has rank k·r and is Σ w_i ΔW_i to rounding; the others have rank r, svd also any other `rank`. Adapters
    share modules, and for linear and as-released also the rank.
    """
    if len(adapters) != len(weights) or not adapters:
        raise ValueError(
            f"{len(adapters)} adapters and {len(weights)} weights: as many weights as adapters, at least one"
        )
    if any(set(adapter.factors) != set(adapters[0].factors) for adapter in adapters):
        raise ValueError("adapters to fuse adapt different modules; train them with the same target modules")
    modules = adapters[0].factors
    if mode in ("linear", "as-released"):
        return Adapter(factors={m: _average(adapters, weights, m) for m in modules}, scale=adapters[0].scale)
    stacked = {m: _concatenate(adapters, weights, m) for m in modules}
    if mode == "exact":
        return Adapter(factors=stacked, scale=1.0)
    return Adapter(factors={m: _truncate(stacked[m], rank or adapters[0].rank) for m in modules}, scale=1.0)


def stack(fused: Adapter, own: Adapter) -> Adapter:
    """The fused adapter with the user's own on top, as one adapter of rank k·r + r_u (MTA, stage 3)."""
    return fuse([fused, own], [1.0, 1.0], mode="exact")


def _concatenate(adapters: Sequence[Adapter], weights: Sequence[float], module: str) -> Factors:
    down = torch.cat([a.factors[module].down for a in adapters])
    up = torch.cat([w * a.scale * a.factors[module].up for a, w in zip(adapters, weights, strict=True)], dim=1)
    return Factors(down=down, up=up)


def _average(adapters: Sequence[Adapter], weights: Sequence[float], module: str) -> Factors:
    # An adapter of another scale is brought to the first one's before averaging.
    down: Tensor = sum(w * a.factors[module].down for a, w in zip(adapters, weights, strict=True))  # type: ignore[assignment]
    scale = adapters[0].scale
    up: Tensor = sum(w * a.scale / scale * a.factors[module].up for a, w in zip(adapters, weights, strict=True))  # type: ignore[assignment]
    return Factors(down=down, up=up)


def _truncate(factors: Factors, rank: int) -> Factors:
    # QR of both thin factors first: the SVD is then of a (k·r, k·r) matrix, never of the dense one.
    q_up, r_up = torch.linalg.qr(factors.up)
    q_down, r_down = torch.linalg.qr(factors.down.T)
    u, s, vh = torch.linalg.svd(r_up @ r_down.T)
    root = s[:rank].sqrt()
    return Factors(down=root[:, None] * (vh[:rank] @ q_down.T), up=(q_up @ u[:, :rank]) * root)
