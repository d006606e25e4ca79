"""How sure a difference is: paired gains on the same queries, bootstrap intervals and tests over users."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy.stats import permutation_test

_DRAWS_AT_ONCE = 2_000_000
"""Resampled users held in memory at a time (16 MB of indices)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean gain and where it lies with 95% confidence."""

    mean: float
    low: float
    """NaN with fewer than two users: one user says nothing about others."""
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def paired_gains(predictions: pd.DataFrame, method: str, over: str) -> pd.DataFrame:
    """One row (user_id, gain) for each query: the score of `method` less the score of `over` on that same query."""
    key = ["user_id", "query_id"]
    one, other = (predictions.loc[predictions["method"] == name, [*key, "score"]] for name in (method, over))
    pairs = one.merge(other, on=key, how="outer", suffixes=("", "_over"), validate="one_to_one")
    alone = int(pairs["score"].isna().sum() + pairs["score_over"].isna().sum())
    if alone:
        raise ValueError(
            f"{method} and {over} did not answer the same queries: {alone} of {len(pairs)} have no partner; "
            "evaluate both on the same users"
        )
    return pd.DataFrame({"user_id": pairs["user_id"], "gain": pairs["score"] - pairs["score_over"]})


def paired_bootstrap(
    user_ids: Sequence[Any] | np.ndarray | pd.Series,
    gains: Sequence[Any] | np.ndarray | pd.Series,
    *,
    samples: int = 2000,
    seed: int = 0,
    per: Literal["query", "user"] = "query",
    people: Sequence[Any] | np.ndarray | pd.Series | None = None,
) -> Interval:
    """The mean gain with its percentile 95% interval; what is resampled is always users, with all their queries.

    `people`: one for each gain, where some users are one person over again; then people are resampled.

    Semantics:
      per="query": mean over all queries, a user with many queries counts for more
      per="user":  mean over users of each user's own mean
    """
    values = np.asarray(gains, dtype=np.float64)
    if len(values) == 0 or len(values) != len(user_ids):
        raise ValueError(
            f"got {len(values)} gains for {len(user_ids)} user ids; wanted one id for each of at least 1 gain"
        )
    if not np.isfinite(values).all():
        raise ValueError(f"{int((~np.isfinite(values)).sum())} of {len(values)} gains are not finite; mend the scores")

    # users in the order of their ids: the order of rows changes nothing
    owner = pd.factorize(pd.Series(user_ids).astype(str), sort=True)[0]
    totals: np.ndarray = np.bincount(owner, weights=values)
    weights: np.ndarray = np.bincount(owner).astype(np.float64)
    if per == "user":
        totals, weights = totals / weights, np.ones_like(weights)
    if people is not None:
        first = np.unique(owner, return_index=True)[1]  # a row of each user
        person = pd.factorize(pd.Series(people).astype(str).to_numpy()[first], sort=True)[0]
        totals, weights = np.bincount(person, weights=totals), np.bincount(person, weights=weights)
    return bootstrap(totals[:, None], weights, samples=samples, seed=seed)[0]


def bootstrap(totals: np.ndarray, weights: np.ndarray, *, samples: int = 2000, seed: int = 0) -> list[Interval]:
    """Each column's mean, sum of its totals over sum of the weights, with its percentile 95% interval.

    `totals` (users, columns), `weights` (users,): the same users are drawn for all columns.
    """
    means = totals.sum(0) / weights.sum()
    if len(totals) < 2:
        return [Interval(mean=float(mean), low=float("nan"), high=float("nan")) for mean in means]
    drawn = resampled(np.column_stack([totals, weights]), samples=samples, seed=seed)
    return [
        interval_of(mean, values)
        for mean, values in zip(means.tolist(), (drawn[:, :-1] / drawn[:, -1:]).T, strict=True)
    ]


def resampled(totals: np.ndarray, *, samples: int = 2000, seed: int = 0) -> np.ndarray:
    """(samples, columns): sums of the totals (users, columns) of as many users, drawn with replacement."""
    found = []
    for drawn in _draws(len(totals), samples, seed):
        rows = np.arange(len(drawn))[:, None] * len(totals)
        times = np.bincount((rows + drawn).ravel(), minlength=drawn.size).reshape(drawn.shape).astype(np.float64)
        found.append(times @ totals)
    return np.concatenate(found)


def interval_of(mean: float, values: np.ndarray) -> Interval:
    """A mean with the percentile 95% interval of what it is in the samples."""
    low, high = np.percentile(values, [2.5, 97.5])
    return Interval(mean=mean, low=float(low), high=float(high))


def sign_flip_p(differences: Sequence[float] | np.ndarray, *, samples: int = 9999, seed: int = 0) -> float:
    """Two-sided p-value of users' mean differences, one number a user: were they as often the other way round?

    A paired permutation test: each user's sign is flipped or not. All 2^users flips where they are at most `samples`,
    else so many drawn ones. One user says nothing about others: 1.
    """
    values = np.asarray(differences, dtype=np.float64)
    if len(values) < 2 or not values.any():
        return 1.0
    found = permutation_test(
        (values,), _mean, permutation_type="samples", vectorized=True, n_resamples=samples, batch=500, rng=seed
    )
    return float(found.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for their number (Holm 1979, step-down): of all that are below α, with chance 1 - α none
    is there by chance."""
    order = np.argsort(p_values, kind="stable")
    raised = np.asarray(p_values, dtype=np.float64)[order] * np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(np.maximum.accumulate(raised), 1.0)
    return corrected.tolist()


def _mean(values: np.ndarray, axis: int) -> Any:
    # Rounded, so that flips which give the same mean are equal whatever the order of the sum.
    return np.round(values.mean(axis=axis), 12)


def _draws(users: int, samples: int, seed: int) -> Iterator[np.ndarray]:
    generator = np.random.default_rng(seed)
    rows = max(1, _DRAWS_AT_ONCE // users)
    for start in range(0, samples, rows):
        yield generator.integers(users, size=(min(rows, samples - start), users))  # (samples, users)
