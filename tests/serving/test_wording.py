"""A chat, worded by the model's own template."""

from __future__ import annotations

import pytest

from mta_ray.lamp.tasks import task_named
from mta_ray.personalize.base_model import PromptConfig, Wording
from mta_ray.serving.exchange import Turn
from mta_ray.serving.schema import BadRequest
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


def test_messages_that_the_template_refuses_are_the_clients_fault(prompts: Prompts) -> None:
    with pytest.raises(BadRequest, match="roles must alternate") as refused:
        prompts.of_chat([Turn(role="user", text=text) for text in "ab"], (), 4)
    assert (refused.value.status, refused.value.param) == (400, "messages")
