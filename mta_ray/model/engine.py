"""Continuous batching over a routed model: requests in, tokens out as they come, every request through its own routes.

A step is plan, forward, choose, hand out. Requests join and leave between steps; prompts are read in chunks beside rows
that decode. Plain Python, no Ray.

Why not transformers' ContinuousBatchingManager, which is as fast (`base_over_transformers` of
benchmarks/decode.py): it samples all requests or none and has no seed of a request's own; a full queue
blocks for ten seconds; its prefix sharing knows no adapters; an error in one step ends the loop for everybody; without
flash attention every token is scored against every request's keys; and its internals were written anew between 5.17 and
5.23, while we need no more of the library than its register of attention functions.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from mta_ray.lora.adapter import Adapter
from mta_ray.lora.slots import put
from mta_ray.lora.spread import SpreadTable
from mta_ray.model.backbone import RoutedModel
from mta_ray.model.requests import Answer, EngineClosed, Piece, QueueFull, Request, Ticket
from mta_ray.model.row_cache import Chunk, RowCache, StepPlan, forward
from mta_ray.model.sampling import Choice, choose_tokens
from mta_ray.model.schedule import Running, Schedule, Turn
from mta_ray.model.settings import EngineConfig

log = logging.getLogger(__name__)

LARGEST_FACTOR = 1e4
"""A trained LoRA factor is of the order of 0.01 to 1. Dense products multiply every row with every slot and then by
zero, so a value that overflows to infinity in another user's row would make a NaN there."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The engine at one moment, and since its start."""

    running: int
    waiting: int
    owners: int
    """Distinct owners among the running."""
    cached_tokens: int
    cache_bytes: int
    """Allocated, whether used or not."""
    steps: int
    tokens: int
    """Generated since the start."""


class Engine:
    """Decodes many users' requests together. `start` runs it in a thread of its own; without, the caller steps it."""

    def __init__(self, routed: RoutedModel, shelves: Sequence[str] = (), config: EngineConfig | None = None) -> None:
        """`shelves`: those that routes may use, already added. The engine owns the model until it is closed."""
        self.config = config or EngineConfig()
        self.routed = routed
        self.max_tokens = min(self.config.max_tokens, routed.backbone.max_tokens)
        self._cache = RowCache(routed.model, rows=self.config.max_requests, tokens=self.max_tokens)
        self._spread = (
            SpreadTable(
                routed.layers,
                shelves,
                rows=self.config.max_requests,
                tokens=self.config.max_step_tokens,
                coefficients=self.config.coefficients,
            )
            if shelves
            else None
        )
        self._schedule = Schedule(self.config.max_requests, self.config.max_step_tokens)
        # ids, positions, places in the cache, rows, tokens to keep: one buffer here, one on the device, one copy a step
        size = (5, self.config.max_step_tokens)
        on_device = routed.device.type != "cpu"
        self._inputs = torch.zeros(size, dtype=torch.int64, device=routed.device)
        self._staged = torch.zeros(size, dtype=torch.int64, pin_memory=on_device) if on_device else self._inputs
        self._wake = threading.Condition()
        self._calls: list[tuple[Callable[[], Any], Future]] = []
        self._cancelled: set[Ticket] = set()
        self._handed: list[tuple[Ticket, Piece]] = []
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._count = self._steps = self._tokens = 0
        log.info(
            "engine: %d rows of %d tokens, %.1f MiB of keys and values",
            self.config.max_requests,
            self.max_tokens,
            self._cache.bytes / 2**20,
        )

    # -- what callers use, from any thread --------------------------------------------------------------------------

    def submit(self, request: Request, *, asynchronous: bool = False) -> Ticket:
        """Queue a request. `asynchronous`: its pieces go to the event loop that is running here.

        Raises QueueFull at once where there is no room, ValueError for a request that can never run.
        """
        total = len(request.prompt) + request.max_new_tokens
        if total > self.max_tokens:
            raise ValueError(
                f"{len(request.prompt)} prompt tokens and {request.max_new_tokens} new ones are {total}, "
                f"a request has {self.max_tokens}; shorten the prompt or ask for fewer"
            )
        vocabulary = self.routed.model.config.get_text_config(decoder=True).vocab_size
        if not 0 <= min(request.prompt) <= max(request.prompt) < vocabulary:
            raise ValueError(f"the prompt holds token ids outside 0 to {vocabulary - 1}; is it another tokenizer's?")
        if self._spread is not None:
            self._spread.check(request.routes)
        elif request.routes:
            raise ValueError(f"the engine was made without shelves, the request has routes {sorted(request.routes)}")
        with self._wake:
            if self._is_closed:
                raise EngineClosed("the engine is closed")
            under_way = len(self._schedule.waiting) + len(self._schedule.running)
            if under_way >= self.config.max_requests + self.config.max_waiting:
                raise QueueFull(f"{under_way} requests are under way or waiting, which is all that the engine takes")
            self._count += 1
            seed = request.sampling.seed
            ticket = Ticket(
                request,
                self._count,
                seed=f"given {seed}" if seed is not None else f"{self.config.seed} {self._count}",
                cancel=self._cancel,
                asynchronous=asynchronous,
            )
            self._schedule.waiting.append(ticket)
            self._wake.notify_all()
        return ticket

    async def stream(self, request: Request) -> AsyncIterator[Piece]:
        """The request's pieces, on the event loop that is running here. Left early (the client is gone), it cancels.

        Raises as `submit`, and RequestFailed.
        """
        ticket = self.submit(request, asynchronous=True)
        try:
            async for piece in ticket:
                yield piece
        finally:
            ticket.cancel()

    def between_steps(self, call: Callable[[], Any]) -> Future:
        """Run `call` while no forward pass is under way (to change slots, for instance); its result as a Future."""
        future: Future = Future()
        with self._wake:
            if self._is_closed:
                raise EngineClosed("the engine is closed")
            self._calls.append((call, future))
            self._wake.notify_all()
        return future

    def load(self, shelf: str, slot: int, adapter: Adapter) -> Future:
        """Put an adapter into a slot that no running request uses, between two steps.

        Raises ValueError at once for factors that are not finite or absurdly large: they would disturb other users.
        Modules, ranks and shapes that do not fit make the Future raise ValueError. Whatever the error, the slot is
        empty then: nobody is answered with what lay in it before.
        """
        check_values(adapter)

        def load() -> None:
            try:
                put(self.routed.layers, shelf, slot, adapter)
            except BaseException:
                self._clear(shelf, slot)
                raise

        return self.between_steps(load)

    def wipe(self, shelf: str, slot: int) -> Future:
        """Empty a slot between two steps (a deleted user's stack leaves the device)."""
        return self.between_steps(lambda: self._clear(shelf, slot))

    def _clear(self, shelf: str, slot: int) -> None:
        for layer in self.routed.layers.values():
            layer.shelves[shelf].down[slot].zero_()
            layer.shelves[shelf].up[slot].zero_()

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """Every request's answer, in order, however many there are. Raises RequestFailed if one failed."""
        tickets: list[Ticket] = []
        for request in requests:
            while True:
                try:
                    tickets.append(self.submit(request))
                    break
                except QueueFull:
                    ours = next((t for t in tickets if not t.is_over), None)
                    if ours is None:
                        raise
                    self._wait_for(ours)
        for ticket in tickets:
            self._wait_for(ticket)
        return [ticket.answer() for ticket in tickets]

    def stats(self) -> EngineStats:
        with self._wake:
            running = list(self._schedule.running)
            return EngineStats(
                running=len(running),
                waiting=len(self._schedule.waiting),
                owners=len({r.ticket.request.owner for r in running}),
                cached_tokens=sum(r.cached for r in running),
                cache_bytes=self._cache.bytes,
                steps=self._steps,
                tokens=self._tokens,
            )

    @property
    def is_alive(self) -> bool:
        """Whether it steps by itself."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Step in a thread of its own until `close`."""
        assert self._thread is None, "the engine was started before"
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def close(self, *, drain: bool = False) -> None:
        """Take no more requests; cancel those under way, or with `drain` finish them first. Waits for the thread.

        The cache's memory is free afterwards.
        """
        with self._wake:
            self._is_closed = True
            if not drain:
                self._cancelled.update(self._schedule.waiting, (r.ticket for r in self._schedule.running))
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join()
        else:
            while self._has_work():
                self.step()
        self._cache.release()

    # -- the loop -----------------------------------------------------------------------------------------------------

    def step(self) -> int:
        """One forward pass; returns how many tokens it made. Without `start`, the caller's thread calls this."""
        # 1. what changed since the last step
        with self._wake:
            calls, self._calls = self._calls, []
            cancelled, self._cancelled = self._cancelled, set()
            self._drop_cancelled(cancelled)
            admitted = self._schedule.admit()
        for row, running in admitted:
            if self._spread is not None:
                self._spread.put(row, running.ticket.request.routes)
        for call, future in calls:
            _settle(call, future)

        # 2. forward, and the next tokens
        decoding, chunks = self._schedule.plan()
        made = 0
        if decoding or chunks:
            choices = self._try_step(decoding, chunks)
            made = self._take(choices)
            self._steps += 1
            self._tokens += made

        # 3. hand out
        self._hand_out()
        return made

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._has_work() or self._is_closed):
                    self._wake.wait()
                if self._is_closed and not self._has_work():
                    return
            self.step()

    def _has_work(self) -> bool:
        return bool(self._schedule.waiting or self._schedule.running or self._calls or self._cancelled)

    def _wait_for(self, ticket: Ticket) -> None:
        if self._thread is None:
            while not ticket.is_over:
                self.step()
        else:
            with self._wake:
                self._wake.wait_for(lambda: ticket.is_over)

    # -- one forward pass ---------------------------------------------------------------------------------------------

    def _try_step(self, decoding: list[Turn], chunks: list[Turn]) -> list[tuple[Turn, Choice]]:
        """The step's choices. Requests that an error concerns are failed, the others lose nothing: a step writes the
        cache only beyond what its requests have there."""
        try:
            return self._step(decoding, chunks)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is handed to the requests that it concerns
            log.exception("a step of %d decoding requests and %d prompts failed", len(decoding), len(chunks))
            # Prompts are what is new (and large): where there are some, decoding is tried again without them.
            for turn in reversed(chunks or decoding):
                self._fail(turn.running, f"{type(error).__name__}: {error}")
            if self.routed.device.type == "cuda":
                torch.cuda.empty_cache()
            return self._try_step(decoding, []) if chunks and decoding else []

    @torch.inference_mode()
    def _step(self, decoding: list[Turn], chunks: list[Turn]) -> list[tuple[Turn, Choice]]:
        # 1. tokens, where they stand, whose they are, and which of them predict
        ids: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        keep: list[int] = []
        chosen: list[Turn] = []
        for turn in (*decoding, *chunks):
            start = turn.running.cached
            ids += turn.running.tokens[start : start + turn.count]
            positions += range(start, start + turn.count)
            rows += [turn.row] * turn.count
            if turn.is_last_of_known:
                keep.append(len(ids) - 1)
                chosen.append(turn)
        places = [row * self.max_tokens + position for row, position in zip(rows, positions, strict=True)]
        size = len(ids)
        self._staged[:4, :size] = torch.tensor([ids, positions, places, rows])
        self._staged[4, : len(keep)] = torch.tensor(keep, dtype=torch.int64)
        if self._staged is not self._inputs:
            self._inputs.copy_(self._staged)
        inputs = self._inputs[:, :size]

        # 2. routes
        spread = None
        if self._spread is not None:
            spread = self._spread.of_tokens(len(self._schedule.running), inputs[3]) if chunks else None
            spread = self._spread.of_rows(len(decoding)) if not chunks else spread

        # 3. forward and choose
        plan = StepPlan(
            self._cache,
            [turn.running.cached for turn in decoding],
            [Chunk(turn.row, turn.running.cached, turn.count) for turn in chunks],
            inputs[2],
        )
        with self.routed.router.spreading(spread):
            logits = forward(self.routed.model, inputs[0], inputs[1], self._inputs[4, : len(keep)], plan)
        settings = [turn.running.ticket.request.sampling for turn in chosen]
        uniforms = [
            turn.running.ticket.uniform() if s.temperature > 0 else 0.0
            for turn, s in zip(chosen, settings, strict=True)
        ]
        choices = choose_tokens(logits, settings, uniforms) if chosen else []

        # 4. done: before this, nothing of a request has changed, and the step can be tried again
        for turn in (*decoding, *chunks):
            turn.running.cached += turn.count
        for turn in chosen:
            turn.running.ticket.spend()
        return list(zip(chosen, choices, strict=True))

    def _take(self, choices: list[tuple[Turn, Choice]]) -> int:
        over = []
        made = 0
        for turn, choice in choices:
            running, request = turn.running, turn.running.ticket.request
            if not choice.is_finite:
                over.append((running, Piece(None, "failed", error="the model's logits were not finite")))
                continue
            made += 1
            if choice.token in request.stop_ids:
                over.append((running, Piece(None, "stop")))
                continue
            running.tokens.append(choice.token)
            is_last = running.generated >= request.max_new_tokens
            piece = Piece(choice.token, "length" if is_last else None, choice.logprob, choice.alternatives)
            if is_last:
                over.append((running, piece))
            else:
                self._handed.append((running.ticket, piece))
        for running, piece in over:
            self._end(running, piece)
        return made

    # -- leaving ------------------------------------------------------------------------------------------------------

    def _end(self, running: Running, piece: Piece) -> None:
        with self._wake:
            free = self._schedule.remove(running, self._move)
        if piece.finish == "failed":
            # Any row may hold part of what broke: the gap was closed by copying over it, up to what the copied row had.
            for row in range(free, self.config.max_requests):
                self._cache.wipe(row)
            self._wipe_beyond()
        self._handed.append((running.ticket, piece))

    def _fail(self, running: Running, reason: str) -> None:
        self._end(running, Piece(None, "failed", error=reason))

    def _move(self, source: int, target: int, tokens: int) -> None:
        self._cache.move(source, target, tokens)
        if self._spread is not None:
            self._spread.move(source, target)

    def _wipe_beyond(self) -> None:
        for row, running in enumerate(self._schedule.running):
            self._cache.pool[:, :, row, running.cached :].zero_()

    def _cancel(self, ticket: Ticket) -> None:
        with self._wake:
            if not ticket.is_over:
                self._cancelled.add(ticket)
                self._wake.notify_all()

    def _drop_cancelled(self, cancelled: set[Ticket]) -> None:
        if not cancelled:
            return
        for ticket in [t for t in self._schedule.waiting if t in cancelled]:
            self._schedule.waiting.remove(ticket)
            self._handed.append((ticket, Piece(None, "cancelled")))
        for running in [r for r in self._schedule.running if r.ticket in cancelled]:
            self._end(running, Piece(None, "cancelled"))

    def _hand_out(self) -> None:
        handed, self._handed = self._handed, []
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, Piece]]] = {}
        with self._wake:
            for ticket, piece in handed:
                ticket.is_over = piece.finish is not None
                if ticket.loop is None:
                    ticket.deliver(piece)
                else:
                    by_loop.setdefault(ticket.loop, []).append((ticket, piece))
            self._wake.notify_all()
        for loop, pieces in by_loop.items():
            try:
                loop.call_soon_threadsafe(_deliver_all, pieces)  # one wake-up of the loop for all its tickets
            except RuntimeError:  # the loop is closed: nobody will read
                for ticket, _ in pieces:
                    self._cancel(ticket)


def check_values(adapter: Adapter) -> None:
    """Raise ValueError for factors that are not finite or absurdly large."""
    for module, factors in adapter.factors.items():
        for tensor in (factors.down, factors.up * adapter.scale):
            if not bool((tensor.abs() <= LARGEST_FACTOR).all()):  # false for NaN too
                raise ValueError(f"{module}: the adapter holds values that are not finite or above {LARGEST_FACTOR:g}")


def _deliver_all(pieces: list[tuple[Ticket, Piece]]) -> None:
    for ticket, piece in pieces:
        ticket.deliver(piece)


def _settle(call: Callable[[], Any], future: Future) -> None:
    try:
        with torch.no_grad():
            future.set_result(call())
    except Exception as error:  # noqa: BLE001 - it belongs to whoever asked
        future.set_exception(error)
