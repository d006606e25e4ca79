"""What quality a population may expect: what evaluated users had, by their similarity to the nearest anchor."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray

from mta_ray.artifacts import open_artifact
from mta_ray.evaluation.sections import FIGURES
from mta_ray.personalize.merge_then_adapt import encode
from mta_ray.pipeline.embed_users import read_embeddings
from mta_ray.population.crowd.anchors import Anchors
from mta_ray.population.crowd.parts import BINS
from mta_ray.similarity.neighbours import nearest

BANDS = 5
USERS_IN_A_BAND = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """Users of an evaluation, and how well they were answered."""

    method: str
    metric: str
    means: Float[ndarray, "users dim"]
    scores: Float[ndarray, " users"]
    """Mean over each user's queries; higher is better."""


def read_evaluated(
    report: str, evaluated: str, *, bank_hash: str, method: str, task: str, max_items: int, max_words: int
) -> Evaluated:
    """Who was evaluated. Raises ValueError where that was with another bank, of another task, or of other texts."""
    artifact, embeddings = open_artifact(report, kind="report"), read_embeddings(evaluated)
    if artifact.inputs.get("embeddings") != embeddings.hash:
        raise ValueError(f"{report} is of other embeddings than {evaluated}; give those that it was made with")
    if artifact.inputs.get("bank") != bank_hash:
        raise ValueError(f"{report} is of another bank than the one given; give the bank that it was made with")
    encoded = open_artifact(evaluated, kind="embeddings", verify=False).settings
    for name, wanted in (("max_items", max_items), ("max_words", max_words)):
        if encoded.get(name, wanted) != wanted:
            raise ValueError(
                f"{evaluated} was encoded with {name} {encoded[name]} and the population with {wanted}: their cosines "
                f"do not compare; give --{name.replace('_', '-')} {encoded[name]}"
            )
    summary = json.loads((artifact.path / FIGURES).read_text())
    if summary["task"] != task:
        raise ValueError(f"{report} is of the task {summary['task']}, the population of {task}; give --world.task")
    predictions = pd.read_parquet(artifact.path / "predictions.parquet")
    rows = predictions[predictions["method"] == method]
    if not len(rows):
        raise ValueError(f"{report} has no method {method!r}; choose one of {', '.join(summary['methods'])}")

    sign = 1.0 if summary["higher_is_better"] else -1.0
    scores = sign * rows.groupby("user_id")["score"].mean()
    place = {user_id: row for row, user_id in enumerate(embeddings.user_ids)}
    means = embeddings.means[[place[user_id] for user_id in scores.index]]
    return Evaluated(method=method, metric=summary["primary"], means=means, scores=scores.to_numpy())


def quality_by_cosine(evaluated: Evaluated, anchors: Anchors, histogram: Sequence[int]) -> dict[str, Any]:
    """Bands of similarity to the nearest anchor in service, with the quality of evaluated users and the population's
    share, and the mean over them."""
    vectors = encode(evaluated.means, anchors.center)
    cosines = nearest(vectors, anchors.embeddings[anchors.in_service], 1).similarities[:, 0]
    named = {"method": evaluated.method, "metric": evaluated.metric}
    return named | expected_quality(cosines, evaluated.scores, np.asarray(histogram))


def expected_quality(cosines: np.ndarray, scores: np.ndarray, histogram: np.ndarray) -> dict[str, Any]:
    """Bands with about as many evaluated users each, ends on the histogram's; the population's mean over them."""
    count = max(1, min(BANDS, len(cosines) // USERS_IN_A_BAND))
    inner = np.unique(np.searchsorted(BINS, np.quantile(cosines, np.linspace(0, 1, count + 1)[1:-1])))
    below = (cosines < BINS[inner][:, None]).sum(axis=1)
    _, first = np.unique(below, return_index=True)  # of ends with no evaluated user between them, one is enough
    inner = inner[[end for end in first if 0 < below[end] < len(cosines)]]
    band_of_user = np.searchsorted(BINS[inner], cosines, side="right")
    band_of_bin = np.searchsorted(inner, np.arange(len(histogram)), side="right")
    users = np.bincount(band_of_bin, histogram, minlength=len(inner) + 1)
    ends = [-1.0, *BINS[inner].tolist(), 1.0]
    bands = []
    for band in range(len(inner) + 1):
        some = scores[band_of_user == band]
        error = float(some.std(ddof=1) / np.sqrt(len(some))) if len(some) > 1 else None
        bands.append(
            {
                "from": ends[band],
                "to": ends[band + 1],
                "evaluated_users": len(some),
                "quality": float(some.mean()),
                "standard_error": error,
                "population_users": int(users[band]),
            }
        )
    known = sum(band["population_users"] for band in bands)
    lowest, highest = np.searchsorted(BINS, [cosines.min(), cosines.max()], side="right") - 1
    return {
        "bands": bands,
        "expected": sum(b["quality"] * b["population_users"] for b in bands) / known if known else None,
        "evaluated": float(scores.mean()),
        "population_outside_evaluated": float(1 - histogram[lowest : highest + 1].sum() / max(histogram.sum(), 1)),
    }
