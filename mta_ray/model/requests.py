"""What a caller hands to the engine and what comes back: a request, a ticket, pieces of an answer."""

from __future__ import annotations

import asyncio
import queue
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from mta_ray.lora.slots import Route
from mta_ray.model.settings import Sampling

Finish = Literal["stop", "length", "cancelled", "failed"]
"""Why an answer ended: a stop token, max_new_tokens reached, `cancel`, or an error."""


class QueueFull(RuntimeError):
    """As many requests are under way and waiting as the engine takes; try again later."""


class EngineClosed(RuntimeError):
    """The engine takes no more requests."""


class RequestFailed(RuntimeError):
    """A step failed for this request; the engine goes on with the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt to go on with, through a user's routes."""

    prompt: tuple[int, ...]
    """Token ids, at least one."""
    max_new_tokens: int
    routes: Mapping[str, Route] = field(default_factory=dict)
    """Shelf to route: the bank's (k slots, k weights), and a stack's one slot. Empty: the base model."""
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end the answer, and are not part of it."""
    owner: str = ""
    """Whose request it is. Only counted: `EngineStats.owners`."""

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("the prompt is empty; give at least one token, e.g. the model's opening one")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")


@dataclass(frozen=True, slots=True)
class Piece:
    """One step of an answer."""

    token: int | None
    """None: the answer ended without one more (a stop token, a cancellation, a failure)."""
    finish: Finish | None = None
    """Set on the last piece."""
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """All pieces together."""

    tokens: tuple[int, ...]
    finish: Finish
    logprobs: tuple[float, ...]
    """One for each token, where the request asked for them."""


class Ticket:
    """A request under way. Iterate it (`for` in a thread, `async for` on the event loop it was made for)."""

    def __init__(
        self, request: Request, number: int, *, seed: str, cancel: Callable[[Ticket], None], asynchronous: bool
    ) -> None:
        self.request = request
        self.number = number
        self._random = random.Random(seed)
        self._drawn: float | None = None
        self._cancel = cancel
        self.is_over = False
        """The last piece was made (read or not yet)."""
        self._is_read = False
        self.loop = asyncio.get_running_loop() if asynchronous else None
        self._arrived: asyncio.Queue[Piece] | queue.SimpleQueue[Piece] = (
            asyncio.Queue() if asynchronous else queue.SimpleQueue()
        )

    def uniform(self) -> float:
        """The random number of the next token, the same until `spend`: a step that failed is tried again.

        They are the request's own: what its neighbours draw does not matter.
        """
        if self._drawn is None:
            self._drawn = self._random.random()
        return self._drawn

    def spend(self) -> None:
        """The token was chosen: the next one has another number."""
        self._drawn = None

    def cancel(self) -> None:
        """End the answer and give its row back before the next step. May be called twice, late, and by any thread."""
        self._cancel(self)

    def deliver(self, piece: Piece) -> None:
        """Called by the engine: in its own thread, or on the ticket's event loop if there is one."""
        if isinstance(self._arrived, asyncio.Queue):
            self._arrived.put_nowait(piece)
        else:
            self._arrived.put(piece)

    def __iter__(self) -> Iterator[Piece]:
        assert isinstance(self._arrived, queue.SimpleQueue), "this ticket belongs to an event loop: use async for"
        while True:
            piece = _unless_failed(self._arrived.get())
            yield piece
            if piece.finish:
                return

    def __aiter__(self) -> Ticket:
        return self

    async def __anext__(self) -> Piece:
        assert isinstance(self._arrived, asyncio.Queue), "this ticket belongs to no event loop: use for"
        if self._is_read:
            raise StopAsyncIteration
        piece = await self._arrived.get()
        self._is_read = piece.finish is not None
        return _unless_failed(piece)

    def answer(self) -> Answer:
        """Wait for the end. Raises RequestFailed."""
        pieces = list(self)
        finish = pieces[-1].finish
        assert finish is not None
        return Answer(
            tuple(p.token for p in pieces if p.token is not None),
            finish,
            tuple(p.logprob for p in pieces if p.logprob is not None),
        )


def _unless_failed(piece: Piece) -> Piece:
    if piece.error is not None:
        raise RequestFailed(piece.error)
    return piece
