"""One answer in the words of OpenAI's two endpoints: whole, or chunk after chunk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pydantic import BaseModel

from mta_ray.serving.answers import (
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprobs,
    ChunkChoice,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Delta,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from mta_ray.serving.exchange import Part, ToldToken


class Voice(Protocol):
    """How an endpoint tells an answer."""

    def whole(self, parts: Sequence[Part], prompt_tokens: int) -> BaseModel: ...

    def chunk(self, part: Part) -> BaseModel: ...

    def last(self, prompt_tokens: int, tokens: int) -> BaseModel:
        """The chunk that counts tokens."""
        ...


@dataclass(slots=True, kw_only=True)
class ChatVoice:
    """POST /v1/chat/completions."""

    id: str
    model: str
    created: int
    _has_spoken: bool = False

    def whole(self, parts: Sequence[Part], prompt_tokens: int) -> ChatCompletion:
        told = [token for part in parts for token in part.told]
        choice = ChatChoice(
            message=AssistantMessage(content="".join(part.text for part in parts)),
            finish_reason=parts[-1].finish or "stop",
            logprobs=_chat_logprobs(told),
        )
        usage = _usage(prompt_tokens, parts[-1].tokens)
        return ChatCompletion(id=self.id, created=self.created, model=self.model, choices=[choice], usage=usage)

    def chunk(self, part: Part) -> ChatCompletionChunk:
        delta = Delta(role=None if self._has_spoken else "assistant", content=part.text or None)
        self._has_spoken = True
        choice = ChunkChoice(delta=delta, finish_reason=part.finish, logprobs=_chat_logprobs(part.told))
        return ChatCompletionChunk(id=self.id, created=self.created, model=self.model, choices=[choice])

    def last(self, prompt_tokens: int, tokens: int) -> ChatCompletionChunk:
        usage = _usage(prompt_tokens, tokens)
        return ChatCompletionChunk(id=self.id, created=self.created, model=self.model, choices=[], usage=usage)


@dataclass(slots=True, kw_only=True)
class CompletionVoice:
    """POST /v1/completions."""

    id: str
    model: str
    created: int

    def whole(self, parts: Sequence[Part], prompt_tokens: int) -> Completion:
        told = [token for part in parts for token in part.told]
        choice = CompletionChoice(
            text="".join(part.text for part in parts),
            finish_reason=parts[-1].finish or "stop",
            logprobs=_completion_logprobs(told),
        )
        return self._made([choice], _usage(prompt_tokens, parts[-1].tokens))

    def chunk(self, part: Part) -> Completion:
        choice = CompletionChoice(text=part.text, finish_reason=part.finish, logprobs=_completion_logprobs(part.told))
        return self._made([choice])

    def last(self, prompt_tokens: int, tokens: int) -> Completion:
        return self._made([], _usage(prompt_tokens, tokens))

    def _made(self, choices: list[CompletionChoice], usage: Usage | None = None) -> Completion:
        return Completion(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)


def _usage(prompt_tokens: int, tokens: int) -> Usage:
    return Usage(prompt_tokens=prompt_tokens, completion_tokens=tokens, total_tokens=prompt_tokens + tokens)


def _completion_logprobs(told: Sequence[ToldToken]) -> CompletionLogprobs | None:
    if not told:
        return None
    return CompletionLogprobs(
        tokens=[token.text for token in told],
        token_logprobs=[token.logprob for token in told],
        top_logprobs=[dict(token.alternatives) for token in told],
        text_offset=[token.offset for token in told],
    )


def _chat_logprobs(told: Sequence[ToldToken]) -> ChatLogprobs | None:
    if not told:
        return None
    return ChatLogprobs(
        content=[
            TokenLogprob(
                token=token.text,
                logprob=token.logprob,
                bytes=_bytes(token.text),
                top_logprobs=[
                    TopLogprob(token=text, logprob=logprob, bytes=_bytes(text)) for text, logprob in token.alternatives
                ],
            )
            for token in told
        ]
    )


def _bytes(token: str) -> list[int] | None:
    """None where the token is part of a character, whose bytes its text does not tell."""
    return None if "\ufffd" in token else list(token.encode())
