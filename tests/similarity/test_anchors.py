"""Anchors and neighbours against a brute-force search and clusters that are known."""

from __future__ import annotations

import numpy as np
import pytest

from mta_ray.similarity.anchors import choose_anchors, cover, unit
from mta_ray.similarity.embedding import Encoder
from mta_ray.similarity.neighbours import cluster, nearest


def _three_clusters() -> tuple[list[str], np.ndarray, list[int]]:
    rng = np.random.default_rng(0)
    centres = np.eye(3, 6, dtype=np.float32)
    vectors = unit(np.repeat(centres, 10, axis=0) + 0.05 * rng.standard_normal((30, 6)).astype(np.float32))
    items = list(range(11, 41))
    return [f"u{n:02d}" for n in range(30)], vectors, items


def test_each_cluster_gives_its_longest_history():
    ids, vectors, items = _three_clusters()
    assert choose_anchors(ids, vectors, items, anchors=3, min_items=11, seed=0) == [9, 19, 29]


def test_short_histories_are_no_anchors_and_order_changes_nothing():
    ids, vectors, items = _three_clusters()
    items[9] = 5
    assert choose_anchors(ids, vectors, items, anchors=3, min_items=11, seed=0) == [8, 19, 29]
    turned = choose_anchors(ids[::-1], vectors[::-1].copy(), items[::-1], anchors=3, min_items=11, seed=0)
    assert sorted(29 - row for row in turned) == [8, 19, 29]
    with pytest.raises(ValueError, match="min-items"):
        choose_anchors(ids, vectors, [3] * 30, anchors=3, min_items=11, seed=0)


def test_medoids_are_nearest_to_their_clusters_and_covering_anchors_are_what_plain_greed_takes():
    rng = np.random.default_rng(2)
    vectors = unit(rng.standard_normal((40, 5)).astype(np.float32))
    ids = [f"u{n:02d}" for n in range(40)]
    items = rng.integers(1, 40, 40).tolist()
    able = [row for row in range(40) if items[row] >= 11]
    cosines = vectors.astype(np.float64) @ vectors.astype(np.float64).T

    labels = cluster(vectors[able], 4, seed=3)
    members = [[row for row, label in zip(able, labels, strict=True) if label == one] for one in range(4)]
    medoids = sorted(max(rows, key=lambda row: cosines[row, rows].sum()) for rows in members)
    assert choose_anchors(ids, vectors, items, anchors=4, min_items=11, seed=3, choice="medoid") == medoids

    taken: list[int] = []  # every gain computed anew for each anchor; all users count, also those with few items
    while len(taken) < 6:
        taken.append(max(set(able) - set(taken), key=lambda row: cosines[:, [*taken, row]].max(axis=1).sum()))
    assert choose_anchors(ids, vectors, items, anchors=6, min_items=11, seed=3, choice="cover") == sorted(taken)
    assert [able[n] for n in cover(vectors[able], vectors, 6)] == taken
    assert len(cover(vectors[able], vectors, len(able))) == len(able)
    with pytest.raises(ValueError, match="at least 1"):
        cover(vectors, vectors, 41)


@pytest.mark.parametrize("choice", ["medoid", "cover", "random"])
def test_any_choice_takes_long_histories_only_and_order_changes_nothing(choice):
    ids, vectors, items = _three_clusters()
    items = items[::-1]  # the last ten have fewer than 21
    chosen = choose_anchors(ids, vectors, items, anchors=5, min_items=21, seed=0, choice=choice)
    assert len(set(chosen)) == len(chosen) == 5 and max(chosen) < 20
    turned = choose_anchors(
        ids[::-1], vectors[::-1].copy(), items[::-1], anchors=5, min_items=21, seed=0, choice=choice
    )
    assert sorted(29 - row for row in turned) == chosen
    if choice == "random":
        assert chosen != choose_anchors(ids, vectors, items, anchors=5, min_items=21, seed=1, choice=choice)


def test_nearest_equals_a_brute_force_search():
    rng = np.random.default_rng(1)
    users, anchors = (unit(rng.standard_normal((n, 8)).astype(np.float32)) for n in (20, 9))
    found = nearest(users, anchors, 4)
    cosines = users @ anchors.T
    np.testing.assert_array_equal(found.indices, np.argsort(-cosines, axis=1)[:, :4])
    np.testing.assert_allclose(found.similarities, np.sort(cosines, axis=1)[:, ::-1][:, :4], rtol=1e-5)
    with pytest.raises(ValueError, match="between 1 and"):
        nearest(users, anchors, 10)


def test_a_users_vector_is_the_mean_of_unit_item_vectors():
    encoder = Encoder()
    means = encoder.embed_users([["a film about robots", "a love story"], [], ["a war"]])
    items = unit(encoder.encode(["a film about robots", "a love story"]))
    np.testing.assert_allclose(means[0], items.mean(axis=0), atol=1e-5)
    assert not means[1].any()
    with pytest.raises(ValueError, match="no sentence encoder"):
        Encoder("/nowhere/at-all")
