"""The report's figures are those one computes by hand from the predictions, and its finding says what they say."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from mta_ray.evaluation.summary import ReportFacts, summarise
from mta_ray.evaluation.words import finding


def test_counts_and_order_of_methods(summary):
    assert (summary["users"], summary["few_shot_users"], summary["queries"], summary["anchors"]) == (4, 2, 8, 2)
    assert list(summary["methods"]) == ["non_personalised", "oppu", "mta", "zebra"]
    assert (summary["task"], summary["seconds"]["evaluate"], summary["peak_memory_mib"]) == (
        "movie_tagging",
        5.0,
        1234.0,
    )


def test_figures_are_those_computed_by_hand(summary):
    mta = summary["methods"]["mta"]
    assert (mta["accuracy"], mta["seven"]) == (5 / 8, 7.0)
    assert mta["gain"] == pytest.approx(5 / 8 - 3 / 8)
    assert mta["per_user"]["accuracy"] == pytest.approx((1 + 2 / 3 + 1 + 0) / 4)
    # gains of the users' own means: 1, 1/3, 1/2, -1/2
    assert mta["per_user"]["gain"] == pytest.approx((1 + 1 / 3 + 1 / 2 - 1 / 2) / 4)
    assert (mta["bytes_per_user"], mta["seconds_per_user"]) == (768.0, 0.5)
    assert summary["methods"]["zebra"]["bytes_per_user"] is None


def test_few_shot_users_stand_apart(summary):
    few, rest = summary["methods"]["mta"]["few_shot"], summary["methods"]["mta"]["rest"]
    assert (few["users"], few["queries"], rest["users"], rest["queries"]) == (2, 4, 2, 4)
    assert (few["accuracy"], rest["accuracy"]) == (3 / 4, 1 / 2)
    # few-shot gains: user a (1), user b (1, 0, 0); the resamples are aa = 1, ab = 1/2 and bb = 1/3
    assert few["gain"] == pytest.approx(1 / 2)
    assert few["ci95_of_gain"] == [pytest.approx(1 / 3), pytest.approx(1)]


def test_the_baseline_gains_nothing_over_itself(summary):
    base = summary["methods"]["non_personalised"]
    assert (base["gain"], base["ci95_of_gain"]) == (0.0, [0.0, 0.0])


def test_comparisons_are_paired(summary):
    assert set(summary["comparisons"]) == {"mta_vs_oppu"}
    pair = summary["comparisons"]["mta_vs_oppu"]
    # they differ in user a's one query alone
    assert pair["gain"] == pytest.approx(1 / 8)
    assert pair["rest"] == {"gain": 0.0, "ci95_of_gain": [0.0, 0.0]}
    assert pair["few_shot"]["gain"] == pytest.approx(1 / 4)


def test_where_lower_is_better_a_gain_is_still_positive():
    def error(said: list[str], golds: list[str]) -> dict[str, float]:
        return {"mae": float(np.mean([abs(int(p) - int(g)) for p, g in zip(said, golds, strict=True)]))}

    def ratings(method: str, given: list[int]) -> list[dict]:
        shared = {"method": method, "query_id": "0", "few_shot": True, "history_items": 3, "gold": "3"}
        return [
            shared | {"user_id": str(i), "prediction": str(rating), "score": -float(abs(rating - 3))}
            for i, rating in enumerate(given)
        ]

    frame = pd.DataFrame(ratings("mta", [3, 3, 4, 4]) + ratings("non_personalised", [1, 5, 1, 5]))
    facts = ReportFacts(title="t", task="product_rating", primary="mae", higher_is_better=False, anchors=1)
    summary = summarise(frame, facts, error)
    mta = summary["methods"]["mta"]
    assert (mta["mae"], mta["per_user"]["mae"], mta["gain"]) == (0.5, 0.5, 1.5)
    assert "mae, where lower is better, from 2.000 to 0.500 (gain +1.500" in finding(summary)


def test_a_primary_metric_that_is_no_mean_over_queries_is_not_passed_off_as_one(predictions, facts, metrics):
    def root(said: list[str], golds: list[str]) -> dict[str, float]:
        return {"accuracy": metrics(said, golds)["accuracy"] ** 0.5}

    per_user = summarise(predictions, facts, root, samples=10)["methods"]["mta"]["per_user"]
    assert "accuracy" not in per_user
    assert per_user["score"] == pytest.approx((1 + 2 / 3 + 1 + 0) / 4)


@pytest.mark.parametrize("group", ["few_shot", "rest"])
def test_a_group_without_users_is_counted_as_empty(predictions, facts, metrics, group):
    frame = predictions[predictions["few_shot"] == (group == "rest")]
    summary = summarise(frame, facts, metrics, samples=50)
    assert summary["methods"]["mta"][group] == {"users": 0, "queries": 0}
    assert summary["comparisons"]["mta_vs_oppu"][group] == {"gain": None, "ci95_of_gain": None}


def test_one_user_has_a_gain_and_no_interval(predictions, facts, metrics):
    summary = summarise(predictions[predictions["user_id"].str.endswith("b")], facts, metrics, samples=50)
    assert summary["methods"]["mta"]["few_shot"]["gain"] == pytest.approx(1 / 3)
    assert summary["methods"]["mta"]["few_shot"]["ci95_of_gain"] is None
    assert "cannot tell from not personalising" in finding(summary)


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (lambda good: good.drop(columns="score"), r"lack the columns \['score'\]"),
        (lambda good: good[good["method"] != "non_personalised"], "no rows of 'non_personalised'"),
        (lambda good: pd.concat([good, good.head(1)]), "1 predictions are there twice"),
        (lambda good: good.drop(index=0), "did not answer the same queries: 1 of"),
        (lambda good: good.assign(score=math.nan), "not finite|did not answer"),
        (lambda good: good.assign(few_shot=good["query_id"] == "0"), "3 users are few-shot in some rows"),
    ],
)
def test_broken_predictions_are_refused(predictions, facts, metrics, breaks, message):
    with pytest.raises(ValueError, match=message):
        summarise(breaks(predictions), facts, metrics)


def test_an_unknown_primary_metric_is_refused(predictions, facts, metrics):
    with pytest.raises(ValueError, match="'rouge_1' is not among them"):
        summarise(predictions, replace(facts, primary="rouge_1"), metrics)


def test_the_finding_says_what_the_numbers_say(summary):
    said = finding(summary)
    assert "On 2 few-shot users with 4 queries, mta takes accuracy from 0.250 to 0.750" in said
    assert "(gain +0.500 [+0.333, +1.000]), which is better than not personalising" in said
    assert "A user costs 768 B with mta and 295 KB with oppu." in said


def test_the_finding_does_not_praise_a_method_that_loses(predictions, facts, metrics):
    worse = predictions.replace({"method": {"mta": "non_personalised", "non_personalised": "mta"}})
    said = finding(summarise(worse, facts, metrics, samples=500))
    assert "which is worse than not personalising" in said
    assert "better than not personalising" not in said
