"""A table of results in, the content of `report.json` out: every method's metrics, what it gains, and how sure that is.

People are the unit of all that is said of certainty: what is resampled, and whose signs are flipped, are users; those
who are one user over again are one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from mta_ray.comparison.results import (
    ALL,
    BASELINE,
    CHANCE_FREE,
    GROUPS,
    OURS,
    SPENT,
    budgets_in_order,
    check_results,
    in_order,
    is_ablation,
    label,
)
from mta_ray.evaluation.statistics import Interval, bootstrap, holm, interval_of, resampled, sign_flip_p
from mta_ray.lamp.leaks import Leaks
from mta_ray.lamp.metrics import score, score_of_terms, terms
from mta_ray.lamp.tasks import Task, task_named


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkFacts:
    """What the report says that is not in the results: JSON keeps it whole (`asdict`, `facts_of`)."""

    title: str = "Personalisation compared"
    """Heading of the report."""
    leaks: Mapping[str, Leaks] = field(default_factory=dict)
    """By data set."""
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """By data set, where it has labels of its own: macro F1 is over these."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the benchmark."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of the libraries."""


def facts_of(written: Mapping[str, Any]) -> BenchmarkFacts:
    """The facts from their JSON."""
    leaks = {name: Leaks(**counts) for name, counts in written.get("leaks", {}).items()}
    return BenchmarkFacts(**{**written, "leaks": leaks})


def judge(
    results: pd.DataFrame, costs: pd.DataFrame, facts: BenchmarkFacts, *, samples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """The content of `report.json`. Raises ValueError where methods have not answered the same questions.

    `results` has the columns of `RESULTS`, a row a prediction; `costs` those of `COSTS`, a row for each cell and group.
    `samples`: of the bootstrap.

    Semantics of a method's figures in a group of users:
      score            mean over seeds of each query's score first; then over queries, or over users of their means
      over_X           the same of the differences to X, query by query, over the seeds that both stand with
      metrics          LaMP's, of each seed's answers, then the mean over seeds; so too in each sample of people, but
                       for macro F1, which has no interval
      low, high        percentile 95% interval, people resampled with all their queries; what chance all of them share
                       (one draw of a bank) is not in it, but in the spread over seeds
      p                sign-flip test of people's differences to mta (the sum of their users' means), two-sided
      p_holm           p corrected over the methods of this data set, budget and group (ablations: over ablations)
    """
    check_results(results)
    named = results.assign(name=_labels(results))
    spent = costs.assign(name=_labels(costs))
    datasets = {
        str(name): _dataset(rows, spent[spent["dataset"] == name], facts, str(name), samples, seed)
        for name, rows in named.groupby("dataset", sort=True)
    }
    return {
        "title": facts.title,
        "samples": samples,
        "seed": seed,
        "datasets": datasets,
        "settings": dict(facts.settings),
        "versions": dict(facts.versions),
    }


def _labels(frame: pd.DataFrame) -> list[str]:
    return [label(method, bool(rag)) for method, rag in zip(frame["method"], frame["rag"], strict=True)]


def _dataset(
    rows: pd.DataFrame, spent: pd.DataFrame, facts: BenchmarkFacts, name: str, samples: int, seed: int
) -> dict[str, Any]:
    task = task_named(str(rows["task"].iloc[0]))
    users = rows.drop_duplicates("user_id")
    questions = rows.drop_duplicates(["user_id", "query_id"])
    measure = _Metrics(task, tuple(facts.labels.get(name, ())) or None)
    budgets: dict[str, Any] = {}
    for budget in budgets_in_order(rows["budget"].unique()):
        here = spent[spent["budget"] == budget]
        budgets[budget] = _methods(rows[rows["budget"] == budget], here, measure, samples, seed)
    whole = budgets.get(ALL, {})
    alike = _with_seeds_of_budgets(rows)
    fair = rows[[seed in alike.get(name, ()) for name, seed in zip(rows["name"], rows["seed"], strict=True)]]
    return {
        "task": task.name,
        "lamp_id": task.lamp_id,
        "primary": task.primary_metric,
        "metrics": list(task.metrics),
        "higher_is_better": task.higher_is_better,
        "users": len(users),
        "few_shot_users": int(users["few_shot"].sum()),
        "queries": len(questions),
        "few_shot_queries": int(questions["few_shot"].sum()),
        "seeds": sorted(int(number) for number in rows["seed"].unique()),
        "leaks": asdict(facts.leaks[name]) if name in facts.leaks else None,
        "budgets": {
            budget: {method: figures for method, figures in methods.items() if not is_ablation(method)}
            for budget, methods in budgets.items()
        },
        "curves": {
            budget: _methods(fair[fair["budget"] == budget], spent[spent["budget"] == budget], measure, samples, seed)
            for budget in budgets
            if alike
        },
        "ablations": {method: figures for method, figures in whole.items() if is_ablation(method)},
    }


def _with_seeds_of_budgets(rows: pd.DataFrame) -> dict[str, set[int]]:
    """The methods that stand at several budgets, and the seeds that each has at all of these: what a curve is of."""
    found: dict[str, set[int]] = {}
    for name, own in rows.groupby("name", sort=True):
        seeds = [set(each) for _, each in own.groupby("budget")["seed"]]
        if len(seeds) > 1 and (common := set.intersection(*seeds)):
            found[str(name)] = common
    return found


def _methods(
    rows: pd.DataFrame, spent: pd.DataFrame, measure: _Metrics, samples: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Every method at one budget: its figures for each group that has users, and its costs."""
    names = in_order(rows["name"].unique())
    methods: dict[str, dict[str, Any]] = {}
    for name in names:
        own = rows[rows["name"] == name]
        methods[name] = {
            "method": str(own["method"].iloc[0]),
            "rag": bool(own["rag"].iloc[0]),
            "seeds": sorted(int(number) for number in own["seed"].unique()),
        }
    few = rows["few_shot"].astype(bool)
    for group, mask in zip(GROUPS, (few, ~few, few | True), strict=True):
        if mask.any():
            figures = _figures(rows[mask], names, measure, samples, seed)
            here = spent[spent["group"] == group]
            for name in names:
                means = here.loc[here["name"] == name, list(SPENT)].mean()
                costs = {cost: _plain(value) for cost, value in means.items()}
                methods[name][group] = figures[name] | {"costs": costs}
    return methods


def _figures(
    rows: pd.DataFrame, names: Sequence[str], measure: _Metrics, samples: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Every method's figures on one group of users."""
    # 1. a column a method, a row a query, users in the order of their ids: means over seeds first
    by_seed = rows.pivot(index=["user_id", "query_id"], columns=["name", "seed"], values="score").sort_index()
    seeds = {name: list(by_seed[name].columns) for name in names}
    columns: dict[tuple[str, str], np.ndarray] = {}
    for name in names:
        columns[name, "score"] = by_seed[name].mean(axis=1).to_numpy()
        for other in (BASELINE, OURS):
            if other in seeds:
                # One bank and one draw for both where both have chance in them: else its noise would be in between.
                shared = [number for number in seeds[other] if number in seeds[name]]
                is_free = name in CHANCE_FREE or other in CHANCE_FREE or not shared
                over = by_seed[other][seeds[other] if is_free else shared].mean(axis=1).to_numpy()
                mine = by_seed[name][seeds[name] if is_free else shared].mean(axis=1).to_numpy()
                columns[name, f"over_{other}"] = mine - over

    # 2. sums over each user's queries, then over the users who are one person
    values = np.stack(list(columns.values()), axis=1)  # (queries, columns)
    owner, users = pd.factorize(by_seed.index.get_level_values("user_id"), sort=True)
    person = pd.factorize(rows.drop_duplicates("user_id").set_index("user_id")["person"].reindex(users), sort=True)[0]
    totals, counts = _sums(values, owner), np.bincount(owner).astype(np.float64)
    means = _sums(totals / counts[:, None], person)
    users_of = np.bincount(person).astype(np.float64)

    # 3. intervals, for all columns with the same draws of people
    per_query = bootstrap(_sums(totals, person), np.bincount(person, weights=counts), samples=samples, seed=seed)
    per_user = bootstrap(means, users_of, samples=samples, seed=seed)
    sizes = {"users": len(users), "people": len(users_of), "queries": len(values)}
    found: dict[str, dict[str, Any]] = {name: {**sizes, "per_query": {}, "per_user": {}} for name in names}
    for place, (name, what) in enumerate(columns):
        found[name]["per_query"][what] = _interval(per_query[place])
        found[name]["per_user"][what] = _interval(per_user[place])

    # 4. tests against mta, corrected within each family
    tested = [name for name in names if (name, f"over_{OURS}") in columns and name not in (OURS, "oracle")]
    place_of = {key: place for place, key in enumerate(columns)}
    for family in ([n for n in tested if not is_ablation(n)], [n for n in tested if is_ablation(n)]):
        p_values = [sign_flip_p(means[:, place_of[name, f"over_{OURS}"]], seed=seed) for name in family]
        for name, p, corrected in zip(family, p_values, holm(p_values), strict=True):
            found[name] |= {"p": p, "p_holm": corrected}

    # 5. LaMP's metrics of each seed's answers: their mean, their spread, and the mean's intervals
    person_of = pd.Series(person, index=users)
    for name, answers in rows.groupby("name", sort=True):
        by = [own for _, own in answers.groupby("seed", sort=True)]
        metrics = pd.DataFrame([measure(own) for own in by])
        of_samples = measure.of_samples([(own, person_of[own["user_id"]].to_numpy()) for own in by], samples, seed)
        figures = found[str(name)]
        figures["metrics"] = {metric: float(value) for metric, value in metrics.mean().items()}
        figures["spread_over_seeds"] = {metric: _plain(value) for metric, value in metrics.std(ddof=1).items()}
        figures["metric_intervals"] = {
            metric: _interval(interval_of(value, of_samples.get(metric, np.array([math.nan]))))
            for metric, value in figures["metrics"].items()
        }
    return found


def _sums(values: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """(owners, columns) of (rows, columns)."""
    sums = np.zeros((int(owner.max()) + 1, values.shape[1]))
    np.add.at(sums, owner, values)
    return sums


class _Metrics:
    """LaMP's metrics of a table of answers. A text's metrics are means over queries: each pair is scored once."""

    def __init__(self, task: Task, labels: tuple[str, ...] | None) -> None:
        self.task, self.labels = task, labels
        self.known: dict[tuple[str, str], np.ndarray] = {}

    def __call__(self, answers: pd.DataFrame) -> dict[str, float]:
        if self.task.kind != "text":
            return score(self.task, answers["prediction"].tolist(), answers["gold"].tolist(), self.labels)
        return dict(zip(self.task.metrics, self._terms(answers).mean(axis=0).tolist(), strict=True))

    def of_samples(
        self, seeds: Sequence[tuple[pd.DataFrame, np.ndarray]], samples: int, draw: int
    ) -> dict[str, np.ndarray]:
        """Metric to its mean over seeds in each sample of people; of each seed, the answers and each one's person.

        Without macro F1; see `score_of_terms`.
        """
        sums = [_sums(self._terms(answers), person) for answers, person in seeds]
        queries = np.bincount(seeds[0][1]).astype(np.float64)
        if len(queries) < 2:  # one says nothing about others
            return dict.fromkeys(self.task.metrics, np.array([math.nan]))
        drawn = resampled(np.column_stack([queries, *sums]), samples=samples, seed=draw)
        parts = np.split(drawn[:, 1:], len(seeds), axis=1)
        found = [score_of_terms(self.task, part, drawn[:, 0]) for part in parts]
        return {metric: np.mean([each[metric] for each in found], axis=0) for metric in found[0]}

    def _terms(self, answers: pd.DataFrame) -> np.ndarray:
        said, golds = answers["prediction"].tolist(), answers["gold"].tolist()
        if self.task.kind != "text":
            return terms(self.task, said, golds, self.labels)
        for pair in set(zip(said, golds, strict=True)) - self.known.keys():
            self.known[pair] = terms(self.task, [pair[0]], [pair[1]])[0]
        return np.array([self.known[pair] for pair in zip(said, golds, strict=True)])


def _interval(interval: Interval) -> dict[str, float | None]:
    return {"mean": interval.mean, "low": _plain(interval.low), "high": _plain(interval.high)}


def _plain(value: Any) -> float | None:
    """A number for JSON, which knows no NaN."""
    return float(value) if math.isfinite(value) else None
