"""Predictions and golds in, LaMP's scores out: over a list, as LaMP has them, and per query, where higher is better.

And as sums over queries, for whoever scores the same queries in many samples.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from functools import cache

import numpy as np
from jaxtyping import Float
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error, root_mean_squared_error

from mta_ray.lamp.tasks import Task, distinct_labels, normalise_label

__all__ = ["normalise_label", "query_score", "score", "score_of_terms", "terms"]

log = logging.getLogger(__name__)

_UNKNOWN = -1
"""The class of an output that is none of the labels: never right, and no class that F1 averages over."""


def score(
    task: Task, predictions: Sequence[str], golds: Sequence[str], labels: Sequence[str] | None = None
) -> dict[str, float]:
    """The task's metrics over all queries. `labels` is the data set's own list where it differs from the task's."""
    if len(predictions) != len(golds) or not golds:
        raise ValueError(f"{task.name}: {len(predictions)} predictions for {len(golds)} golds; give one for each gold")
    names = tuple(labels or task.labels)

    if task.kind == "label":
        numbers = _numbers(names)
        truth = [_class_of_gold(task, gold, numbers) for gold in golds]
        guess = [numbers.get(normalise_label(text), _UNKNOWN) for text in predictions]
        f1 = f1_score(truth, guess, labels=sorted(set(numbers.values())), average="macro", zero_division=0)
        values = (accuracy_score(truth, guess), f1)
    elif task.kind == "rating":
        truths = [_rating_of_gold(task, gold) for gold in golds]
        ratings = [_rating(text, truth, names) for text, truth in zip(predictions, truths, strict=True)]
        values = (mean_absolute_error(truths, ratings), root_mean_squared_error(truths, ratings))
    else:
        if any(_ROUGE_WORD.search(gold) is None for gold in golds):
            _warn_of_wordless(task.name)
        rouges = [_rouge().score(gold, text) for text, gold in zip(predictions, golds, strict=True)]
        values = tuple(sum(r[name].fmeasure for r in rouges) / len(rouges) for name in ("rouge1", "rougeL"))
    return {name: float(value) for name, value in zip(task.metrics, values, strict=True)}


def query_score(task: Task, prediction: str, gold: str, labels: Sequence[str] | None = None) -> float:
    """One query's score, higher is better: right 1 or wrong 0; minus the absolute error; ROUGE-1 F."""
    names = tuple(labels or task.labels)
    if task.kind == "label":
        numbers = _numbers(names)
        return float(numbers.get(normalise_label(prediction), _UNKNOWN) == _class_of_gold(task, gold, numbers))
    if task.kind == "rating":
        truth = _rating_of_gold(task, gold)
        return -abs(_rating(prediction, truth, names) - truth)
    return float(_rouge().score(gold, prediction)["rouge1"].fmeasure)


def terms(
    task: Task, predictions: Sequence[str], golds: Sequence[str], labels: Sequence[str] | None = None
) -> Float[np.ndarray, "queries terms"]:
    """What each query adds to the sums that metrics are functions of, those that `score_of_terms` has.

    Labels: right or not. Ratings: the absolute error and its square. Texts: both ROUGE F-measures.
    """
    if task.kind == "text":
        found = [_rouge().score(gold, text) for text, gold in zip(predictions, golds, strict=True)]
        return np.array([[r["rouge1"].fmeasure, r["rougeL"].fmeasure] for r in found], np.float64).reshape(-1, 2)
    pairs = zip(predictions, golds, strict=True)
    scores = np.array([query_score(task, text, gold, labels) for text, gold in pairs], np.float64)
    return np.stack([-scores, scores**2], axis=1) if task.kind == "rating" else scores[:, None]


def score_of_terms(
    task: Task, sums: Float[np.ndarray, "*samples terms"], queries: Float[np.ndarray, "*samples"]
) -> dict[str, Float[np.ndarray, "*samples"]]:
    """What `score` has for samples of queries, from the sums of their terms and their numbers.

    Without macro F1: a sample lacks labels that all queries have, each counts 0, and so the samples lie below what they
    are samples of, all of them where labels are rare.
    """
    means = sums / queries[..., None]
    values = [means[..., place] for place in range(means.shape[-1])]
    if task.kind == "rating":
        values[1] = np.sqrt(values[1])
    return dict(zip(task.metrics, values, strict=False))


@cache
def _numbers(labels: tuple[str, ...]) -> dict[str, int]:
    return {label: number for number, label in enumerate(distinct_labels(labels, "this data set"))}


def _class_of_gold(task: Task, gold: str, numbers: dict[str, int]) -> int:
    try:
        return numbers[normalise_label(gold)]
    except KeyError:
        message = f"{task.name}: a gold answer is none of the {len(numbers)} labels; pass the labels of this data set"
        raise ValueError(message) from None


def _rating_of_gold(task: Task, gold: str) -> float:
    try:
        return float(gold)
    except ValueError:
        raise ValueError(f"{task.name}: a gold answer is no number; the data are of another task") from None


def _rating(text: str, truth: float, scale: tuple[str, ...]) -> float:
    """The number said, on the scale or not, as LaMP takes it; what is none counts as the scale's end that is farther
    from the truth."""
    low, high = float(scale[0]), float(scale[-1])
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if abs(value) < 1e9:  # no number, infinite, or beyond what squares can be summed of
        return value
    return low if truth - low > high - truth else high


_ROUGE_WORD = re.compile("[a-z0-9]", re.IGNORECASE | re.ASCII)


@cache
def _warn_of_wordless(task: str) -> None:
    """Once a process: golds in which ROUGE sees no word."""
    log.warning(
        "%s: gold answers hold no Latin letter and no digit, the only ones that ROUGE (rouge_score) sees; every answer "
        "to them scores 0, right ones too: look at other metrics, or leave these queries out",
        task,
    )


@cache
def _rouge() -> RougeScorer:
    return RougeScorer(["rouge1", "rougeL"], use_stemmer=False)  # as LaMP's own evaluation
