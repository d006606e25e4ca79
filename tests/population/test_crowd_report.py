"""Routes and figures of a population against slow references and closed forms."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from mta_ray.lora.bank import Bank
from mta_ray.lora.fusion_config import FusionConfig
from mta_ray.personalize.merge_then_adapt import route_users
from mta_ray.population.crowd.anchors import Anchors, route_many
from mta_ray.population.crowd.parts import BINS
from mta_ray.population.crowd.quality import expected_quality
from mta_ray.population.crowd.report import balance
from mta_ray.population.crowd.sample import fidelity
from mta_ray.population.crowd.vectors import fit_model
from mta_ray.similarity.anchors import unit

ANCHORS, DIM = 7, 16


def _vectors(count: int, seed: int) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=(count, DIM)).astype(np.float32))


@pytest.mark.parametrize("mode", ["exact", "svd", "linear", "as-released"])
@pytest.mark.parametrize(("k", "retired", "shrinkage"), [(1, (), 0.0), (4, (), 0.0), (3, (0, 5), 2.5), (20, (2,), 0.5)])
def test_many_routes_are_those_of_the_method(mode: str, k: int, retired: tuple[int, ...], shrinkage: float) -> None:
    embeddings, users = _vectors(ANCHORS, 0), _vectors(50, 1)
    factors = torch.zeros(ANCHORS, 1, 1)
    bank = Bank(
        down={"m": factors},
        up={"m": factors},
        scale=1.0,
        anchor_ids=tuple("abcdefg"),
        embeddings=embeddings,
        center=np.zeros(DIM, np.float32),
        base_fingerprint="",
        encoder="",
    )
    anchors = Anchors(
        ids=bank.anchor_ids,
        embeddings=embeddings,
        center=bank.center,
        encoder="",
        hash="",
        version="v",
        retired=retired,
    )
    fusion = FusionConfig(k=k, mode=mode, temperature=0.07, shrinkage=shrinkage)  # type: ignore[arg-type]
    items = np.arange(1, len(users) + 1)
    found = route_many(users, anchors, fusion, items)
    for row, route in enumerate(route_users(users, bank, fusion, without=retired, items=items.tolist())):
        assert tuple(found.slots[row]) == route.slots
        np.testing.assert_allclose(found.weights[row], route.weights, rtol=0, atol=1e-9)
    assert (np.diff(found.cosines, axis=1) <= 0).all()

    with pytest.raises(ValueError, match="out of service"):
        route_many(users, dataclasses.replace(anchors, retired=tuple(range(ANCHORS))), fusion, items)


def test_balance_of_known_loads() -> None:
    even = balance([5] * 8)
    assert (even["entropy_bits"], even["entropy_share"], even["effective"]) == pytest.approx((3, 1, 8))
    one = balance([9, 0, 0, 0])
    assert (one["entropy_bits"], one["effective"], one["largest_share"]) == (0, 1, 1)
    assert balance([1, 1, 2])["entropy_bits"] == pytest.approx(1.5)


def test_expected_quality_is_that_of_the_evaluated_where_the_population_is_theirs() -> None:
    rng = np.random.default_rng(0)
    cosines = rng.uniform(0.2, 0.9, 200)
    scores = cosines**2
    same = expected_quality(cosines, scores, np.histogram(cosines, BINS)[0])
    assert same["expected"] == pytest.approx(scores.mean(), abs=0.005)
    assert same["population_outside_evaluated"] == 0
    assert sum(band["population_users"] for band in same["bands"]) == 200


def test_a_population_that_is_nearer_may_expect_what_near_users_had() -> None:
    cosines = np.concatenate([np.full(30, 0.301), np.full(30, 0.801)])
    scores = np.concatenate([np.full(30, 0.2), np.full(30, 0.6)])
    population = np.histogram([0.302] * 10 + [0.802] * 30 + [0.95] * 10, BINS)[0]
    found = expected_quality(cosines, scores, population)
    assert found["expected"] == pytest.approx((10 * 0.2 + 40 * 0.6) / 50)
    assert found["population_outside_evaluated"] == pytest.approx(0.2)


def test_fidelity_tells_users_like_those_held_out_from_others() -> None:
    rng = np.random.default_rng(0)
    anchors = Anchors(
        ids=tuple("abcdefg"),
        embeddings=_vectors(ANCHORS, 0),
        center=np.zeros(DIM, np.float32),
        encoder="",
        hash="",
        version="v",
    )
    near = (anchors.embeddings[0] + rng.normal(scale=0.1, size=(600, DIM))).astype(np.float32)
    model = fit_model(near[:400], rng.integers(5, 50, 400), encoded_items=24)

    like = fidelity(model, near[400:], anchors, seed=0)
    assert like["users_of_a_group"] == 100
    assert like["sampled"]["nearest_cosine_ks"] < 0.25
    far = (anchors.embeddings[1] + rng.normal(scale=0.3, size=(200, DIM))).astype(np.float32)
    other = fidelity(model, far, anchors, seed=0)
    assert other["sampled"]["nearest_cosine_ks"] > 0.7 > 0.25 > other["noise_floor"]["nearest_cosine_ks"]
    assert other["sampled"]["anchor_share_distance"] > 0.7 > 0.25 > other["noise_floor"]["anchor_share_distance"]
    cosines = unit(far) @ anchors.embeddings.T
    assert other["mean_nearest_cosine"]["encoded"] == pytest.approx(cosines.max(axis=1).mean(), abs=1e-5)
