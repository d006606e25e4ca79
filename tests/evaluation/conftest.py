"""Four users' answers by four methods, small enough to compute every figure by hand, with hostile texts all over."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from mta_ray.evaluation.summary import Curve, MapPoint, Metrics, ReportFacts, summarise

HOSTILE = "<script>alert('u')</script>"


def accuracy(predictions: list[str], golds: list[str]) -> dict[str, float]:
    return {"accuracy": float(np.mean([p == g for p, g in zip(predictions, golds, strict=True)])), "seven": 7.0}


def answers(method: str, right: dict[str, str], *, few: str = "ab") -> list[dict]:
    """One row for each letter of each user's word: y is a right answer, n a wrong one."""
    return [
        {
            "method": method,
            "user_id": f"{HOSTILE}{user}",
            "query_id": str(i),
            "few_shot": user in few,
            "history_items": 4 if user in few else 40,
            "gold": "x",
            "prediction": "x" if letter == "y" else HOSTILE,
            "score": float(letter == "y"),
        }
        for user, word in right.items()
        for i, letter in enumerate(word)
    ]


# four users: a has one query, b three, c and d two
PREDICTIONS = pd.DataFrame(
    answers("mta", {"a": "y", "b": "yny", "c": "yy", "d": "nn"})
    + answers("zebra", {"a": "n", "b": "nnn", "c": "nn", "d": "nn"})
    + answers("oppu", {"a": "n", "b": "yny", "c": "yy", "d": "nn"})
    + answers("non_personalised", {"a": "n", "b": "nny", "c": "ny", "d": "yn"})
)

FACTS = ReportFacts(
    title=f"A title {HOSTILE}",
    task="movie_tagging",
    primary="accuracy",
    higher_is_better=True,
    anchors=2,
    bytes_per_user={"mta": 768.0, "oppu": 294912.0},
    seconds_per_user={"mta": 0.5},
    seconds={f"train {HOSTILE}": 10.0, "evaluate": 5.0},
    peak_memory_mib=1234.0,
    versions={"torch": "2.13.0"},
    settings={"bank": {"rank": 8}, HOSTILE: HOSTILE},
    curves=[Curve(f"bank/{HOSTILE}", range(500), np.linspace(2, 1, 500)), Curve("base", [1, 2], [math.nan, 1.0])],
    map_points=[
        MapPoint("anchor", 0.0, 0.0, 0),
        MapPoint("anchor", 1.0, 1.0, 1),
        MapPoint("user", 0.1, 0.1, 0),
        MapPoint("few_shot", 0.9, 0.8, 1),
        MapPoint("few_shot", 0.2, 0.0, 0),
    ],
)


@pytest.fixture
def hostile() -> str:
    return HOSTILE


@pytest.fixture
def predictions() -> pd.DataFrame:
    return PREDICTIONS.copy()


@pytest.fixture
def facts() -> ReportFacts:
    return FACTS


@pytest.fixture
def metrics() -> Metrics:
    return accuracy


@pytest.fixture
def summary() -> dict:
    return summarise(PREDICTIONS, FACTS, accuracy, samples=500)
