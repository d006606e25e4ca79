"""From a table of predictions to the content of `report.json`: every method's metrics and what they gain.

What enters is one row for each method and query, and the facts of the run; what the metrics are is the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import pandas as pd

from mta_ray.evaluation.statistics import Interval, paired_bootstrap, paired_gains
from mta_ray.lamp.leaks import Leaks

BASELINE = "non_personalised"
"""The method that every gain is measured against."""

METHODS = {
    "non_personalised": "the base model, the same for everybody",
    "majority_label": "control: the user's most frequent answer",
    "nearest_item": "control: the answer to the most similar history item",
    "rag": "base model, similar history items in the prompt",
    "oppu": "one LoRA per user, trained on the history",
    "nearest_anchor": "the most similar anchor's LoRA",
    "mta_fusion": "nearest anchors' LoRAs, merged by similarity",
    "mta": "merged, then a small stack trained on the history",
    "as_released": "fusion as in the paper's released code",
    "oracle": "the best possible answer (simulated users)",
}
"""Method names in the order of every table, each in a few words; any other method comes after these."""

COMPARISONS = (
    ("mta", "mta_fusion"),
    ("mta", "oppu"),
    ("mta", "rag"),
    ("mta", "majority_label"),
    ("mta", "nearest_item"),
    ("mta_fusion", "nearest_anchor"),
    ("mta_fusion", "as_released"),
)
"""Pairs (method, over) whose paired difference is in the report."""

GROUPS = {"few_shot": "few-shot users", "rest": "the rest"}
"""Groups of users that stand apart in every report, and what a reader calls them."""

COLUMNS = ("method", "user_id", "query_id", "few_shot", "history_items", "gold", "prediction", "score")

Metrics = Callable[[list[str], list[str]], dict[str, float]]
"""(predictions, golds) -> metric name -> value."""


class Curve(NamedTuple):
    """One training loss over steps. Curves named "panel/line" share a panel."""

    name: str
    steps: Sequence[int]
    losses: Sequence[float]


class MapPoint(NamedTuple):
    """Somebody's place on the map of embeddings."""

    kind: str
    """"user", "few_shot" or "anchor"."""
    x: float
    y: float
    anchor_index: int
    """The anchor that serves a user most; an anchor's own index; -1: none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportFacts:
    """What a report says that is not in the predictions."""

    title: str
    task: str
    primary: str
    """Name of the metric shown first; one of those that the metrics function returns."""
    higher_is_better: bool
    """Whether a higher `primary` is better; `score` in the predictions is always better when higher."""
    anchors: int
    bytes_per_user: dict[str, float | int] = field(default_factory=dict)
    """Method -> bytes kept for one user."""
    seconds_per_user: dict[str, float | int] = field(default_factory=dict)
    """Method -> seconds to personalise for one user."""
    seconds: dict[str, float | int] = field(default_factory=dict)
    """Stage -> seconds."""
    peak_memory_mib: float | int = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    leaks: Leaks | None = None
    """What of the tested users' questions is known elsewhere; none: nobody looked."""
    curves: Sequence[Curve] = ()
    map_points: Sequence[MapPoint] = ()


def summarise(
    predictions: pd.DataFrame, facts: ReportFacts, metrics: Metrics, *, samples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """The content of `report.json`: every method's metrics and gains, for all, for few-shot users and for the rest."""
    _check(predictions)
    few = predictions["few_shot"].astype(bool)
    groups = {"few_shot": predictions[few], "rest": predictions[~few]}
    names = _in_order(predictions["method"].unique().tolist())

    methods: dict[str, Any] = {}
    for name in names:
        methods[name] = _figures(predictions, name, facts, metrics, samples, seed)
        for group, rows in groups.items():
            methods[name][group] = _figures(rows, name, facts, metrics, samples, seed)
        methods[name]["bytes_per_user"] = facts.bytes_per_user.get(name)
        methods[name]["seconds_per_user"] = facts.seconds_per_user.get(name)

    comparisons = {}
    for name, over in COMPARISONS:
        if name in names and over in names:
            entry = _gain(predictions, name, over, samples, seed)
            entry |= {group: _gain(rows, name, over, samples, seed) for group, rows in groups.items()}
            comparisons[f"{name}_vs_{over}"] = entry

    return {
        "title": facts.title,
        "task": facts.task,
        "primary": facts.primary,
        "higher_is_better": facts.higher_is_better,
        "users": predictions["user_id"].nunique(),
        "few_shot_users": groups["few_shot"]["user_id"].nunique(),
        "queries": int((predictions["method"] == BASELINE).sum()),
        "anchors": facts.anchors,
        "methods": methods,
        "comparisons": comparisons,
        "seconds": facts.seconds,
        "peak_memory_mib": facts.peak_memory_mib,
        "versions": facts.versions,
        "settings": facts.settings,
        "leaks": asdict(facts.leaks) if facts.leaks else None,
    }


def _check(predictions: pd.DataFrame) -> None:
    missing = [name for name in COLUMNS if name not in predictions.columns]
    if missing:
        raise ValueError(f"predictions lack the columns {missing}; got {list(predictions.columns)}")
    if BASELINE not in set(predictions["method"]):
        raise ValueError(f"predictions hold no rows of {BASELINE!r}, which gains are measured against; evaluate it too")
    twice = int(predictions.duplicated(["method", "user_id", "query_id"]).sum())
    if twice:
        raise ValueError(f"{twice} predictions are there twice for the same method, user and query; keep one of each")
    torn = int((predictions.groupby("user_id")["few_shot"].nunique() > 1).sum())
    if torn:
        raise ValueError(f"{torn} users are few-shot in some rows and not in others; few_shot belongs to the user")


def _in_order(names: Sequence[str]) -> list[str]:
    known = [name for name in METHODS if name in set(names)]
    return known + sorted(name for name in names if name not in METHODS)


def _figures(
    frame: pd.DataFrame, method: str, facts: ReportFacts, metrics: Metrics, samples: int, seed: int
) -> dict[str, Any]:
    """One method on one group of users; only counts where the group is empty."""
    rows = frame[frame["method"] == method]
    counts = {"users": rows["user_id"].nunique(), "queries": len(rows)}
    if not len(rows):
        return counts
    values = {name: float(v) for name, v in metrics(rows["prediction"].tolist(), rows["gold"].tolist()).items()}
    if facts.primary not in values:
        raise ValueError(f"the metrics are {sorted(values)}, the primary one {facts.primary!r} is not among them")
    per_user = _gain(frame, method, BASELINE, samples, seed, per="user")
    # A query's score is the primary metric of that query, except for metrics that are no mean over queries (F1, RMSE).
    sign = 1.0 if facts.higher_is_better else -1.0
    is_mean = math.isclose(values[facts.primary], sign * rows["score"].mean(), abs_tol=1e-6)
    user_mean = float(rows.groupby("user_id")["score"].mean().mean())
    per_user[facts.primary if is_mean else "score"] = sign * user_mean if is_mean else user_mean
    return values | _gain(frame, method, BASELINE, samples, seed) | {"per_user": per_user} | counts


def _gain(frame: pd.DataFrame, method: str, over: str, samples: int, seed: int, per: Any = "query") -> dict[str, Any]:
    gains = paired_gains(frame, method, over)
    if not len(gains):
        return {"gain": None, "ci95_of_gain": None}
    people = None
    if "person" in frame:
        people = gains["user_id"].map(frame.drop_duplicates("user_id").set_index("user_id")["person"])
    interval: Interval = paired_bootstrap(
        gains["user_id"], gains["gain"], samples=samples, seed=seed, per=per, people=people
    )
    ends = None if math.isnan(interval.low) else [interval.low, interval.high]
    return {"gain": interval.mean, "ci95_of_gain": ends}
