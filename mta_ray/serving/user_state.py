"""What is kept of a user, as values: facts of the history, the sum of its vectors, route, stack. Knows no SQL."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from itertools import pairwise

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from mta_ray.lamp.users import HistoryItem
from mta_ray.serving.identity import UserId


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ItemSum:
    """The sum of a history's item vectors: an appended item is encoded alone, and the mean is right again."""

    total: Float[ndarray, " dim"] = field(repr=False)
    """Of the items' unit vectors, not centred (similarity.embedding)."""
    items: int
    encoder: str
    """Vectors of different encoders do not add up."""

    @property
    def mean(self) -> Float[ndarray, " dim"]:
        """What `merge_then_adapt.encode` takes; zeros where there are no items.

        The centred unit vector is not kept: it depends on the bank, and is one subtraction away.
        """
        return self.total / np.float32(max(self.items, 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class UserRoute:
    """Anchors and their weights, by name, so that it can be read against any bank that holds them."""

    anchors: tuple[UserId, ...]
    weights: tuple[float, ...]
    """Kept as float32."""
    bank_version: str
    """The bank that it was computed for."""
    history_version: int
    """`UserState.version` that it was computed from."""

    def __post_init__(self) -> None:
        if len(self.anchors) != len(self.weights) or not self.anchors or len(set(self.anchors)) != len(self.anchors):
            raise ValueError(
                f"a route needs different anchors, at least one, and as many weights; got {len(self.anchors)} anchors "
                f"and {len(self.weights)} weights"
            )
        if not np.isfinite(self.weights).all():
            raise ValueError(f"a route's weights must be finite numbers, got {self.weights}")


ANY_BANK = ""
"""The bank of a stack that was trained elsewhere: it lies on whichever is served."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UserStack:
    """A user's own adapter, trained here or sent by a client."""

    tensors: bytes = field(repr=False)
    """safetensors."""
    kind: str
    """`lora` or `coefficients`."""
    rank: int
    scale: float
    base_fingerprint: str
    bank_version: str
    """Of the bank whose route lay beneath it in training, or ANY_BANK."""
    history_version: int
    """`UserState.version` that it was trained on, or came to."""
    version: int = 0
    """Given by the store; never the same twice for a user, also when the user was deleted and came again."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class UserState:
    """A user without the bulk: neither the history's text nor the stack's tensors."""

    user: UserId
    task: str
    version: int
    """Of the history: grows with each write, and never repeats, as UserStack.version."""
    items: int
    """Of the history."""
    history_bytes: int
    history_digest: str
    """sha256 (hex) over the items, in order."""
    item_sum: ItemSum
    route: UserRoute | None
    """None: nothing computed yet, or the documented cold start."""
    stack_version: int | None
    stack_bytes: int
    created_at_s: float
    updated_at_s: float

    def has_route_for(self, bank_version: str) -> bool:
        """Whether the route was computed for this bank and from the history as it is."""
        return (
            self.route is not None
            and self.route.bank_version == bank_version
            and self.route.history_version == self.version
        )


_ITEM_FIELDS = tuple(one.name for one in fields(HistoryItem))


def to_lines(items: Iterable[HistoryItem]) -> list[bytes]:
    """Each item as one line of JSON; `from_lines` is the inverse."""
    # not by `asdict`, which copies deeply: that alone would be half of what a bulk load takes
    plain = ({name: getattr(item, name) for name in _ITEM_FIELDS} for item in items)
    return [json.dumps(one, ensure_ascii=False, separators=(",", ":")).encode() + b"\n" for one in plain]


def from_lines(lines: bytes) -> tuple[HistoryItem, ...]:
    """The items of a stored history; oldest first where all are dated, as training examples need them."""
    items = [HistoryItem(**json.loads(line)) for line in lines.splitlines()]
    is_dated = all(item.date for item in items)
    if is_dated and any((before.date or "") > (after.date or "") for before, after in pairwise(items)):
        items.sort(key=lambda item: item.date or "")
    return tuple(items)
