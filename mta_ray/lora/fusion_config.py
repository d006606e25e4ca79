"""How a user's anchors are weighed and joined. Knows no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

FusionMode = Literal["exact", "linear", "svd", "as-released"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FusionConfig:
    """How a user's anchors are weighed."""

    k: int = 4
    """Anchors a user is made of; fewer where the bank is smaller."""
    temperature: float = 0.1
    """Of the softmax over cosines; lower trusts the nearest anchor more."""
    mode: FusionMode = "exact"
    """`exact` (ours) needs no merging; the others are materialised as one adapter a user."""
    shrinkage: float = 0.0
    """Items n0 of a history that is trusted by half: weights are multiplied by n / (n + n0) for n items. 0: off."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be above 0 and finite, got {self.temperature}")
        if not 0 <= self.shrinkage < math.inf:
            raise ValueError(f"shrinkage must be at least 0 items and finite, got {self.shrinkage}")
