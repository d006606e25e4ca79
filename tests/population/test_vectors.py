"""Drawn vectors: user i is the same in any range, and many of them have the moments of those they were fitted on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mta_ray.population.crowd.vectors import USERS_PER_STREAM, EmbeddingModel, fit_model, load_model

DIM, ENCODED_ITEMS = 32, 24


def _people(users: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Three tastes in a few directions, and noise that more items make smaller."""
    rng = np.random.default_rng(seed)
    tastes = np.random.default_rng(0).normal(0, 0.2, (3, DIM))
    kinds = rng.choice(3, users, p=[0.6, 0.3, 0.1])
    items = np.where(rng.random(users) < 0.5, rng.integers(4, 11, users), rng.integers(20, 100, users))
    noise = rng.normal(0, 0.3, (users, DIM)) / np.sqrt(np.minimum(items, ENCODED_ITEMS))[:, None]
    return (tastes[kinds] + noise + 0.1).astype(np.float32), items


@pytest.fixture(scope="module")
def model() -> EmbeddingModel:
    return fit_model(*_people(2000, seed=1), encoded_items=ENCODED_ITEMS)


def test_a_user_is_the_same_in_any_range(model: EmbeddingModel) -> None:
    whole = model.draw(7, 0, 4 * USERS_PER_STREAM)
    for first, users in ((0, 1), (3, 700), (USERS_PER_STREAM - 1, 2), (USERS_PER_STREAM, USERS_PER_STREAM), (900, 124)):
        some = model.draw(7, first, users)
        for name in ("means", "items", "donors"):
            assert np.array_equal(getattr(some, name), getattr(whole, name)[first : first + users])


def test_another_seed_makes_other_users_and_no_two_users_are_alike(model: EmbeddingModel) -> None:
    one = model.draw(7, 0, 1000).means
    assert len(np.unique(one, axis=0)) == 1000
    assert not np.isclose(one, model.draw(8, 0, 1000).means).all(axis=1).any()


def test_drawn_users_have_the_moments_of_new_ones(model: EmbeddingModel) -> None:
    drawn, (means, items) = model.draw(0, 0, 20_000), _people(20_000, seed=2)
    assert np.abs(drawn.means.mean(axis=0) - means.mean(axis=0)).max() < 0.02
    covariance, wanted = (np.cov(some.T) for some in (drawn.means, means))
    assert np.linalg.norm(covariance - wanted) < 0.1 * np.linalg.norm(wanted)
    for few, least in ((items < 11, 0.5), (items >= 20, 0.5)):
        assert few.mean() == pytest.approx(least, abs=0.02)
    assert np.mean(drawn.items < 15) == pytest.approx(0.5, abs=0.04)

    # short histories make noisier means
    def spread(vectors: np.ndarray, rows: np.ndarray) -> float:
        return float(np.linalg.norm(vectors[rows] - vectors[rows].mean(axis=0), axis=1).mean())

    for rows, wanted_rows in ((drawn.items < 15, items < 15), (drawn.items >= 15, items >= 15)):
        assert spread(drawn.means, rows) == pytest.approx(spread(means, wanted_rows), rel=0.05)


def test_a_user_borrows_from_somebody_of_the_same_taste(model: EmbeddingModel) -> None:
    fitted, drawn = _people(2000, seed=1)[0], model.draw(0, 0, 2000)
    own = np.linalg.norm(drawn.means - fitted[drawn.donors], axis=1).mean()
    others = np.linalg.norm(drawn.means - np.roll(fitted[drawn.donors], 1, axis=0), axis=1).mean()
    assert own < 0.9 * others


def test_a_kept_model_draws_the_same(model: EmbeddingModel, tmp_path: Path) -> None:
    model.save(tmp_path / "model.npz")
    assert np.array_equal(load_model(tmp_path / "model.npz").draw(0, 10, 50).means, model.draw(0, 10, 50).means)


def test_too_few_users_are_refused() -> None:
    with pytest.raises(ValueError, match="20 users or more, got 19"):
        fit_model(*_people(19, seed=1), encoded_items=ENCODED_ITEMS)
