"""Users in bands of history length, and what each method scores in every band."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mta_ray.lamp.users import FEW_SHOT_ITEMS

BANDS = (3, 6, FEW_SHOT_ITEMS, 20, 50, 100, 200)
"""Upper ends of the bands of history length; one more is open."""
USERS_IN_A_BAND = 5
"""A band with fewer users is joined to the one before it, but few-shot users never to others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bands:
    """Bands from the shortest histories to the longest."""

    labels: list[str]
    """Fewest and most history items of the users in each band."""
    users: list[int]
    scores: dict[str, list[float]]
    """Method -> mean of the primary metric over the queries of each band's users."""


def by_history(summary: dict[str, Any], predictions: pd.DataFrame) -> Bands:
    """Each method's score against history length."""
    # 1. where bands begin
    items = predictions.drop_duplicates("user_id")["history_items"].to_numpy()
    begins: list[int] = []
    for low, count in zip((-1, *BANDS), np.histogram(items, [0, *(end + 1 for end in BANDS), np.inf])[0], strict=True):
        is_alike = bool(begins) and (begins[-1] < FEW_SHOT_ITEMS) == (low < FEW_SHOT_ITEMS)
        if count and (count >= USERS_IN_A_BAND or not is_alike):
            begins.append(low)

    # 2. who is in them
    rows = predictions.assign(band=np.searchsorted(begins, predictions["history_items"]))
    bands = rows.groupby("band")
    ends = bands["history_items"].agg(["min", "max"])

    # 3. what they score
    sign = 1.0 if summary["higher_is_better"] else -1.0
    means = sign * rows.pivot_table(index="method", columns="band", values="score")
    return Bands(
        labels=[f"{low}" if low == high else f"{low}–{high}" for low, high in ends.itertuples(index=False)],
        users=bands["user_id"].nunique().tolist(),
        scores={name: means.loc[name].tolist() for name in summary["methods"]},
    )
