"""The identities of the fusion modes, against dense sums and against PEFT's own weighted combination."""

from __future__ import annotations

import math

import pytest
import torch

from mta_ray.lora.adapter import Adapter, Factors
from mta_ray.lora.fusion import fuse, fusion_weights, stack


def _adapter(seed: int, *, rank: int = 3, scale: float = 2.0, down_seed: int | None = None) -> Adapter:
    torch.manual_seed(seed)
    factors = {}
    for module in ("a", "b"):
        up = torch.randn(10, rank, dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed if down_seed is None else down_seed)
        down = torch.randn(rank, 8, dtype=torch.float64, generator=generator)
        factors[module] = Factors(down=down, up=up)
    return Adapter(factors=factors, scale=scale)


def test_softmax_weights_by_hand():
    weights = fusion_weights([0.9, 0.8], mode="exact", temperature=0.1)
    assert weights[0] == pytest.approx(math.e / (math.e + 1))
    assert sum(weights) == pytest.approx(1)


def test_linear_weights_are_shares_and_as_released_swaps_them():
    assert fusion_weights([0.6, 0.2], mode="linear", temperature=1.0) == pytest.approx((0.75, 0.25))
    assert fusion_weights([0.6, 0.2], mode="as-released", temperature=1.0) == pytest.approx((0.25, 0.75))
    assert fusion_weights([-0.5, -0.1], mode="linear", temperature=1.0) == pytest.approx((0.5, 0.5))


@pytest.mark.parametrize("mode", ["exact", "linear", "svd"])
def test_weight_one_gives_back_the_anchor(mode):
    one, other = _adapter(1), _adapter(2)
    fused = fuse([one, other], [1.0, 0.0], mode=mode)
    for module in one.factors:
        torch.testing.assert_close(fused.delta(module), one.delta(module))


@pytest.mark.parametrize("mode", ["linear", "as-released"])
def test_factors_averaged_apart_have_cross_terms(mode):
    one, other = _adapter(1, scale=2.0), _adapter(2, scale=0.5)
    fused = fuse([one, other], [0.3, 0.7], mode=mode)
    for module in one.factors:
        a, b = one.factors[module], other.factors[module]
        wanted = (0.3 * 2.0 * a.up + 0.7 * 0.5 * b.up) @ (0.3 * a.down + 0.7 * b.down)
        torch.testing.assert_close(fused.delta(module), wanted)


def test_exact_is_the_dense_sum_whatever_the_order_ranks_and_scales():
    adapters, weights = [_adapter(1), _adapter(2, rank=2, scale=0.5), _adapter(3)], [0.5, 0.3, 0.2]
    fused = fuse(adapters, weights)
    turned = fuse(adapters[::-1], weights[::-1])
    for module in ("a", "b"):
        wanted = sum(w * a.delta(module) for a, w in zip(adapters, weights, strict=True))
        torch.testing.assert_close(fused.delta(module), wanted)
        torch.testing.assert_close(turned.delta(module), wanted)
    assert fused.rank == 8


def test_linear_is_the_product_of_averages_with_its_cross_terms():
    one, other = _adapter(1), _adapter(2)
    fused = fuse([one, other], [0.7, 0.3], mode="linear")
    up = 0.7 * one.factors["a"].up + 0.3 * other.factors["a"].up
    down = 0.7 * one.factors["a"].down + 0.3 * other.factors["a"].down
    torch.testing.assert_close(fused.delta("a"), 2.0 * up @ down)
    assert not torch.allclose(fused.delta("a"), fuse([one, other], [0.7, 0.3]).delta("a"), rtol=0.1)


def test_linear_is_exact_where_all_anchors_share_their_down_factor():
    one, other = _adapter(1, down_seed=9), _adapter(2, down_seed=9)
    exact, linear = (fuse([one, other], [0.7, 0.3], mode=mode).delta("a") for mode in ("exact", "linear"))
    torch.testing.assert_close(linear, exact)


def test_svd_is_the_best_approximation_of_its_rank():
    adapters, weights = [_adapter(1), _adapter(2)], [0.6, 0.4]
    exact = fuse(adapters, weights).delta("a")
    u, s, vh = torch.linalg.svd(exact)
    wanted = (u[:, :3] * s[:3]) @ vh[:3]
    fused = fuse(adapters, weights, mode="svd")
    assert fused.rank == 3
    torch.testing.assert_close(fused.delta("a"), wanted)


def test_a_stack_adds_to_what_was_fused():
    fused, own = fuse([_adapter(1), _adapter(2)], [0.5, 0.5]), _adapter(5, rank=1, scale=3.0)
    both = stack(fused, own)
    assert both.rank == 7
    torch.testing.assert_close(both.delta("b"), fused.delta("b") + own.delta("b"))


def test_weights_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="2 adapters and 1 weights"):
        fuse([_adapter(1), _adapter(2)], [1.0])
    with pytest.raises(ValueError, match="temperature"):
        fusion_weights([0.5], mode="exact", temperature=0.0)
