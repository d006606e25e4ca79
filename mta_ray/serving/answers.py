"""What goes out: OpenAI's answers, chunks and errors, and our views of a user. Built by the app, read by any client."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel

from mta_ray.serving.identity import UserId
from mta_ray.serving.schema import BadRequest
from mta_ray.serving.stack_queue import Status
from mta_ray.serving.user_state import UserState

FinishReason = Literal["stop", "length"]
StackStatus = Status | Literal["ready"]


def to_json(answer: BaseModel) -> bytes:
    """An answer's body; what is none is left out."""
    return answer.model_dump_json(exclude_none=True).encode()


def to_event(answer: BaseModel) -> bytes:
    """A chunk of a stream, as a server-sent event."""
    return b"data: " + to_json(answer) + b"\n\n"


END_OF_STREAM = b"data: [DONE]\n\n"


# ---- errors


class ErrorFields(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """OpenAI's error shape, with all four fields, none or not: to be dumped whole."""

    error: ErrorFields

    def body(self) -> bytes:
        return self.model_dump_json().encode()


def error_answer(status: int, message: str, *, param: str | None = None, code: str | None = None) -> ErrorAnswer:
    """The error of an HTTP status."""
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return ErrorAnswer(error=ErrorFields(message=message, type=kind, param=param, code=code))


def error_of(error: BadRequest) -> ErrorAnswer:
    """What the client is told about its request."""
    return error_answer(error.status, str(error), param=error.param, code=error.code)


# ---- OpenAI


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None = None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob] = []


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    index: int = 0
    message: AssistantMessage
    finish_reason: FinishReason
    logprobs: ChatLogprobs | None = None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    index: int = 0
    delta: Delta
    finish_reason: FinishReason | None = None
    logprobs: ChatLogprobs | None = None


class ChatCompletionChunk(BaseModel):
    """The last one of a stream that was asked for it has `usage` and no choices."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None = None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int = 0
    text: str
    finish_reason: FinishReason | None = None
    """None in the chunks of a stream but the last."""
    logprobs: CompletionLogprobs | None = None


class Completion(BaseModel):
    """An answer, and in a stream every chunk of it."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "mta_ray"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


# ---- ours


class Health(BaseModel):
    """GET /healthz and /readyz."""

    status: Literal["ok", "ready"]


class AnchorView(BaseModel):
    """One of the anchors that a user is made of."""

    slot: int
    """In the bank."""
    weight: float
    user: str | None = None
    """Its id, where it belongs to the same tenant: other tenants' users have no name here."""


class UserView(BaseModel):
    """GET /v1/users/{id}.

    `stack_status` is `none` (never asked for), `waiting`, `training`, `ready` (answers use it, if base, bank and rank
    are still those that are served: else the next question has it trained anew, but for a client's own, which waits
    for its base to come back), or `failed` (given up until it is asked for again).
    """

    id: str
    object: Literal["user"] = "user"
    task: str
    version: int
    history_items: int
    history_bytes: int
    history_digest: str
    bank_version: str | None = None
    """That the anchors below are of."""
    anchors: list[AnchorView]
    """Empty: the cold start, every anchor of the bank alike."""
    is_route_current: bool
    """False: computed for an older history or bank; the next request computes it anew."""
    stack_version: int | None = None
    stack_bytes: int
    stack_status: StackStatus
    stack_failure: str | None = None
    """In a word, what went wrong with the last try to train it, such as `no examples`."""
    created_at: int
    updated_at: int


class StackAccepted(BaseModel):
    """POST /v1/users/{id}/stack: 202."""

    id: str
    object: Literal["user.stack"] = "user.stack"
    status: StackStatus


class UserDeleted(BaseModel):
    """DELETE /v1/users/{id}."""

    id: str
    object: Literal["user.deleted"] = "user.deleted"
    deleted: Literal[True] = True
    was_anchor: bool


def user_view(
    state: UserState, *, slots: Mapping[UserId, int], active_bank: str | None, job: Status, failure: str | None = None
) -> UserView:
    """A user as its own tenant may see it; `slots` are those in service of its route's bank, `job` its stack's."""
    route = state.route
    anchors = [
        AnchorView(slot=slots[anchor], weight=weight, user=anchor.id if anchor.tenant == state.user.tenant else None)
        for anchor, weight in (zip(route.anchors, route.weights, strict=True) if route else ())
        if anchor in slots
    ]
    return UserView(
        id=state.user.id,
        task=state.task,
        version=state.version,
        history_items=state.items,
        history_bytes=state.history_bytes,
        history_digest=state.history_digest,
        bank_version=route.bank_version if route else None,
        anchors=anchors,
        is_route_current=active_bank is not None
        and state.has_route_for(active_bank)
        and len(anchors) == len(route.anchors if route else ()),
        stack_version=state.stack_version,
        stack_bytes=state.stack_bytes,
        stack_status="ready" if job == "none" and state.stack_version is not None else job,
        stack_failure=failure,
        created_at=int(state.created_at_s),
        updated_at=int(state.updated_at_s),
    )
