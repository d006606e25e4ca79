"""The figures are those of a slow reading of the same table, one method and one seed at a time."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
from benchmark_rows import made_results

from mta_ray.comparison.judge import facts_of, judge
from mta_ray.comparison.results import assert_same_questions, budgets_in_order, in_order, label
from mta_ray.evaluation.statistics import holm, paired_bootstrap, paired_gains, sign_flip_p
from mta_ray.lamp.metrics import score
from mta_ray.lamp.tasks import task_named


@pytest.fixture(scope="module")
def judged(results, costs, facts):
    return judge(results, costs, facts, samples=300, seed=3)


def seed_means(results: pd.DataFrame, method: str, rag: bool, seeds: tuple[int, ...]) -> pd.DataFrame:
    """Movies, whole history: each query's mean score over these seeds."""
    rows = results[
        (results["dataset"] == "movies")
        & (results["budget"] == "all")
        & (results["method"] == method)
        & (results["rag"] == rag)
        & results["seed"].isin(seeds)
    ]
    assert set(rows["seed"]) == set(seeds)
    return rows.groupby(["user_id", "query_id", "few_shot"], as_index=False)["score"].mean()


def slow_gain(results: pd.DataFrame, one: tuple, other: tuple, *, few: bool, per: str):
    pair = pd.concat([seed_means(results, *one).assign(method="one"), seed_means(results, *other).assign(method="two")])
    gains = paired_gains(pair[pair["few_shot"]] if few else pair, "one", "two")
    return gains, paired_bootstrap(gains["user_id"], gains["gain"], samples=300, seed=3, per=per)


@pytest.mark.parametrize(
    ("name", "one", "other", "over"),
    [
        # against a method without chance all seeds count; else those that both have
        ("mta", ("mta", False, (0, 1, 2)), ("non_personalised", False, (0,)), "over_non_personalised"),
        ("rag", ("rag", True, (0,)), ("mta", False, (0, 1, 2)), "over_mta"),
        ("mta+rag", ("mta", True, (0,)), ("mta", False, (0,)), "over_mta"),
        ("zebra", ("zebra", False, (0, 1, 2)), ("mta", False, (0, 1, 2)), "over_mta"),
        ("mta:k=1", ("mta:k=1", False, (1,)), ("mta", False, (1,)), "over_mta"),
    ],
)
@pytest.mark.parametrize("per", ["query", "user"])
def test_intervals_are_those_of_the_paired_bootstrap(results, judged, name, one, other, over, per):
    movies = judged["datasets"]["movies"]
    entry = (movies["budgets"]["all"] | movies["ablations"])[name]
    for group in ("few_shot", "all"):
        _, interval = slow_gain(results, one, other, few=group == "few_shot", per=per)
        found = entry[group][f"per_{per}"][over]
        assert found == {
            "mean": pytest.approx(interval.mean),
            "low": pytest.approx(interval.low),
            "high": pytest.approx(interval.high),
        }


def test_p_values_are_of_users_and_corrected_over_the_methods_of_a_budget(results, judged):
    movies = judged["datasets"]["movies"]
    ways = {
        "non_personalised": ("non_personalised", False, (0,)),
        "rag": ("rag", True, (0,)),
        "mta+rag": ("mta", True, (0,)),
        "zebra": ("zebra", False, (0, 1, 2)),
    }
    p_values = []
    for one in ways.values():
        seeds = (0,) if one[0] == "mta" else (0, 1, 2)
        gains, _ = slow_gain(results, one, ("mta", False, seeds), few=False, per="user")
        p_values.append(sign_flip_p(gains.groupby("user_id")["gain"].mean().to_numpy()))
    whole = movies["budgets"]["all"]
    assert [whole[name]["all"]["p"] for name in ways] == pytest.approx(p_values)
    assert [whole[name]["all"]["p_holm"] for name in ways] == pytest.approx(holm(p_values))
    # an ablation is a family of its own, and nobody is tested against the oracle or itself
    alone = movies["ablations"]["mta:k=1"]["all"]
    assert alone["p"] == alone["p_holm"]
    assert "p" not in whole["mta"]["all"] and "p" not in whole["oracle"]["all"]


def test_metrics_are_lamps_of_each_seed(results, judged):
    for dataset, metrics in (("movies", ("accuracy", "f1_macro")), ("ratings", ("mae", "rmse"))):
        rows = results[
            (results["dataset"] == dataset)
            & (results["method"] == "mta")
            & ~results["rag"]
            & (results["budget"] == "2")
            & results["few_shot"]
        ]
        values = [
            score(task_named(own["task"].iloc[0]), own["prediction"].tolist(), own["gold"].tolist())
            for _, own in rows.groupby("seed")
        ]
        figures = judged["datasets"][dataset]["budgets"]["2"]["mta"]["few_shot"]
        for metric in metrics:
            own = [value[metric] for value in values]
            assert figures["metrics"][metric] == pytest.approx(np.mean(own))
            assert figures["spread_over_seeds"][metric] == pytest.approx(np.std(own, ddof=1))
    assert judged["datasets"]["ratings"]["budgets"]["all"]["oracle"]["all"]["metrics"] == {"mae": 0, "rmse": 0}


def test_intervals_of_metrics_are_of_people_drawn_with_all_their_queries(results, judged):
    """Every sample written out: its people's answers scored by LaMP's metrics, seed by seed."""
    for dataset in ("movies", "ratings"):
        found = judged["datasets"][dataset]["budgets"]["all"]["mta"]["all"]
        rows = results[(results["dataset"] == dataset) & (results["method"] == "mta") & ~results["rag"]]
        rows = rows[rows["budget"] == "all"]
        task, people = task_named(rows["task"].iloc[0]), sorted(set(rows["person"]))
        of_person = dict(list(rows.groupby("person")))
        drawn = []
        for sample in np.random.default_rng(3).integers(len(people), size=(300, len(people))):
            answers = pd.concat([of_person[people[place]] for place in sample])
            scores = [
                score(task, own["prediction"].tolist(), own["gold"].tolist()) for _, own in answers.groupby("seed")
            ]
            drawn.append(pd.DataFrame(scores).mean())
        ends = pd.DataFrame(drawn).quantile([0.025, 0.975])
        for metric, interval in found["metric_intervals"].items():
            assert interval["mean"] == found["metrics"][metric]
            if metric == "f1_macro":  # samples of people lack labels, so that it would lie below its own mean
                assert interval["low"] is interval["high"] is None
                continue
            assert [interval["low"], interval["high"]] == pytest.approx(ends[metric].tolist())
            assert interval["low"] < interval["mean"] < interval["high"]


def test_a_curve_over_budgets_is_of_the_same_seeds_all_along(results, costs, facts, judged):
    few = results[(results["budget"] == "all") | (results["seed"] == 0)]  # mta has seeds 1 and 2 with all items only
    movies = judge(few, costs, facts, samples=20)["datasets"]["movies"]
    assert sorted(movies["curves"]["all"]) == ["mta", "non_personalised"]
    rows = results[(results["dataset"] == "movies") & (results["method"] == "mta") & ~results["rag"]]
    rows = rows[(rows["budget"] == "all") & (rows["seed"] == 0)]
    wanted = score(task_named("movie_tagging"), rows["prediction"].tolist(), rows["gold"].tolist())
    assert movies["curves"]["all"]["mta"]["all"]["metrics"] == pytest.approx(wanted)
    assert movies["budgets"]["all"]["mta"]["all"]["metrics"] != pytest.approx(wanted)
    # with the same seeds everywhere nothing is left out
    whole = judged["datasets"]["movies"]
    assert whole["curves"]["all"]["mta"]["all"]["metrics"] == whole["budgets"]["all"]["mta"]["all"]["metrics"]


def test_a_texts_metrics_are_lamps():
    headlines = made_results("news", "news_headline", 3)
    spent = headlines[["dataset", "method", "rag", "budget", "seed"]].drop_duplicates()
    none = dict.fromkeys(("bytes_per_user", "seconds_per_user", "training_device_seconds"), 0.0)
    spent = spent.assign(**none, bank_device_seconds=0.0, decode_tokens_per_s=1.0, group="rest")
    found = judge(headlines, spent, facts_of({}), samples=20)["datasets"]["news"]["budgets"]["all"]["zebra"]["rest"]
    rows = headlines[(headlines["method"] == "zebra") & ~headlines["few_shot"]]
    wanted = score(task_named("news_headline"), rows["prediction"].tolist(), rows["gold"].tolist())
    # three seeds with as many rows each, so the mean of their means is that of all
    assert found["metrics"] == pytest.approx(wanted)


def test_labels_of_the_data_set_are_those_of_its_f1(results, costs, facts, judged):
    tags = list(dict.fromkeys(results.loc[results["dataset"] == "movies", "gold"]))
    oracle = results[(results["dataset"] == "movies") & results["method"].isin(["oracle", "non_personalised"])]
    few = judge(oracle, costs, facts_of({"labels": {"movies": tags}}), samples=20)["datasets"]["movies"]
    f1 = [
        found["budgets"]["all"]["oracle"]["all"]["metrics"]["f1_macro"] for found in (few, judged["datasets"]["movies"])
    ]
    assert f1 == pytest.approx([1.0, len(tags) / len(task_named("movie_tagging").labels)])


def test_costs_are_means_over_seeds_and_all_of_it_is_json(judged, facts):
    movies = judged["datasets"]["movies"]
    mta = movies["budgets"]["all"]["mta"]
    assert [mta[group]["costs"]["bytes_per_user"] for group in ("few_shot", "rest", "all")] == [4001.0, 4101.0, 4201.0]
    assert mta["all"]["costs"]["decode_tokens_per_s"] is None
    assert (movies["users"], movies["few_shot_users"], movies["queries"], movies["seeds"]) == (9, 5, 18, [0, 1, 2])
    assert movies["leaks"]["kinds"]["teacher_profile"] == 2 and judged["datasets"]["ratings"]["leaks"] is None
    assert json.loads(json.dumps(judged, allow_nan=False)) == judged
    assert facts_of(json.loads(json.dumps(asdict(facts)))) == facts


def test_the_order_of_rows_changes_nothing(results, costs, facts, judged):
    assert judge(results.sample(frac=1, random_state=1), costs, facts, samples=300, seed=3) == judged


def test_users_who_are_one_user_over_again_make_nothing_surer(results, costs, facts, judged):
    """Everybody stands there twice: the same figures, intervals and tests, over as many people."""
    twins = results.assign(user_id=results["user_id"] + " again", query_id=results["query_id"] + " again")
    found = judge(pd.concat([results, twins], ignore_index=True), costs, facts, samples=300, seed=3)
    for name, entry in found["datasets"]["movies"]["budgets"]["all"].items():
        once = judged["datasets"]["movies"]["budgets"]["all"][name]
        for group in ("few_shot", "all"):
            assert entry[group]["users"] == 2 * once[group]["users"]
            assert entry[group]["people"] == once[group]["people"] == once[group]["users"]
            for per in ("per_query", "per_user"):
                for what, interval in once[group][per].items():
                    assert entry[group][per][what] == pytest.approx(interval)
            assert entry[group].get("p") == pytest.approx(once[group].get("p"))


def test_one_user_has_figures_but_no_interval(results, costs, facts):
    one = results[results["user_id"] == results["user_id"].iloc[0]]
    found = judge(one, costs, facts, samples=20)["datasets"]["movies"]["budgets"]["all"]["zebra"]
    assert found["few_shot"]["per_user"]["over_mta"]["low"] is None and found["few_shot"]["p_holm"] == 1
    assert "rest" not in found


def changed(results: pd.DataFrame, column: str, value) -> pd.DataFrame:
    frame = results.copy()
    frame.loc[frame.index[-1], column] = value
    return frame


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.iloc[:-1], "mta:k=1, budget all, seed 1 has 17 answers to 17 of 18 questions"),
        (lambda r: pd.concat([r, r.tail(1)]), "has 19 answers to 18 of 18 questions"),
        (lambda r: changed(r, "prompt_hash", "0"), "prompt_hash is not one for the same user_id and query_id"),
        (lambda r: changed(r, "gold", "2"), "gold is not one"),
        (lambda r: changed(r, "few_shot", True), "few_shot is not one for the same user_id"),
        (lambda r: changed(r, "person", "x"), "person is not one for the same user_id"),
        (lambda r: changed(r, "history_items", 3), "history_items is not one for the same user_id and budget"),
        (lambda r: changed(r, "user_id", "somebody"), "questions"),
    ],
)
def test_methods_that_were_not_asked_the_same_are_refused(results, change, message):
    assert_same_questions(results)
    with pytest.raises(ValueError, match=message):
        assert_same_questions(change(results))


def test_a_table_that_cannot_be_judged_is_refused(results, costs, facts):
    for frame, message in (
        (results.drop(columns="gold"), r"lack the columns \['gold'\]"),
        (results.head(0), "hold no row"),
        (changed(results, "score", float("nan")), "1 of .* scores are not finite"),
        (results[results["method"] != "non_personalised"], "no rows of 'non_personalised'"),
        (changed(results, "task", "citation"), "several tasks"),
    ):
        with pytest.raises(ValueError, match=message):
            judge(frame, costs, facts)


def test_names_and_their_order():
    assert [label("mta", True), label("mta", False), label("non_personalised", True), label("rag", True)] == [
        "mta+rag", "mta", "rag", "rag",
    ]  # fmt: skip
    assert in_order(["zebra", "oracle", "mta+rag", "mta", "rag"]) == ["rag", "mta", "mta+rag", "oracle", "zebra"]
    assert budgets_in_order(["all", "10", "2", "0"]) == ["0", "2", "10", "all"]
