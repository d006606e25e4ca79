"""What passes between the ingress and the replicas: questions in, pieces of answers out. Plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mta_ray.lamp.users import HistoryItem
from mta_ray.model.settings import Sampling
from mta_ray.serving.identity import UserId
from mta_ray.serving.user_state import UserState

Finish = Literal["stop", "length"]
RETRY_AFTER_S = 1
"""What a client that found no room is told: a row is free again within about a second."""
REPLICA_AFTER_S = 15
"""What a client is told where no replica takes calls: a small model is back by then, on a machine with a free CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One message of a chat."""

    role: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A question."""

    user: UserId | None
    turns: tuple[Turn, ...] = ()
    """Of a chat."""
    text: str | None = None
    """To go on with; then there are no turns."""
    max_tokens: int | None
    """None: the client did not say."""
    sampling: Sampling
    stops: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class NewHistory:
    """Items for a user."""

    user: UserId
    items: tuple[HistoryItem, ...]
    task: str
    replaces: bool
    expected_version: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class NewStack:
    """An adapter that somebody else trained for a user."""

    user: UserId
    tensors: bytes
    """PEFT's adapter_model.safetensors."""
    alpha: float | None
    """None: as the stacks that are trained here."""
    base_fingerprint: str | None
    """Of the base that it was trained on; none: the client did not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The first thing that comes of an answer: the request has a place in the engine."""

    bank_version: str
    prompt_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ToldToken:
    """A token with its log-probability, as text."""

    text: str
    """By itself: spaces between words, and bytes of a character, may be missing."""
    offset: int
    """Characters of the answer before it."""
    logprob: float
    alternatives: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Text that is certain."""

    text: str
    tokens: int
    """Of the answer so far."""
    told: tuple[ToldToken, ...] = ()
    """Where log-probabilities were asked for."""
    finish: Finish | None = None
    """Set on the last part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """No answer: an HTTP status and OpenAI's fields. A value, not an exception: no log quotes what a client sent."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    retry_after_s: int | None = None


CROWDED = Refused(status=503, message="the user's own replica has no free row; ask another one", code="crowded")
"""What a replica says to a question that came because the user's stack is here; no client hears it."""


NO_DATABASE = Refused(
    status=503,
    message="the database does not answer; send the request again",
    code="busy",
    retry_after_s=REPLICA_AFTER_S,
)
"""What a client hears while the database is away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """The first thing that comes of a write: a replica is at it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """What was sent is in force."""

    state: UserState
