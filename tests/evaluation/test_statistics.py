"""The interval is the one that theory gives where theory knows it, and wider where users make queries alike."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest

from mta_ray.evaluation.statistics import bootstrap, holm, paired_bootstrap, paired_gains, sign_flip_p


def test_a_constant_gain_is_certain():
    interval = paired_bootstrap(["a", "b", "b", "c"], [0.25] * 4)
    assert (interval.mean, interval.low, interval.high) == (0.25, 0.25, 0.25)
    assert interval.excludes_zero


def test_normal_gains_give_the_interval_of_the_normal_law():
    users, sigma = 400, 0.5
    gains = np.random.default_rng(7).normal(0.1, sigma, users)
    interval = paired_bootstrap(np.arange(users), gains, samples=4000)
    half = 1.96 * gains.std() / math.sqrt(users)
    assert interval.mean == pytest.approx(gains.mean())
    # a percentile of 4000 samples is itself uncertain by about 4%
    assert interval.low == pytest.approx(gains.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(gains.mean() + half, abs=0.1 * half)


def test_two_users_against_all_their_resamples():
    # users x and y with gains (1, 1, 1) and (0): the only samples are xx, xy, yx, yy
    exact = {"query": [1, 3 / 4, 3 / 4, 0], "user": [1, 1 / 2, 1 / 2, 0]}
    for per, means in exact.items():
        interval = paired_bootstrap(["x", "x", "x", "y"], [1, 1, 1, 0], per=per)
        assert interval.mean == means[1]
        assert (interval.low, interval.high) == (min(means), max(means))


def test_three_unequal_users_against_the_exact_distribution():
    totals, sizes = [3.0, -1.0, 0.5], [4, 1, 2]
    means = [
        sum(totals[i] for i in drawn) / sum(sizes[i] for i in drawn) for drawn in itertools.product(range(3), repeat=3)
    ]
    low, high = np.percentile(means, [2.5, 97.5], method="inverted_cdf")
    ids = np.repeat(["a", "b", "c"], sizes)
    gains = np.concatenate([np.full(size, total / size) for total, size in zip(totals, sizes, strict=True)])
    interval = paired_bootstrap(ids, gains, samples=20000)
    assert (interval.low, interval.high) == (pytest.approx(low), pytest.approx(high))


def test_queries_of_one_user_are_not_independent_evidence():
    generator = np.random.default_rng(3)
    users, queries = 50, 20
    ids = np.repeat(np.arange(users), queries)
    gains = np.repeat(generator.normal(0, 1, users), queries) + generator.normal(0, 0.1, users * queries)
    clustered = paired_bootstrap(ids, gains)
    naive = paired_bootstrap(np.arange(len(gains)), gains)
    # all of a user's queries agree, so the interval is that of 50 values, sqrt(20) = 4.5 times wider
    ratio = (clustered.high - clustered.low) / (naive.high - naive.low)
    assert ratio == pytest.approx(math.sqrt(queries), rel=0.15)


def test_the_interval_holds_the_truth_about_19_times_in_20():
    generator = np.random.default_rng(11)
    hits = 0
    for trial in range(300):
        ids = np.repeat(np.arange(60), 3)
        gains = 0.2 + np.repeat(generator.normal(0, 0.5, 60), 3) + generator.normal(0, 0.5, 180)
        interval = paired_bootstrap(ids, gains, samples=400, seed=trial)
        hits += interval.low <= 0.2 <= interval.high
    assert 0.90 <= hits / 300 <= 0.98  # binomial: 0.95 ± 0.03, and percentile intervals are a little short


def test_the_same_seed_gives_the_same_interval_and_the_order_of_rows_changes_nothing():
    generator = np.random.default_rng(5)
    frame = pd.DataFrame({"user_id": generator.integers(30, size=200).astype(str), "gain": generator.normal(size=200)})
    shuffled = frame.sample(frac=1, random_state=1)
    first, again, mixed = (paired_bootstrap(f["user_id"], f["gain"]) for f in (frame, frame, shuffled))
    assert first == again
    assert (mixed.low, mixed.high) == (pytest.approx(first.low), pytest.approx(first.high))
    assert paired_bootstrap(frame["user_id"], frame["gain"], seed=1) != first


def test_one_user_has_a_mean_but_no_interval():
    interval = paired_bootstrap(["a", "a"], [1.0, 0.0])
    assert interval.mean == 0.5
    assert math.isnan(interval.low) and math.isnan(interval.high)
    assert not interval.excludes_zero


def test_bad_gains_are_refused():
    with pytest.raises(ValueError, match="at least 1 gain"):
        paired_bootstrap([], [])
    with pytest.raises(ValueError, match="2 gains for 1 user ids"):
        paired_bootstrap(["a"], [1.0, 2.0])
    with pytest.raises(ValueError, match="1 of 2 gains are not finite"):
        paired_bootstrap(["a", "b"], [1.0, float("nan")])


def rows(method: str, scores: dict[tuple[str, str], float]) -> list[dict]:
    return [{"method": method, "user_id": u, "query_id": q, "score": s} for (u, q), s in scores.items()]


def test_gains_are_paired_by_user_and_query_not_by_row():
    # both users have a query "1"; the second method's rows come in another order
    one = rows("mta", {("a", "1"): 1.0, ("a", "2"): 0.0, ("b", "1"): 0.5})
    other = rows("base", {("b", "1"): 0.25, ("a", "2"): 1.0, ("a", "1"): 0.0})
    gains = paired_gains(pd.DataFrame(one + other), "mta", "base")
    assert sorted(zip(gains["user_id"], gains["gain"], strict=True)) == [("a", -1.0), ("a", 1.0), ("b", 0.25)]


def test_unpaired_queries_are_refused():
    frame = pd.DataFrame(rows("mta", {("a", "1"): 1.0, ("a", "2"): 1.0}) + rows("base", {("a", "1"): 0.0}))
    with pytest.raises(ValueError, match="mta and base did not answer the same queries: 1 of 2"):
        paired_gains(frame, "mta", "base")


def test_columns_are_resampled_with_the_same_users_and_as_each_alone():
    generator = np.random.default_rng(2)
    owner, values = generator.permutation(np.arange(60) % 12), generator.normal(size=(60, 3))
    totals = np.stack([np.bincount(owner, weights=column) for column in values.T], axis=1)
    found = bootstrap(totals, np.bincount(owner).astype(float), samples=500, seed=4)
    for interval, column in zip(found, values.T, strict=True):
        # user ids of two digits, so that their order as text is that of the numbers
        alone = paired_bootstrap(owner + 10, column, samples=500, seed=4)
        assert (interval.mean, interval.low) == (pytest.approx(alone.mean), pytest.approx(alone.low))
    totals[:, 2] = totals[:, 0] + np.bincount(owner)  # the same, and 1 more in each query
    first, _, third = bootstrap(totals, np.bincount(owner).astype(float), samples=500)
    assert third.high - first.high == pytest.approx(1)


def test_sign_flips_against_all_of_them():
    values = np.array([0.5, 0.25, -0.125, 1.0, 0.0, 0.75, 0.3])
    flips = [abs(np.mean(values * signs)) for signs in itertools.product((1, -1), repeat=7)]
    exact = np.mean([flip >= abs(values.mean()) - 1e-9 for flip in flips])
    assert sign_flip_p(values) == pytest.approx(exact)
    assert sign_flip_p(-values) == pytest.approx(exact)
    assert sign_flip_p([0.0, 0.0]) == sign_flip_p([1.0]) == 1.0


def test_without_a_difference_one_p_value_in_twenty_is_below_a_twentieth():
    generator = np.random.default_rng(8)
    below = sum(sign_flip_p(generator.normal(size=30), samples=399, seed=trial) <= 0.05 for trial in range(400))
    assert 0.02 <= below / 400 <= 0.08  # binomial: 0.05 ± 0.03


def test_holm_by_hand():
    # sorted .005 x4, .01 x3, .03 x2, .04 x1 = .02, .03, .06, .04; none is below one before it
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.4, 0.9]) == pytest.approx([0.8, 0.9])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("per", ["query", "user"])
def test_users_who_are_one_person_over_again_are_drawn_together(per):
    """Everybody twice under other ids: as sure as once, and less sure than if they were others."""
    rng = np.random.default_rng(5)
    ids = np.repeat([f"u{n}" for n in range(12)], rng.integers(1, 5, size=12))
    gains = rng.normal(0.1, 1, size=len(ids))
    once = paired_bootstrap(ids, gains, per=per)
    twice = ([*ids, *(f"{i} again" for i in ids)], [*gains, *gains])
    told = paired_bootstrap(*twice, per=per, people=[*ids, *ids])
    assert (told.mean, told.low, told.high) == pytest.approx((once.mean, once.low, once.high))
    untold = paired_bootstrap(*twice, per=per)
    assert untold.high - untold.low < 0.85 * (once.high - once.low)
