"""From an embedding and a bank to a route: by hand on a bank of three unit vectors."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from mta_ray.lora.bank import Bank
from mta_ray.lora.fusion_config import FusionConfig
from mta_ray.lora.slots import Route
from mta_ray.personalize.merge_then_adapt import encode, fused_adapter, route_users


def _bank() -> Bank:
    return Bank(
        down={"m": torch.zeros(3, 1, 2)},
        up={"m": torch.zeros(3, 2, 1)},
        scale=1.0,
        anchor_ids=("a", "b", "c"),
        embeddings=np.array([[1, 0], [0, 1], [-1, 0]], dtype=np.float32),
        center=np.zeros(2, dtype=np.float32),
        base_fingerprint="",
        encoder="",
    )


def test_the_two_nearest_anchors_with_softmax_weights():
    vector = np.array([[0.8, 0.6]], dtype=np.float32)
    route = route_users(vector, _bank(), FusionConfig(k=2, temperature=0.2))[0]
    assert route.slots == (0, 1)
    assert route.weights == pytest.approx((1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))), abs=1e-5)


def test_shrinkage_weakens_a_route_by_how_little_is_known():
    vectors = np.array([[0.8, 0.6], [0.8, 0.6], [0.0, 0.0]], dtype=np.float32)
    plain = route_users(vectors, _bank(), FusionConfig(k=2, temperature=0.2))
    routes = route_users(vectors, _bank(), FusionConfig(k=2, temperature=0.2, shrinkage=3.0), items=[1, 9, 0])
    for route, whole, strength in zip(routes, plain, (0.25, 0.75, 0.0), strict=True):
        assert route.slots == whole.slots
        assert route.weights == pytest.approx([strength * weight for weight in whole.weights])
    assert route_users(vectors, _bank(), FusionConfig(k=2, temperature=0.2), items=[1, 9, 0]) == plain
    with pytest.raises(ValueError, match="give items"):
        route_users(vectors, _bank(), FusionConfig(shrinkage=3.0))


def test_one_adapter_stands_for_a_route_with_coefficients():
    torch.manual_seed(0)
    bank = replace(_bank(), down={"m": torch.randn(3, 4, 6)}, up={"m": torch.randn(3, 5, 4)}, scale=0.5)
    scales = torch.rand(2, 4)
    route = Route(slots=(2, 0), weights=(0.7, 0.3), coefficients={"m": scales})
    wanted = sum(
        weight * 0.5 * bank.up["m"][slot] @ torch.diag(scales[j]) @ bank.down["m"][slot]
        for j, (slot, weight) in enumerate(zip(route.slots, route.weights, strict=True))
    )
    torch.testing.assert_close(fused_adapter(route, bank, "exact").delta("m"), wanted)


def test_a_user_without_history_gets_every_anchor_alike():
    vectors = encode(np.zeros((1, 2), dtype=np.float32), np.array([0.3, 0.1], dtype=np.float32))
    route = route_users(vectors, _bank(), FusionConfig(k=2))[0]
    assert route.slots == (0, 1, 2)
    assert route.weights == pytest.approx((1 / 3,) * 3)


def test_k_larger_than_the_bank_takes_the_whole_bank():
    assert len(route_users(np.array([[1, 0]], dtype=np.float32), _bank(), FusionConfig(k=9))[0].slots) == 3


def test_encode_takes_the_centre_off_and_scales_to_length_one():
    vector = encode(np.array([[4.0, 5.0]], dtype=np.float32), np.array([1.0, 1.0], dtype=np.float32))
    np.testing.assert_allclose(vector, [[0.6, 0.8]], rtol=1e-6)


def test_order_of_users_changes_nothing():
    vectors = np.array([[0.6, 0.8], [1.0, 0.0]], dtype=np.float32)
    one, other = route_users(vectors, _bank(), FusionConfig(k=2))
    assert route_users(vectors[::-1].copy(), _bank(), FusionConfig(k=2)) == [other, one]
