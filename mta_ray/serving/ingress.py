"""The deployment that clients talk to: OpenAI's endpoint and ours, in front of the replicas.

It knows keys, limits and the wire format, and no model; it may run anywhere and in any number.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, nullcontext, suppress
from dataclasses import replace
from itertools import count
from urllib.parse import unquote_to_bytes

import sqlalchemy as sa
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.routing import Match

from mta_ray.model.settings import Sampling
from mta_ray.serving import openapi
from mta_ray.serving.answers import (
    END_OF_STREAM,
    Health,
    Model,
    ModelList,
    StackAccepted,
    UserDeleted,
    error_answer,
    error_of,
    to_event,
    to_json,
    user_view,
)
from mta_ray.serving.args import ServingArgs
from mta_ray.serving.banks import Banks, UnknownBank
from mta_ray.serving.database import AWAY, open_existing, told_of
from mta_ray.serving.doorkeeper import Doorkeeper
from mta_ray.serving.exchange import (
    CROWDED,
    NO_DATABASE,
    REPLICA_AFTER_S,
    RETRY_AFTER_S,
    Ask,
    NewHistory,
    NewStack,
    Part,
    Refused,
    Started,
    Stored,
    Taken,
    Turn,
)
from mta_ray.serving.identity import UserId
from mta_ray.serving.keys import Keys
from mta_ray.serving.router import home_of
from mta_ray.serving.schema import (
    BadRequest,
    ChatRequest,
    CompletionRequest,
    HistoryRequest,
    alpha_of,
    parse,
    user_id,
)
from mta_ray.serving.stack_queue import StackQueue
from mta_ray.serving.user_state import UserState
from mta_ray.serving.user_store import UnknownUser, UserStore
from mta_ray.serving.voices import ChatVoice, CompletionVoice, Voice

log = logging.getLogger(__name__)
NO_REPLICA = (BackPressureError, DeploymentUnavailableError)
"""What Ray Serve raises when no replica takes a call, and no more calls may wait for one."""
BANK_HEADER = "x-mta-bank-version"
READY_TIMEOUT_S = 5.0
NOTICE_TIMEOUT_S = 5.0
TRIES = 3
"""Of a question whose replica died, or is crowded. No more, for the question may be what they die of."""
RUSH_S = 3.0
"""A call that waits longer for a replica waits for one that is not there yet."""
HOLD_S = 60.0
"""How long a call is held while no replica takes it; a dead one is replaced in less, unless its model is large."""


class Ingress:
    """The endpoints, each a few lines."""

    def __init__(self, args: ServingArgs, model: DeploymentHandle, stacker: DeploymentHandle) -> None:
        self.args, self.limits = args, args.limits
        self.model, self.stacker = model, stacker
        database = self.database = open_existing(args.database)
        self.store, self.banks = UserStore(database, args.history), Banks(database)
        self.queue = StackQueue(database, args.queue)
        self._door = Doorkeeper(Keys(database), args.limits, local_tenant=args.tenant)
        self._training: asyncio.Task[None] | None = None
        self._waits: dict[object, float] = {}  # calls that no replica has taken yet, since when; the oldest first
        self._started_s = int(time.time())

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = FastAPI(
            title="mta_ray",
            docs_url=None,
            redoc_url=None,
            redirect_slashes=False,
            generate_unique_id_function=lambda route: route.name,
        )
        for kind in (BadRequest, HTTPException, UnknownUser, *AWAY, Exception):
            app.add_exception_handler(kind, self._told)
        add = app.add_api_route
        add("/healthz", self.healthz, methods=["GET"], **openapi.HEALTHZ)
        add("/readyz", self.readyz, methods=["GET"], **openapi.READYZ)
        add("/v1/models", self.models, methods=["GET"], **openapi.MODELS)
        add("/v1/models/{model:path}", self.one_model, methods=["GET"], **openapi.MODEL)
        add("/v1/chat/completions", self.chat, methods=["POST"], **openapi.CHAT)
        add("/v1/completions", self.completions, methods=["POST"], **openapi.COMPLETIONS)
        add("/v1/users/{user:path}/history", self.put_history, methods=["PUT"], **openapi.PUT_HISTORY)
        add("/v1/users/{user:path}/stack", self.ask_stack, methods=["POST"], **openapi.ASK_STACK)
        add("/v1/users/{user:path}/stack", self.put_stack, methods=["PUT"], **openapi.PUT_STACK)
        add("/v1/users/{user:path}", self.read_user, methods=["GET"], **openapi.READ_USER)
        add("/v1/users/{user:path}", self.delete_user, methods=["DELETE"], **openapi.DELETE_USER)
        told = openapi.whole(app, self.args.model_name)
        app.openapi = lambda: told  # type: ignore[method-assign]
        return app

    async def check_health(self) -> None:
        """Called by Ray Serve: users who wait for a stack after a restart are not forgotten, nor are deletions."""
        await asyncio.to_thread(self.database.check_place)
        try:
            await asyncio.to_thread(self.database.forget_owed_pages)
            await self._train_if_asked()
        except sa.exc.SQLAlchemyError as error:  # a new ingress would not reach the database either
            log.warning("the database does not answer: %s", told_of(error))

    # ---- OpenAI's

    async def chat(self, request: Request) -> Response:
        tenant = await self._door.tenant(request)
        body = parse(ChatRequest, await self._door.body(request, tenant), self.limits)
        turns = tuple(Turn(role=message.role, text=message.text) for message in body.messages)
        voice = ChatVoice(id=f"chatcmpl-{secrets.token_hex(12)}", model=body.model, created=int(time.time()))
        return await self._answer(body, self._ask(body, tenant, turns=turns), voice)

    async def completions(self, request: Request) -> Response:
        tenant = await self._door.tenant(request)
        body = parse(CompletionRequest, await self._door.body(request, tenant), self.limits)
        voice = CompletionVoice(id=f"cmpl-{secrets.token_hex(12)}", model=body.model, created=int(time.time()))
        return await self._answer(body, self._ask(body, tenant, text=body.text), voice)

    async def models(self, request: Request) -> Response:
        await self._door.tenant(request)
        return await self._json(ModelList(data=[Model(id=self.args.model_name, created=self._started_s)]))

    async def one_model(self, model: str, request: Request) -> Response:
        await self._door.tenant(request)
        self._check_model(model)
        return await self._json(Model(id=self.args.model_name, created=self._started_s))

    # ---- users

    async def put_history(self, user: openapi.UserInPath, request: Request) -> Response:
        who = await self._who(user, request)
        body = parse(HistoryRequest, await self._door.body(request, who.tenant), self.limits)
        new = NewHistory(
            user=who,
            items=tuple(body.history_items()),
            task=body.task,
            replaces=body.mode == "replace",
            expected_version=body.expected_version,
        )
        return await self._stored(self._at_home(who).put_history, new)

    async def read_user(self, user: openapi.UserInPath, request: Request) -> Response:
        who = await self._who(user, request)
        return await self._view(await asyncio.to_thread(self.store.read, who))

    async def delete_user(self, user: openapi.UserInPath, request: Request) -> Response:
        who = await self._who(user, request)
        was_anchor = await asyncio.to_thread(self.store.delete, who)
        # A replica that cannot be reached now notices by itself: at its next request, or its next health check.
        with suppress(TimeoutError, RayActorError, *NO_REPLICA):
            async with asyncio.timeout(NOTICE_TIMEOUT_S):
                await self.model.broadcast("forget", who).results_async(return_exceptions=True)
                if was_anchor:
                    await self.model.reroute.remote(who)
        return await self._json(UserDeleted(id=who.id, was_anchor=was_anchor))

    async def ask_stack(self, user: openapi.UserInPath, request: Request) -> Response:
        who = await self._who(user, request)
        state = await asyncio.to_thread(self.store.read, who)
        if not state.items:
            raise BadRequest("the user has no history to train on; put one first", param="user", code="no_history")
        await asyncio.to_thread(self.queue.enqueue, who)
        status = await asyncio.to_thread(self.queue.status, who)
        await self._train_if_asked()
        return await self._json(StackAccepted(id=who.id, status=status), status=202)

    async def put_stack(self, user: openapi.UserInPath, request: Request) -> Response:
        who = await self._who(user, request)
        new = NewStack(
            user=who,
            tensors=await self._door.body(request, who.tenant),
            alpha=alpha_of(request.query_params.get("alpha")),
            base_fingerprint=request.query_params.get("base_fingerprint"),
        )
        return await self._stored(self._at_home(who).put_stack, new)

    # ---- the machine's

    async def healthz(self) -> Response:
        return Response(to_json(Health(status="ok")), media_type="application/json")

    async def readyz(self) -> Response:
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                version = await self.model.bank_version.remote()
        except (TimeoutError, RayActorError, *NO_REPLICA):
            return self._refusal(Refused(status=503, message="no replica answers yet", retry_after_s=RETRY_AFTER_S))
        answer = to_json(Health(status="ready"))
        return Response(answer, media_type="application/json", headers={BANK_HEADER: version})

    # ---- questions

    async def _who(self, user: str, request: Request) -> UserId:
        tenant = await self._door.tenant(request)
        _check_escapes(request)
        return UserId(tenant=tenant, id=user_id(user, self.limits))

    def _ask(
        self,
        body: ChatRequest | CompletionRequest,
        tenant: str,
        *,
        turns: tuple[Turn, ...] = (),
        text: str | None = None,
    ) -> Ask:
        self._check_model(body.model)
        given = None if _tokens_wanted(body) is None else body.tokens_allowed(self.limits)
        return Ask(
            user=None if body.user is None else UserId(tenant=tenant, id=body.user),
            turns=turns,
            text=text,
            max_tokens=given,
            sampling=Sampling(
                temperature=1.0 if body.temperature is None else body.temperature,
                top_p=1.0 if body.top_p is None else body.top_p,
                seed=secrets.randbits(32) if body.seed is None else body.seed,  # so that it can be said again
                logprobs=body.logprobs_wanted,
            ),
            stops=body.stops,
        )

    def _check_model(self, name: str) -> None:
        if name != self.args.model_name:
            message = f"there is no model of this name; this one is called {self.args.model_name}"
            raise BadRequest(message, status=404, param="model", code="model_not_found")

    async def _answer(self, body: ChatRequest | CompletionRequest, ask: Ask, voice: Voice) -> Response:
        events = self._events(ask)
        started = await anext(events)
        if isinstance(started, Refused):
            return self._refusal(started)
        assert isinstance(started, Started)
        headers = {BANK_HEADER: started.bank_version}
        if body.stream:
            told = _as_events(events, voice, started.prompt_tokens if body.wants_usage else None)
            return StreamingResponse(told, media_type="text/event-stream", headers=headers)
        parts: list[Part] = []
        async for event in events:
            if isinstance(event, Refused):
                return self._refusal(event)
            assert isinstance(event, Part)
            parts.append(event)
        return Response(
            to_json(voice.whole(parts, started.prompt_tokens)), media_type="application/json", headers=headers
        )

    async def _events(self, ask: Ask) -> AsyncGenerator[Started | Part | Refused, None]:
        """What the replica says. Closed early (the client is gone), the request is cancelled there.

        Where the replica dies, another one says it again, and goes on where the first one stopped. Should it say
        anything else (the user has a new stack, say), the answer breaks off: it is never of two models.
        """
        told: list[Started | Part | Refused] = []
        is_crowded = False
        for tries_left in reversed(range(TRIES)):
            replica = self._at_home(ask.user) if tries_left and not is_crowded else self.model
            # by gRPC: as an object in Ray's store each piece would take 1 ms more
            answer = replica.options(stream=True, _by_reference=False).generate.remote(ask)
            is_over = False
            try:
                for number in count():
                    async with nullcontext() if number else self._waiting():
                        event = await anext(answer, None)
                    if event is None:
                        is_over = True
                        return
                    if event == CROWDED:
                        is_crowded = True
                        break
                    if number == len(told):
                        told.append(event)
                        yield event
                    elif not _is_same(event, told[number]):
                        raise _busy(RETRY_AFTER_S)
            except RayActorError:
                is_over = True
                if not tries_left:
                    raise _busy(RETRY_AFTER_S) from None
            except NO_REPLICA:
                is_over = True
                raise _busy(self._retry_after_s()) from None
            except TimeoutError:
                raise _busy(REPLICA_AFTER_S) from None
            finally:
                if not is_over:
                    answer.cancel()

    @asynccontextmanager
    async def _waiting(self) -> AsyncIterator[None]:
        """A call waits for a replica: not for ever, and so that others can be told how long it has been."""
        call = object()
        self._waits[call] = time.monotonic()
        try:
            async with asyncio.timeout(HOLD_S):
                yield
        finally:
            del self._waits[call]

    def _retry_after_s(self) -> int:
        """When a call that found no room may come again: soon in a rush, later where nobody is taken at all."""
        waited_s = time.monotonic() - next(iter(self._waits.values()), time.monotonic())
        return RETRY_AFTER_S if waited_s < RUSH_S else REPLICA_AFTER_S

    async def _stored(self, put: DeploymentHandle, new: NewHistory | NewStack) -> Response:
        told = put.options(stream=True).remote(new)
        try:
            async with self._waiting():
                taken = await anext(told)
            assert isinstance(taken, Taken)
            stored: Stored | Refused = await anext(told)
        except RayActorError:  # it may be stored or not
            raise _busy(RETRY_AFTER_S) from None
        except NO_REPLICA:
            raise _busy(self._retry_after_s()) from None
        except TimeoutError:  # nobody took it
            told.cancel()
            raise _busy(REPLICA_AFTER_S) from None
        return self._refusal(stored) if isinstance(stored, Refused) else await self._view(stored.state)

    def _at_home(self, user: UserId | None) -> DeploymentHandle:
        """The replica that has the user's stack, or any."""
        return self.model if user is None else self.model.options(multiplexed_model_id=home_of(user))

    async def _train_if_asked(self) -> None:
        """See to it that a trainer runs while users wait; Ray Serve starts one for the call, and ends it after."""
        if self._training is not None and not self._training.done():
            return
        if await asyncio.to_thread(self.queue.waiting):
            self._training = asyncio.create_task(self._train())

    async def _train(self) -> None:
        try:
            while await asyncio.to_thread(self.queue.waiting):
                await self.stacker.train.remote()
        except (RayActorError, RayTaskError, *NO_REPLICA, *AWAY) as error:  # users wait on, until the next health check
            log.warning("the stacks' trainer is gone: %s", type(error).__name__)

    # ---- what goes out

    async def _json(self, answer: BaseModel, *, status: int = 200) -> Response:
        version = (await asyncio.to_thread(self.banks.state)).active_version
        headers = {BANK_HEADER: version} if version else {}
        return Response(to_json(answer), status, media_type="application/json", headers=headers)

    async def _view(self, state: UserState) -> Response:
        def build() -> BaseModel:
            active = self.banks.state().active_version
            slots: dict[UserId, int] = {}
            with suppress(UnknownBank):
                if state.route is not None:
                    bank = self.banks.get(state.route.bank_version)
                    slots = {a: s for s, a in enumerate(bank.bank.anchors) if s not in bank.retired_slots}
            job, failure = self.queue.status(state.user), self.queue.failure(state.user)
            return user_view(state, slots=slots, active_bank=active, job=job, failure=failure)

        return await self._json(await asyncio.to_thread(build))

    async def _told(self, request: Request, error: Exception) -> Response:
        """Every error of every endpoint, in OpenAI's shape."""
        if isinstance(error, BadRequest):
            retry = {"retry-after": str(error.retry_after_s)} if error.retry_after_s else {}
            return Response(error_of(error).body(), error.status, media_type="application/json", headers=retry)
        if isinstance(error, UnknownUser):
            return self._refusal(Refused(status=404, message="no such user", param="user", code="user_not_found"))
        if isinstance(error, AWAY):
            log.warning("the database does not answer: %s", told_of(error))
            return self._refusal(NO_DATABASE)
        if isinstance(error, HTTPException):
            answer = self._refusal(Refused(status=error.status_code, message=str(error.detail)))
            if error.status_code == 405:
                answer.headers["allow"] = _allowed(request)
            return answer
        return self._refusal(Refused(status=500, message="something went wrong here", code="internal_error"))

    def _refusal(self, refused: Refused) -> Response:
        answer = error_answer(refused.status, refused.message, param=refused.param, code=refused.code)
        headers = {"retry-after": str(refused.retry_after_s)} if refused.retry_after_s else {}
        return Response(answer.body(), refused.status, media_type="application/json", headers=headers)


def _check_escapes(request: Request) -> None:
    """Percent escapes that are no UTF-8 reach us as U+FFFD: one user where the client has several. A line break at the
    end of a path is lost in Starlette's routes: bob's would be bob."""
    try:
        path = unquote_to_bytes(request.scope.get("raw_path", b"")).decode()
    except UnicodeDecodeError:
        raise BadRequest("user: the percent escapes are no UTF-8", param="user") from None
    if "\n" in path:
        raise BadRequest("user: the path holds a line break", param="user")


def _allowed(request: Request) -> str:
    """The methods of a path, which several endpoints may share."""
    there = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
    return ", ".join(sorted({method for route in there if route.path == there[0].path for method in route.methods}))


def _busy(retry_after_s: int) -> BadRequest:
    """503 in our words: Ray Serve would tell it in its own."""
    error = BadRequest("the server is busy; send the request again", status=503, code="busy")
    error.retry_after_s = retry_after_s
    return error


def _is_same(one: Started | Part | Refused, other: Started | Part | Refused) -> bool:
    """Log-probabilities apart: their last digits depend on what else was in the batch."""
    if isinstance(one, Part) and isinstance(other, Part):
        return replace(one, told=()) == replace(other, told=())
    return one == other


async def _as_events(
    events: AsyncGenerator[Started | Part | Refused, None], voice: Voice, prompt_tokens: int | None
) -> AsyncIterator[bytes]:
    """A stream of OpenAI's chunks. `prompt_tokens`: the last one tells the usage."""
    tokens = 0
    try:
        async with aclosing(events):
            async for event in events:
                if isinstance(event, Refused):
                    raise BadRequest(event.message, status=event.status, param=event.param, code=event.code)
                if isinstance(event, Part):
                    tokens = event.tokens
                    yield to_event(voice.chunk(event))
    except BadRequest as error:  # the status has been sent; the official client raises this one
        yield b"data: " + error_of(error).body() + b"\n\n"
        return
    if prompt_tokens is not None:
        yield to_event(voice.last(prompt_tokens, tokens))
    yield END_OF_STREAM


def _tokens_wanted(body: ChatRequest | CompletionRequest) -> int | None:
    return getattr(body, "max_completion_tokens", None) or body.max_tokens
