"""One replica: base, bank, encoder and engine in a process, behind an asyncio interface. Serves any user of any tenant.

A user's stack is loaded into a slot of a bounded shelf when it is asked for. What is used again is known by everything
that it depends on: a stack by tenant, user and version, a route by bank version, history version and anchors in
service. Nothing is shared between requests' keys and values.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace

import sqlalchemy as sa
import torch
from ray import serve

from mta_ray.lora.adapter import Adapter, from_bytes, peft_from_bytes, to_bytes
from mta_ray.lora.slots import Route, check_fit
from mta_ray.model.backbone import RoutedModel
from mta_ray.model.engine import Engine, EngineStats, check_values
from mta_ray.model.requests import EngineClosed, QueueFull, Request, RequestFailed, Ticket
from mta_ray.personalize.base_model import open_base
from mta_ray.personalize.merge_then_adapt import BANK
from mta_ray.serving.args import ServingArgs
from mta_ray.serving.banks import Banks, PublishedBank
from mta_ray.serving.database import AWAY, open_existing, told_of
from mta_ray.serving.exchange import (
    CROWDED,
    NO_DATABASE,
    RETRY_AFTER_S,
    Ask,
    NewHistory,
    NewStack,
    Part,
    Refused,
    Started,
    Stored,
    Taken,
)
from mta_ray.serving.identity import UserId
from mta_ray.serving.meters import Meters
from mta_ray.serving.personal import OtherEncoder, Personal, open_personaliser
from mta_ray.serving.schema import BadRequest
from mta_ray.serving.served_bank import ServedBank, load_served
from mta_ray.serving.slot_table import NoFreeSlot, Seat, SlotStats, SlotTable, StackKey
from mta_ray.serving.speaker import Speaker
from mta_ray.serving.stack_queue import StackQueue
from mta_ray.serving.user_state import ANY_BANK, UserStack, UserState
from mta_ray.serving.user_store import Conflict, HistoryTooLong, UnknownUser, UserStore
from mta_ray.serving.wording import Prompts
from mta_ray.similarity.embedding import Encoder

log = logging.getLogger(__name__)
STACKS = "stacks"
"""The shelf of users' own stacks."""
UNFIT_MAX = 100_000
"""Keys of stacks that need not be read again; beyond it they are."""
RELOAD_AFTER_S = 30.0
"""Before a bank that could not be loaded is tried again."""


@dataclass(slots=True, eq=False)
class Running:
    """The engine of one bank, with the stacks that lie in its slots."""

    engine: Engine
    table: SlotTable
    unfit: set[StackKey] = field(default_factory=set)
    """Stacks that cannot be used with this base and bank."""
    wiped: frozenset[int] = frozenset()
    """Bank slots of retired anchors that are empty already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """A request that has its place."""

    run: Running
    ticket: Ticket
    bank_version: str
    slot: int | None
    """Of the user's stack, pinned."""


class Replica:
    """The deployment that holds the model."""

    def __init__(self, args: ServingArgs) -> None:
        torch.set_num_threads(args.threads)
        self.args = args
        database = open_existing(args.database)
        self.store = UserStore(database, args.history)
        self.queue = StackQueue(database, args.queue)
        base = open_base(args.base)
        self._fingerprint = base.fingerprint
        backbone = base.load(device=args.device)
        self.routed = RoutedModel(backbone, base.targets)
        self.personaliser = open_personaliser(
            args, self.store, Banks(database), base_fingerprint=base.fingerprint, device=args.device
        )
        self._run = self._running(self.personaliser.served)
        self.prompts = Prompts(
            backbone=backbone, wording=base.wording, chat=args.wording, max_tokens=self._run.engine.max_tokens
        )
        self._tokenising = threading.Lock()
        self.meters = Meters()
        self._is_open = asyncio.Event()
        self._is_open.set()
        self._change: asyncio.Task[None] | None = None
        self._not_taken: tuple[str, float] = ("", 0.0)  # a bank that could not be loaded, and when to try again
        # Long work has threads of its own: the others are for questions, which must not stand in line behind it.
        self._encoding = ThreadPoolExecutor(1, "encode")
        self._rerouting = ThreadPoolExecutor(1, "reroute")

    # ---- what the ingress calls

    async def generate(self, ask: Ask) -> AsyncIterator[Started | Part | Refused]:
        """The answer in pieces, or why there is none. Closed early, it leaves the batch before the next step."""
        arrived_s = time.perf_counter()
        home = serve.get_multiplexed_model_id()
        if home:
            stats = self._run.engine.stats()
            if stats.running + stats.waiting >= self.args.engine.max_requests:
                yield CROWDED
                return
            await self._note_home(home)
        try:
            place = await self._admit(ask)
        except BadRequest as error:
            yield Refused(status=error.status, message=str(error), param=error.param, code=error.code)
            return
        except AWAY as error:
            yield _without_database(error)
            return
        except (QueueFull, NoFreeSlot, Conflict):
            self.meters.refused.inc()
            message = "the server is busy; send the request again"
            yield Refused(status=503, message=message, code="busy", retry_after_s=RETRY_AFTER_S)
            return

        speaker = Speaker(self.prompts, ask)
        prompt_tokens = len(place.ticket.request.prompt)
        first_s: float | None = None
        try:
            yield Started(bank_version=place.bank_version, prompt_tokens=prompt_tokens)
            async for piece in place.ticket:
                is_first = first_s is None
                first_s = first_s or time.perf_counter() - arrived_s
                part = speaker.part(piece)
                if part is not None:
                    yield part
                if is_first:
                    self.meters.observe(place.run.engine.stats())
                if part is not None and part.finish is not None:
                    break
        except RequestFailed:  # the engine has logged why
            yield Refused(status=500, message="the model failed at this request", code="model_error")
        finally:
            place.ticket.cancel()
            if place.slot is not None and place.run.table.release(place.slot):
                _wipe(place.run, STACKS, place.slot)
            total_s = time.perf_counter() - arrived_s
            self.meters.answered(prompt_tokens=prompt_tokens, tokens=speaker.tokens, first_s=first_s, total_s=total_s)
            self.meters.observe(place.run.engine.stats())

    async def put_history(self, new: NewHistory) -> AsyncIterator[Taken | Stored | Refused]:
        """New history, in force with the next request; the route is computed here, so that the answer tells it."""
        yield Taken()

        def write() -> UserState:
            self.personaliser.follow()
            state = self.personaliser.put_history(
                new.user, new.items, task=new.task, replaces=new.replaces, expected_version=new.expected_version
            )
            try:
                return self.personaliser.model_of(new.user).state or state
            except (Conflict, *AWAY):  # the history is stored: the next request computes the route
                return state

        try:
            yield Stored(state=await asyncio.get_running_loop().run_in_executor(self._encoding, write))
        except Conflict as error:
            yield Refused(status=409, message=str(error), code="conflict")
        except HistoryTooLong as error:
            yield Refused(status=400, message=str(error), param="items", code="history_too_long")
        except AWAY as error:
            yield _without_database(error)

    async def put_stack(self, new: NewStack) -> AsyncIterator[Taken | Stored | Refused]:
        """An adapter from elsewhere as the user's stack, if it fits this base and a slot of the shelf."""
        yield Taken()
        rank = self.args.stack.rank
        alpha = self.args.stack.alpha if new.alpha is None else new.alpha

        def write() -> UserState:
            if new.base_fingerprint not in (None, self._fingerprint):
                raise ValueError(f"it was trained on another base model than the one served, {self._fingerprint}")
            adapter = peft_from_bytes(new.tensors, rank=rank, alpha=alpha)
            check_fit(self.routed.layers, STACKS, adapter)
            tensors = to_bytes(adapter)
            check_values(from_bytes(tensors, adapter.scale))  # as they are kept: rounding may make them infinite
            stack = UserStack(
                tensors=tensors,
                kind="lora",
                rank=rank,
                scale=adapter.scale,
                base_fingerprint=self._fingerprint,
                bank_version=ANY_BANK,
                history_version=self.store.read(new.user).version,
            )
            self.store.put_stack(new.user, stack)
            return self.store.read(new.user)

        try:
            yield Stored(state=await asyncio.to_thread(write))
        except UnknownUser:
            yield Refused(status=404, message="no such user", param="user", code="user_not_found")
        except Conflict as error:
            yield Refused(status=409, message=str(error), code="conflict")
        except ValueError as error:
            yield Refused(status=400, message=f"this adapter cannot be used: {error}", code="bad_adapter")
        except AWAY as error:
            yield _without_database(error)

    async def forget(self, user: UserId) -> None:
        """The user was deleted: the stack leaves the device, and an anchor the bank's shelf."""
        for slot in self._run.table.forget(user.tenant, user.id):
            _wipe(self._run, STACKS, slot)
        with suppress(*AWAY):  # then the next health check notices
            await self._noticed(await asyncio.to_thread(self.personaliser.follow))
        self._run.unfit = {key for key in self._run.unfit if (key.tenant, key.user) != (user.tenant, user.id)}

    async def reroute(self, anchor: UserId) -> int:
        """New routes for users who cite a retired anchor: a first page at once, the rest behind the answer."""
        done = 0
        with suppress(*AWAY):
            done = await asyncio.to_thread(self.personaliser.reroute, anchor, pages=1)
        self._rerouting.submit(self._reroute_rest, anchor)
        return done

    def _reroute_rest(self, anchor: UserId) -> None:
        try:
            self.personaliser.reroute(anchor)
        except Exception:  # nobody waits for it; whoever was not reached is routed anew by the next question
            log.exception("not all users who cite a retired anchor were routed anew")

    async def bank_version(self) -> str:
        """The bank that is served; answers only where the model is ready to."""
        await self._is_open.wait()
        return self.personaliser.served.version

    async def engine_stats(self) -> EngineStats:
        """How busy this replica is."""
        return self._run.engine.stats()

    async def stack_slots(self) -> SlotStats:
        """The shelf of stacks at this moment."""
        return self._run.table.stats()

    async def check_health(self) -> None:
        """Called by Ray Serve: what happened to banks, anchors and users is noticed without a request too."""
        run = self._run
        if self._is_open.is_set() and not run.engine.is_alive:
            raise RuntimeError("the engine's thread has ended")
        self.store.database.check_place()
        if self._change is not None and self._change.done() and self._change.exception() is not None:
            raise RuntimeError("the bank could not be changed") from self._change.exception()
        try:
            await self._noticed(await asyncio.to_thread(self.personaliser.follow))
            outdated = await asyncio.to_thread(self._outdated, run.table.keys())
        except sa.exc.SQLAlchemyError as error:  # a new replica would not reach the database either
            log.warning("the database does not answer: %s", told_of(error))
            return
        for key in outdated:
            for slot in run.table.forget(key.tenant, key.user):
                _wipe(run, STACKS, slot)
        self.meters.observe(run.engine.stats())

    @serve.multiplexed(max_num_models_per_replica=1000)
    async def _note_home(self, model_id: str) -> str:
        """Tells Ray Serve's router that this replica knows the user; the next request comes here if there is room."""
        return model_id

    # ---- a request on its way in

    async def _admit(self, ask: Ask) -> Admitted:
        while True:
            # 1. the user's route, the prompt, and the stack if it is not on the device
            await self._is_open.wait()
            run = self._run
            try:
                other, personal, request = await asyncio.to_thread(self._prepare, ask)
            except OtherEncoder:  # a long history takes long: nobody else waits for it
                assert ask.user is not None
                await asyncio.get_running_loop().run_in_executor(self._encoding, self.personaliser.model_of, ask.user)
                continue
            await self._noticed(other)
            key = _stack_key(personal.state)
            if key in run.unfit:
                key = None
            stack: Adapter | None = None
            if key is not None and key not in run.table:
                try:
                    stack = await asyncio.to_thread(self._read_stack, key, personal.served)
                except Conflict:
                    continue
                if stack is None:
                    if len(run.unfit) >= UNFIT_MAX:
                        run.unfit.clear()
                    run.unfit.add(key)
                    key = None

            # 2. from here to submit nothing else runs on this loop: whoever finds a stack seated finds it loaded
            is_current = run is self._run and self._is_open.is_set() and personal.served is self.personaliser.served
            if is_current and (key is None or stack is not None or key in run.table):
                return self._submit(run, personal, request, key, stack)

    def _prepare(self, ask: Ask) -> tuple[PublishedBank | None, Personal, Request]:
        began_s = time.perf_counter()
        other = self.personaliser.follow()
        personal = self.personaliser.model_of(ask.user, encodes=False)
        self.meters.personalise_ms.observe((time.perf_counter() - began_s) * 1e3)

        limits, prompts = self.args.limits, self.prompts
        new_tokens = prompts.new_tokens(ask.max_tokens, limits.default_tokens)
        history = self.personaliser.history(ask.user) if ask.user and prompts.needs_history else ()
        with self._tokenising:
            if ask.text is not None:
                ids = prompts.of_text(ask.text, ask.max_tokens or 1)
            else:
                ids = prompts.of_chat(ask.turns, history, new_tokens, least=ask.max_tokens or 1)
        request = Request(
            prompt=ids,
            max_new_tokens=min(new_tokens, prompts.max_tokens - len(ids)),
            routes={} if personal.route is None else {BANK: personal.route},
            sampling=ask.sampling,
            stop_ids=frozenset({prompts.backbone.end_id}),
            owner=ask.user.digest.hex() if ask.user else "",
        )
        return other, personal, request

    def _read_stack(self, key: StackKey, served: ServedBank) -> Adapter | None:
        """The stack, if it is of this base and bank and fits its slot.

        One that was trained here, for another base, bank or rank, is trained anew; a client's own is kept as it is.
        """
        user = UserId(tenant=key.tenant, id=key.user)
        stack = self.store.read_stack(user)
        if stack is None or stack.version != key.version:
            raise Conflict("the stack has changed")
        is_of_here = stack.base_fingerprint == self._fingerprint and stack.rank == self.args.stack.rank
        if stack.bank_version == ANY_BANK and not is_of_here:
            return None
        if stack.bank_version not in (ANY_BANK, served.version) or not is_of_here:
            with suppress(UnknownUser):
                self.queue.enqueue(user)
            return None
        try:
            adapter = from_bytes(stack.tensors, stack.scale)
            check_fit(self.routed.layers, STACKS, adapter)
            check_values(adapter)
        except ValueError as error:
            log.warning("a stack of %d bytes cannot be used: %s", len(stack.tensors), error)
            return None
        return adapter

    def _submit(
        self, run: Running, personal: Personal, request: Request, key: StackKey | None, stack: Adapter | None
    ) -> Admitted:
        seat: Seat | None = None
        is_loading = False
        try:
            if key is not None:
                seat = run.table.acquire(key)
                (self.meters.stack_misses if seat.is_new else self.meters.stack_hits).inc()
                own = Route(slots=(seat.slot,), weights=(1.0,))
                request = replace(request, routes={**request.routes, STACKS: own})
                if seat.is_new:
                    assert stack is not None
                    loop = asyncio.get_running_loop()
                    loading = run.engine.load(STACKS, seat.slot, stack)
                    is_loading = True
                    loading.add_done_callback(lambda done: loop.call_soon_threadsafe(self._see_loaded, run, key, done))
            ticket = run.engine.submit(request, asynchronous=True)
        except BaseException:
            if seat is not None and key is not None:
                if seat.is_new and not is_loading:
                    run.table.forget(key.tenant, key.user)  # or the next request would find what lay there before
                if run.table.release(seat.slot):
                    _wipe(run, STACKS, seat.slot)
            raise
        slot = None if seat is None else seat.slot
        return Admitted(run=run, ticket=ticket, bank_version=personal.served.version, slot=slot)

    def _see_loaded(self, run: Running, key: StackKey, loading: Future[None]) -> None:
        """A stack that could not be loaded left its slot empty: this answer is of the bank alone, the next one tries
        again."""
        error = loading.exception()
        if error is None:
            return
        log.error("a stack could not be loaded: %s", type(error).__name__)
        for slot in run.table.forget(key.tenant, key.user):
            _wipe(run, STACKS, slot)

    # ---- the bank

    def _running(self, served: ServedBank) -> Running:
        """The bank on the model's shelf, an empty shelf for stacks, and an engine over both."""
        served.bank.load_into(self.routed.layers, BANK)
        stack = self.args.stack
        self.routed.add_shelf(STACKS, slots=self.args.stack_slots, rank=stack.rank, alpha=stack.alpha)
        engine = Engine(self.routed, (BANK, STACKS), self.args.engine)
        run = Running(engine=engine, table=SlotTable(self.args.stack_slots))
        engine.start()
        for slot in served.retired:
            _wipe(run, BANK, slot)
        run.wiped = served.retired
        log.info("bank %s: %d anchors, %d out of service", served.version, len(served.bank), len(served.retired))
        return run

    async def _noticed(self, other: PublishedBank | None) -> None:
        """Empty the slots of retired anchors; begin to change to another bank."""
        run, served = self._run, self.personaliser.served
        for slot in served.retired - run.wiped:
            _wipe(run, BANK, slot)
        run.wiped = run.wiped | served.retired
        if other is None or (self._change is not None and not self._change.done()):
            return
        version, not_before_s = self._not_taken
        if other.bank.version != version or time.monotonic() >= not_before_s:
            self._change = asyncio.create_task(self._change_bank(other))

    async def _change_bank(self, published: PublishedBank) -> None:
        """Load the bank beside the present one, let the requests under way end, then serve it: the others wait."""
        try:
            served = await asyncio.to_thread(
                load_served, published, base_fingerprint=self._fingerprint, fusion=self.args.fusion
            )
            encoder = self.personaliser.encoder
            if encoder.source != served.bank.encoder:
                encoder = await asyncio.to_thread(Encoder, served.bank.encoder, device=self.args.device)
        except (OSError, ValueError) as error:
            log.error("bank %s is not taken, the old one is served on: %s", published.bank.version, error)
            self._not_taken = (published.bank.version, time.monotonic() + RELOAD_AFTER_S)
            return
        self._is_open.clear()
        await asyncio.to_thread(self._run.engine.close, drain=True)
        run = await asyncio.to_thread(self._running, served)
        self.personaliser.take(served, encoder)
        self._run = run
        self._is_open.set()

    def _outdated(self, keys: Sequence[StackKey]) -> list[StackKey]:
        """Stacks on the device that are not their user's any more."""
        users = {key: UserId(tenant=key.tenant, id=key.user) for key in keys}
        versions = self.store.stack_versions(users.values()) if users else {}
        return [key for key, user in users.items() if versions.get(user) != key.version]


def _stack_key(state: UserState | None) -> StackKey | None:
    if state is None or state.stack_version is None:
        return None
    return StackKey(tenant=state.user.tenant, user=state.user.id, version=state.stack_version)


def _without_database(error: Exception) -> Refused:
    log.warning("the database does not answer: %s", told_of(error))
    return NO_DATABASE


def _wipe(run: Running, shelf: str, slot: int) -> None:
    with suppress(EngineClosed):  # its shelves are gone with it
        run.engine.wipe(shelf, slot)
