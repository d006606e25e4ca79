"""Who teaches and who is tested: decided by the user id alone, so that every stage draws the same line."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mta_ray.lamp.users import FEW_SHOT_ITEMS, User
from mta_ray.pipeline.embed_users import Embeddings
from mta_ray.pipeline.prepare_users import read_users


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


def teachers_of(users: str, embeddings: Embeddings, split: SplitConfig) -> Iterator[User]:
    """The users that teach base and bank."""
    rows = split_users(embeddings.user_ids, embeddings.items, embeddings.queries, split).teachers
    wanted = {embeddings.user_ids[row] for row in rows}
    return (user for user in read_users(users) if user.id in wanted)


def tested_of(users: str, embeddings: Embeddings, split: SplitConfig) -> list[User]:
    """The tested users with all of their history, by id. Raises ValueError where there are none."""
    rows = split_users(embeddings.user_ids, embeddings.items, embeddings.queries, split).tested
    wanted = {embeddings.user_ids[row] for row in rows}
    found = sorted((user for user in read_users(users) if user.id in wanted), key=lambda user: user.id)
    if not found:
        raise ValueError(f"{users}: nobody can be tested: no user has an item and a query; give files that hold some")
    return found


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
