"""What passes between a run's own process and whoever started it: settings in, a row for each request out."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from mta_ray.population.load.traffic import TrafficConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """What is sent where; all that a run needs, as one JSON value."""

    traffic: TrafficConfig
    known: int
    """Users with lower numbers have a history already."""
    url: str
    api_key: str | None
    model: str
    prefix: str
    """Of users' names; the number follows."""
    tastes: tuple[str, ...]
    """What histories are about."""
    prompts: tuple[str, ...]
    """User n always asks the n-th of them, in turn."""
    timeout_s: float
    """That an answer may take, from the beginning of a try to its end."""


@dataclass(slots=True, kw_only=True)
class Row:
    """What became of a request. Times in seconds after time 0."""

    at_s: float
    """When it was to be sent."""
    kind: str
    user: int
    is_stream: bool
    most_tokens: int
    waited_ms: float = 0.0
    """For the end of the same session's request before it."""
    lag_ms: float = 0.0
    """That this program was late."""
    sent_s: float = 0.0
    ended_s: float = 0.0
    """Of the second try where there was one."""
    status: int = 0
    """The last one; 0: none came."""
    first_status: int = 0
    retried: bool = False
    error: str = ""
    ttft_ms: float | None = None
    """From the first try to the first text of a stream."""
    total_ms: float = 0.0
    """From the first try to the end of the last."""
    gaps_ms: list[float] = field(default_factory=list)
    """Between the pieces of a stream."""
    prompt_tokens: int = 0
    tokens: int = 0
    text: str = ""
    item: str = ""
    """That was sent, to go to the end of the history."""
    anchors: list[tuple[int, float]] | None = None
    """Slot and weight, where the answer was a user's state."""


def settings_from(text: str) -> RunSettings:
    """What `asdict` and JSON made of the settings."""
    raw = json.loads(text)
    for name in ("tastes", "prompts"):
        raw[name] = tuple(raw[name])
    return RunSettings(**raw | {"traffic": TrafficConfig(**raw["traffic"])})


def row_from(said: dict[str, Any]) -> Row:
    """What `asdict` and JSON made of a row."""
    anchors = said["anchors"]
    return Row(**said | {"anchors": None if anchors is None else [(slot, weight) for slot, weight in anchors]})
