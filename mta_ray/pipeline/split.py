"""Who teaches and who is tested: decided by the user id alone, so that every stage draws the same line."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mta_ray.lamp.users import FEW_SHOT_ITEMS


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitConfig:
    """Few-shot users are always tested and never teach; of the others a share is tested."""

    test_share: float = 0.15
    """Share of the users with more than 10 items that is tested instead of teaching."""
    max_few_shot: int = 1000
    """At most so many few-shot users are tested."""
    max_rest: int = 200
    """At most so many of the other users are tested."""
    seed: int = 0
    """Of the draw."""

    def __post_init__(self) -> None:
        if not 0 <= self.test_share < 1:
            raise ValueError(f"test_share must lie in [0, 1), got {self.test_share}")
        if self.max_few_shot < 0 or self.max_rest < 0:
            raise ValueError(f"got max_few_shot={self.max_few_shot}, max_rest={self.max_rest}; wanted 0 or more")


@dataclass(frozen=True, slots=True)
class Split:
    """Row numbers, ascending."""

    teachers: list[int]
    """Train the base model; anchors are chosen among them."""
    tested: list[int]


def split_users(user_ids: Sequence[str], items: Sequence[int], queries: Sequence[int], config: SplitConfig) -> Split:
    """The line between teachers and tested users. A tested user has at least one item and one query."""
    drawn = {row: _uniform(config.seed, user_id) for row, user_id in enumerate(user_ids)}
    few = [r for r in drawn if items[r] <= FEW_SHOT_ITEMS]
    held_out = [r for r in drawn if items[r] > FEW_SHOT_ITEMS and drawn[r] < config.test_share]
    tested: list[int] = []
    for rows, most in ((few, config.max_few_shot), (held_out, config.max_rest)):
        able = sorted((r for r in rows if queries[r] and items[r]), key=drawn.__getitem__)
        tested += able[:most]
    teachers = [r for r in drawn if items[r] > FEW_SHOT_ITEMS and drawn[r] >= config.test_share]
    if not teachers:
        raise ValueError(f"none of {len(user_ids)} users has more than {FEW_SHOT_ITEMS} items: nobody to learn from")
    return Split(teachers=sorted(teachers), tested=sorted(tested))


def check_same_line(config: SplitConfig, made_with: Mapping[str, Any] | None, what: str) -> None:
    """Raise ValueError where what teaches was made with another line: tested users may have taught it."""
    names = ("seed", "test_share")
    other = [name for name in names if made_with is not None and made_with.get(name) != getattr(config, name)]
    if other and made_with is not None:
        raise ValueError(
            f"the {what} was made with split.{other[0]} {made_with.get(other[0])}, not {getattr(config, other[0])}: "
            f"whoever is tested now may have taught it; give the same split, or make the {what} again"
        )


def _uniform(seed: int, user_id: str) -> float:
    return int.from_bytes(hashlib.sha256(f"{seed}/{user_id}".encode()).digest()[:8], "little") / 2**64
