"""A chat, worded by the model's own template."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from mta_ray.lamp.tasks import task_named
from mta_ray.lamp.users import HistoryItem
from mta_ray.model.batches import collate, row_losses
from mta_ray.personalize.base_model import PromptConfig, Wording
from mta_ray.serving.exchange import Turn
from mta_ray.serving.schema import FREE_TEXT, BadRequest
from mta_ray.serving.wording import Prompts

TEMPLATE = (
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}"
    "{% endif %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"
)


@pytest.fixture(scope="module")
def prompts(tiny_model) -> Prompts:  # noqa: ANN001
    backbone = tiny_model()
    backbone.tokenizer.chat_template = TEMPLATE
    wording = Wording(task=task_named("movie_tagging"), labels=(), prompts=PromptConfig())
    return Prompts(backbone=backbone, wording=wording, chat="chat", max_tokens=64)


def test_a_chat_reads_as_its_template_says(prompts: Prompts) -> None:
    ids = prompts.of_chat([Turn(role="user", text="one"), Turn(role="assistant", text="two")], (), 4)
    wanted = prompts.backbone.tokenizer("user one assistant two", add_special_tokens=False)["input_ids"]
    assert list(ids) == wanted


def test_free_texts_are_learnt_though_nothing_opens_them(tiny_model) -> None:  # noqa: ANN001
    """As with tokenizers that set no token before a text (GPT-2, Qwen): the first token stands after none."""
    backbone = tiny_model()
    plain = replace(backbone, tokenizer=copy.deepcopy(backbone.tokenizer))
    plain.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    assert plain.tokenizer("")["input_ids"] == []
    prompts = Prompts(
        backbone=plain,
        wording=Wording(task=task_named("movie_tagging"), labels=(), prompts=PromptConfig()),
        chat="task",
        max_tokens=64,
    )
    texts = ["robots rise", "a much longer text of quite a few words", ""]
    lessons = prompts.lessons(
        [HistoryItem(id=str(n), content=text, target="") for n, text in enumerate(texts)], FREE_TEXT
    )
    assert len(lessons) == 2
    with torch.no_grad():
        losses = row_losses(backbone.model, collate(plain, lessons))
        for lesson, loss in zip(lessons, losses, strict=True):
            ids = torch.tensor([lesson.ids])
            told = torch.log_softmax(backbone.model(input_ids=ids).logits[0, :-1].float(), dim=-1)
            assert float(loss) == pytest.approx(-float(told.gather(1, ids[0, 1:, None]).sum()), rel=1e-4)


def test_a_question_is_never_cut_for_the_answers_room(tiny_model) -> None:  # noqa: ANN001
    wording = Wording(task=task_named("movie_tagging"), labels=(), prompts=PromptConfig(context_items=2))
    prompts = Prompts(backbone=tiny_model(), wording=wording, chat="task", max_tokens=64)
    history = [HistoryItem(id=str(n), content="robots rise again and again " * 4, target="sci-fi") for n in range(3)]
    question = [Turn(role="user", text="a lonely robot finds a friend")]
    bare = prompts.of_chat(question, (), 1)
    with_items = prompts.of_chat(question, history, 8)
    assert len(with_items) == 64 - 8 and with_items[-len(bare) + 1 :] == bare[1:]
    assert prompts.of_chat(question, history, 64 - len(bare))[1:] == bare[1:]  # no room for the items
    assert prompts.of_chat(question, history, 63, least=1)[-len(bare) + 1 :] == bare[1:]
    for items in ((), history):
        with pytest.raises(BadRequest, match="together") as refused:
            prompts.of_chat(question, items, 64 - len(bare) + 1)
        assert refused.value.code == "context_length_exceeded"


def test_messages_that_the_template_refuses_are_the_clients_fault(prompts: Prompts) -> None:
    with pytest.raises(BadRequest, match="roles must alternate") as refused:
        prompts.of_chat([Turn(role="user", text=text) for text in "ab"], (), 4)
    assert (refused.value.status, refused.value.param) == (400, "messages")
