"""OpenAI's wire format and ours, as bytes that come in: checked against limits, and refused in OpenAI's error shape.

Fields that OpenAI's clients send and that change nothing here are accepted and ignored; those that would make an answer
of another kind (n > 1, tools, JSON mode) are refused. What goes out is `answers`.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from mta_ray.lamp.tasks import TASKS, Task, task_named
from mta_ray.lamp.users import HistoryItem
from mta_ray.serving.identity import ID_CHARS_MAX, check_name

FREE_TEXT = "free_text"
"""The task of users of whom texts are known, and no questions."""
ALPHA_MAX = 1e4
"""Of an adapter that a client sends."""
RequestT = TypeVar("RequestT", bound="Request")
Info = Any
"""pydantic's ValidationInfo, a protocol that cannot be checked at run time; its `context` are the Limits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much a request may ask for."""

    body_mib: float = 4.0
    """The whole request."""
    upload_s: float = 30.0
    """Within which its body has to come."""
    uploads: int = 128
    """Of one tenant at once, in each ingress process: bodies that have not come whole yet."""
    prompt_chars: int = 200_000
    """All messages together; the model's own limit, in tokens, is checked where there is a tokenizer."""
    messages: int = 1000
    """In one chat."""
    max_tokens: int = 4096
    """That an answer may have."""
    default_tokens: int = 256
    """That an answer has at most where the request does not say."""
    history_items: int = 1000
    """In one request; how many a user may have in all is `HistoryLimits`."""
    text_chars: int = 20_000
    """Of one text in a history item."""
    id_chars: int = ID_CHARS_MAX
    """Of the id of a user or an item."""
    stop_chars: int = 256
    """Of one stop text."""

    def __post_init__(self) -> None:
        if self.upload_s <= 0 or self.uploads < 1:
            raise ValueError(f"upload_s is {self.upload_s} and uploads {self.uploads}, wanted above 0 and at least 1")
        if self.default_tokens > self.max_tokens:
            raise ValueError(f"default_tokens is {self.default_tokens}, wanted at most max_tokens, {self.max_tokens}")
        if self.id_chars > ID_CHARS_MAX:
            raise ValueError(f"id_chars is {self.id_chars}, wanted at most {ID_CHARS_MAX}, which the store can hold")


class BadRequest(ValueError):
    """What the client sent cannot be served: an HTTP status, and the fields of OpenAI's error."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after_s: int | None = None
        """Set where the same request may be served later."""


class Request(BaseModel):
    """A body that is read strictly: "5" is no number and 1 is not true. Unknown fields are ignored."""

    model_config = ConfigDict(
        strict=True, extra="ignore", allow_inf_nan=False, frozen=True, use_attribute_docstrings=True
    )


def parse(kind: type[RequestT], body: bytes, limits: Limits) -> RequestT:
    """The request in a body, or BadRequest: 413 where it is too large, else 400 with the field that is wrong."""
    if len(body) > limits.body_mib * 2**20:
        raise BadRequest(
            f"the body has {len(body)} bytes, allowed are {limits.body_mib:g} MiB", code="body_too_large", status=413
        )
    try:
        return kind.model_validate_json(body, context=limits)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        param = _param(first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = f"unknown field {str(first['loc'][-1])[:64]!r}; known are {', '.join(kind.model_fields)}"
        code = "invalid_json" if first["type"] == "json_invalid" else "missing" if first["type"] == "missing" else None
        code = "unknown_field" if first["type"] == "extra_forbidden" else code
        raise BadRequest(f"{param}: {message}" if param else message, param=param, code=code) from None


def user_id(text: str, limits: Limits) -> str:
    """A user's id from a path, checked as one in a body is."""
    try:
        check_name(text, "user", limits.id_chars)
    except ValueError as error:
        raise BadRequest(str(error), param="user") from None
    return text


def alpha_of(text: str | None) -> float | None:
    """The alpha of an adapter, from a query string; none where it is not said."""
    if text is None:
        return None
    try:
        alpha = float(text)
    except ValueError:
        alpha = math.nan
    if not 0 < alpha <= ALPHA_MAX:
        raise BadRequest(f"alpha must be a number above 0, at most {ALPHA_MAX:g}", param="alpha")
    return alpha


# ---- OpenAI's requests


class StreamOptions(Request):
    include_usage: bool | None = None


class _Generation(Request):
    """What chat and completions have in common."""

    model: str = Field(min_length=1, max_length=256)
    user: str | None = None
    """Whose model answers; none: the model of a user without history."""
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    stop: str | list[str] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stream: bool | None = Field(default=None, examples=[False, True])
    stream_options: StreamOptions | None = None
    n: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    @field_validator("user")
    @classmethod
    def _user(cls, value: str | None, info: Info) -> str | None:
        if value is not None:
            check_name(value, "user", _limits(info).id_chars)
        return value

    @field_validator("max_tokens", "max_completion_tokens", check_fields=False)
    @classmethod
    def _max_tokens(cls, value: int | None, info: Info) -> int | None:
        if value is not None and value > _limits(info).max_tokens:
            raise ValueError(f"at most {_limits(info).max_tokens} tokens, got {value}")
        return value

    @field_validator("stop")
    @classmethod
    def _stop(cls, value: str | list[str] | None, info: Info) -> str | list[str] | None:
        texts = [value] if isinstance(value, str) else value or []
        longest = _limits(info).stop_chars
        if len(texts) > 4 or any(not 0 < len(text) <= longest for text in texts):
            raise ValueError(f"at most 4 texts of 1 to {longest} characters")
        return value

    @field_validator("n")
    @classmethod
    def _n(cls, value: int | None) -> int | None:
        if value not in (None, 1):
            raise ValueError("only 1 is served; send the request again for another answer")
        return value

    @field_validator("stream_options")
    @classmethod
    def _of_a_stream(cls, value: StreamOptions | None, info: Info) -> StreamOptions | None:
        if value is not None and not info.data.get("stream"):
            raise ValueError("needs stream: true")
        return value

    @field_validator(
        *("tools", "functions", "echo", "suffix", "frequency_penalty", "presence_penalty", "logit_bias"),
        check_fields=False,
    )
    @classmethod
    def _not_served(cls, value: Any) -> Any:
        if value:
            raise ValueError("is not served here; leave it out")
        return value

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk that counts tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def tokens_allowed(self, limits: Limits) -> int:
        return self.max_tokens or limits.default_tokens


class ContentPart(Request):
    type: str
    text: str | None = None


class Message(Request):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None

    @field_validator("content")
    @classmethod
    def _only_text(cls, value: str | list[ContentPart] | None) -> str | list[ContentPart] | None:
        if isinstance(value, list) and any(part.type != "text" or part.text is None for part in value):
            raise ValueError("only parts of type text are served")
        return value

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text or "" for part in self.content)
        return self.content or ""


class ResponseFormat(Request):
    type: Literal["text"]


class ChatRequest(_Generation):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, examples=[[{"role": "user", "content": "who are you?"}]])
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    response_format: ResponseFormat | None = None

    @field_validator("messages")
    @classmethod
    def _size(cls, value: list[Message], info: Info) -> list[Message]:
        limits = _limits(info)
        if len(value) > limits.messages:
            raise ValueError(f"at most {limits.messages} messages, got {len(value)}")
        _check_length(sum(len(message.text) for message in value), limits.prompt_chars)
        return value

    @field_validator("top_logprobs")
    @classmethod
    def _of_logprobs(cls, value: int | None, info: Info) -> int | None:
        if value is not None and not info.data.get("logprobs"):
            raise ValueError("needs logprobs: true")
        return value

    @property
    def logprobs_wanted(self) -> int | None:
        """Alternatives to tell beside each token; none: no log probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def tokens_allowed(self, limits: Limits) -> int:
        return self.max_completion_tokens or super().tokens_allowed(limits)


class CompletionRequest(_Generation):
    """POST /v1/completions."""

    prompt: str | list[str] = Field(examples=["once upon a time"])
    logprobs: int | None = Field(default=None, ge=0, le=5)
    best_of: int | None = Field(default=None, ge=1, le=1)
    echo: bool | None = None
    suffix: str | None = None

    @field_validator("prompt")
    @classmethod
    def _one(cls, value: str | list[str], info: Info) -> str | list[str]:
        if isinstance(value, list) and len(value) != 1:
            raise ValueError(f"one prompt a request, got {len(value)}")
        _check_length(len(value if isinstance(value, str) else value[0]), _limits(info).prompt_chars)
        return value

    @property
    def text(self) -> str:
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]

    @property
    def logprobs_wanted(self) -> int | None:
        return self.logprobs


# ---- ours


class ItemBody(Request):
    """One history item: `content` and `target`, or the fields that LaMP's files give them for the task, or `text`."""

    id: str | int | None = None
    date: str | None = None
    content: str | None = None
    target: str | None = None
    title: str | None = None
    text: str | None = None
    abstract: str | None = None
    description: str | None = None
    tag: str | None = None
    category: str | None = None
    score: str | int | None = None
    citation: str | None = None

    TEXTS: ClassVar = ("content", "target", "title", "text", "abstract", "description", "tag", "category", "citation")

    @field_validator("id")
    @classmethod
    def _id(cls, value: str | int | None, info: Info) -> str | None:
        if value is not None:
            check_name(str(value), "item id", _limits(info).id_chars)
        return None if value is None else str(value)

    @field_validator(*TEXTS)
    @classmethod
    def _text(cls, value: str | None, info: Info) -> str | None:
        _check_length(len(value or ""), _limits(info).text_chars)
        return value

    @field_validator("score")
    @classmethod
    def _score(cls, value: str | int | None, info: Info) -> str | None:
        _check_length(len(str(value or "")), 100)
        return None if value is None else str(value)

    @field_validator("date")
    @classmethod
    def _date(cls, value: str | None) -> str | None:
        return None if value is None else _iso(value)


class HistoryRequest(Request):
    """PUT /v1/users/{id}/history. An unknown field is refused: a misspelt `expected_version` would protect nothing."""

    model_config = ConfigDict(extra="forbid")

    task: str = FREE_TEXT
    items: list[ItemBody | str] = Field(examples=[["what the user wrote", {"text": "and more", "date": "2024-01-31"}]])
    """A bare text is an item of the task `free_text`."""
    mode: Literal["append", "replace"] = "append"
    expected_version: int | None = Field(default=None, ge=0)
    """Refused with 409 where the history has another; 0: where there is one already."""

    @field_validator("task")
    @classmethod
    def _task(cls, value: str) -> str:
        if value == FREE_TEXT:
            return value
        try:
            return task_named(value).name
        except ValueError:
            raise ValueError(f"unknown task; one of {FREE_TEXT}, {', '.join(TASKS)}") from None

    @field_validator("items")
    @classmethod
    def _texts(cls, value: list[ItemBody | str], info: Info) -> list[ItemBody | str]:
        limits = _limits(info)
        if len(value) > limits.history_items:
            raise ValueError(f"at most {limits.history_items} items in one request, got {len(value)}")
        _check_length(max((len(item) for item in value if isinstance(item, str)), default=0), limits.text_chars)
        return value

    def history_items(self) -> list[HistoryItem]:
        """The items as the rest of the package knows them. An item without id gets one of what it says."""
        task = None if self.task == FREE_TEXT else TASKS[self.task]
        return [_history_item(item, task, f"items[{place}]") for place, item in enumerate(self.items)]


def _history_item(item: ItemBody | str, task: Task | None, param: str) -> HistoryItem:
    body = ItemBody(text=item) if isinstance(item, str) else item
    if task is None:
        content, target = body.content or "", _first(body, ("target", "text"))
    else:
        content, target = _first(body, ("content", *task.content_fields)), _first(body, ("target", task.target_field))
    if not target and not (task is not None and task.is_target_optional and content):
        wanted = "text" if task is None else f"target (or {task.target_field})"
        raise BadRequest(f"{param} has no {wanted}", param=param, code="missing")
    if task is not None and task.kind == "rating" and target not in task.labels:
        raise BadRequest(f"{param}: the score is none of {', '.join(task.labels)}", param=param)
    said = "\0".join((content, target, body.date or "")).encode()
    made = hashlib.sha256(said).hexdigest()[:16]
    return HistoryItem(id=str(body.id) if body.id is not None else made, content=content, target=target, date=body.date)


def _first(body: ItemBody, names: Sequence[str]) -> str:
    return next((text for name in names if (text := getattr(body, name))), "")


def _iso(text: str) -> str:
    """A date as the readers of LaMP's files write it: a year, a month, a day or a time, in UTC."""
    if re.fullmatch(r"[0-9]{4}(-[0-9]{2})?", text):
        return text
    try:
        time = datetime.fromisoformat(text) if len(text) <= 40 else None
        if time is not None and time.tzinfo is not None:
            time = time.astimezone(UTC).replace(tzinfo=None)
    except (ValueError, OverflowError):
        time = None
    if time is None:
        raise ValueError("not a date; send ISO 8601, such as 2024-01-31")
    return time.date().isoformat() if len(text) <= 10 else time.isoformat()


def _check_length(chars: int, most: int) -> None:
    if chars > most:
        raise ValueError(f"at most {most} characters, got {chars}")


def _limits(info: Info) -> Limits:
    return info.context if isinstance(info.context, Limits) else Limits()


def _param(loc: Sequence[int | str]) -> str | None:
    """Where in the body, as a client would write it; which member of a union was tried is left out."""
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part in _FIELDS:
            path += f".{part}" if path else part
    return path or None


_FIELDS = {
    name
    for kind in (
        ChatRequest,
        CompletionRequest,
        Message,
        ContentPart,
        StreamOptions,
        ResponseFormat,
        HistoryRequest,
        ItemBody,
    )
    for name in kind.model_fields
}
