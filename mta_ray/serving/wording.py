"""From what a client sent to the tokens that the model reads, and a history to what a stack is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from jinja2 import TemplateError

from mta_ray.lamp.prompts import query_example
from mta_ray.lamp.tasks import task_named
from mta_ray.lamp.users import HistoryItem, Query, User
from mta_ray.model.backbone import Backbone
from mta_ray.model.batches import Tokens, prompt_ids, tokenise, whole_prompt_ids
from mta_ray.personalize.base_model import Wording, tokenised
from mta_ray.serving.exchange import Turn
from mta_ray.serving.schema import FREE_TEXT, BadRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """How this base model is asked."""

    backbone: Backbone
    wording: Wording
    chat: Literal["task", "chat"]
    max_tokens: int
    """Of prompt and answer together."""

    def __post_init__(self) -> None:
        if self.chat == "chat" and not self.backbone.tokenizer.chat_template:
            raise ValueError(f"{self.backbone.source} has no chat template; set wording to task")

    @property
    def needs_history(self) -> bool:
        """Whether a question stands behind items of the user's history."""
        return self.chat == "task" and self.wording.prompts.context_items > 0

    def of_text(self, text: str, max_new_tokens: int) -> tuple[int, ...]:
        """A text to go on with, as it is. Raises BadRequest where no room is left for so many new tokens."""
        return self._fitting(whole_prompt_ids(self.backbone, text), max_new_tokens, "prompt")

    def of_chat(
        self, turns: Sequence[Turn], history: Sequence[HistoryItem], max_new_tokens: int, *, least: int | None = None
    ) -> tuple[int, ...]:
        """A chat, worded as the model was taught. Raises BadRequest where no room is left for `least` new tokens (by
        default for `max_new_tokens`), beside the question.

        With `task` the last user message is the question and other messages are left out: the model has not learnt to
        read them. A question of too many words is cut as in training.
        """
        least = max_new_tokens if least is None else least
        if self.chat == "chat":
            messages = [{"role": turn.role, "content": turn.text} for turn in turns]
            try:
                text = self.backbone.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            except TemplateError as error:  # many templates want roles to take turns, or know no role system
                said = error.message or "roles must take turns"
                raise BadRequest(
                    f"the model's chat template refuses these messages: {said}", param="messages"
                ) from None
            ids = self.backbone.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            return self._fitting(list(ids), least, "messages")
        question = next((turn.text for turn in reversed(turns) if turn.role == "user"), None)
        if question is None:
            raise BadRequest("messages hold none of role user: nothing is asked", param="messages")
        task = self.wording.task
        if task.has_options:
            raise BadRequest(
                f"the model was taught {task.name}, whose questions offer two options; send the whole prompt to "
                "/v1/completions",
                param="messages",
            )
        prompt = self._worded(question, history)
        if history:  # its items may be cut for the answer's room, the question may not
            bare = self._fitting(whole_prompt_ids(self.backbone, self._worded(question, ())), least, "messages")
            allowed = max(self.max_tokens - max_new_tokens, len(bare))
            return tuple(prompt_ids(self.backbone, prompt, room=self.backbone.max_tokens - allowed))
        return self._fitting(whole_prompt_ids(self.backbone, prompt), least, "messages")

    def _worded(self, question: str, history: Sequence[HistoryItem]) -> str:
        task, prompts = self.wording.task, self.wording.prompts
        example = query_example(
            User(id="", task=task.name, history=tuple(history)),
            Query(id="", content=question),
            task,
            context_items=prompts.context_items,
            style=prompts.style,
            labels=self.wording.labels or None,
            max_words=prompts.max_words,
        )
        return example.prompt

    def new_tokens(self, wanted: int | None, default: int) -> int:
        """How long an answer may be: what was asked for, else at most half of what a request has."""
        return wanted if wanted is not None else min(default, self.max_tokens // 2)

    def lessons(self, history: Sequence[HistoryItem], task: str) -> list[Tokens]:
        """What a stack is trained on: questions about the user's items, or free texts as they are."""
        if task == FREE_TEXT:
            texts = [f"{item.content} {item.target}".strip() for item in history]
            return [lesson for text in texts if (lesson := tokenise(self.backbone, "", text)).target_tokens]
        wording = self.wording
        if task != wording.task.name:
            wording = replace(wording, task=task_named(task), labels=task_named(task).labels)
        return tokenised(self.backbone, wording.history(User(id="", task=task, history=tuple(history))))

    def _fitting(self, ids: list[int], max_new_tokens: int, param: str) -> tuple[int, ...]:
        if len(ids) + max_new_tokens > self.max_tokens:
            raise BadRequest(
                f"the prompt has {len(ids)} tokens and {max_new_tokens} more were asked for; the model takes "
                f"{self.max_tokens} together",
                param=param,
                code="context_length_exceeded",
            )
        if not ids:
            raise BadRequest("the prompt is empty", param=param)
        return tuple(ids)
