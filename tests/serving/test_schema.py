"""The wire format: the official client is understood and understands; what is wrong is a 400 that names the field."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import openai
import pytest

from mta_ray.lamp.tasks import TASKS
from mta_ray.lamp.users import HistoryItem
from mta_ray.serving import answers
from mta_ray.serving.identity import UserId
from mta_ray.serving.schema import BadRequest, ChatRequest, CompletionRequest, HistoryRequest, Limits, parse, user_id
from mta_ray.serving.user_state import ItemSum, UserRoute, UserState

LIMITS = Limits()
HI = [{"role": "user", "content": "hi"}]
CHAT = {"model": "mta", "messages": HI}
COMPLETION = {"model": "mta", "prompt": "hi"}
HISTORY = {"items": ["a text"]}


def chat(**more: Any) -> ChatRequest:
    return parse(ChatRequest, json.dumps(CHAT | more).encode(), LIMITS)


def completion(**more: Any) -> CompletionRequest:
    return parse(CompletionRequest, json.dumps(COMPLETION | more).encode(), LIMITS)


def history(**more: Any) -> HistoryRequest:
    return parse(HistoryRequest, json.dumps(HISTORY | more).encode(), LIMITS)


# ---- the official client, over a socket


class Echo(BaseHTTPRequestHandler):
    """Answers with what it understood of the request, in our models."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        kind = ChatRequest if self.path.endswith("/chat/completions") else CompletionRequest
        try:
            request = parse(kind, body, LIMITS)
        except BadRequest as error:
            return self.send(error.status, answers.error_of(error).body())
        said = request.messages[-1].text if isinstance(request, ChatRequest) else request.text
        facts = f"{said}|{request.user}|{request.tokens_allowed(LIMITS)}|{request.stops}|{request.logprobs_wanted}"
        build = chat_answers if isinstance(request, ChatRequest) else completion_answers
        whole, chunks = build(facts)
        if not request.stream:
            return self.send(200, answers.to_json(whole))
        events = [answers.to_event(chunk) for chunk in (chunks if request.wants_usage else chunks[:-1])]
        self.send(200, b"".join(events) + answers.END_OF_STREAM, "text/event-stream")

    def do_GET(self) -> None:
        one = answers.Model(id="mta", created=1)
        self.send(200, answers.to_json(answers.ModelList(data=[one])))

    def send(self, status: int, body: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


USAGE = answers.Usage(prompt_tokens=3, completion_tokens=2, total_tokens=5)
LOGPROBS = answers.ChatLogprobs(
    content=[
        answers.TokenLogprob(
            token="a", logprob=-0.5, bytes=[97], top_logprobs=[answers.TopLogprob(token="b", logprob=-1.5)]
        )
    ]
)


def chat_answers(text: str) -> tuple[Any, list[Any]]:
    common: dict[str, Any] = {"id": "x", "created": 1, "model": "mta"}
    message = answers.AssistantMessage(content=text)
    whole = answers.ChatCompletion(
        **common, usage=USAGE, choices=[answers.ChatChoice(message=message, finish_reason="stop", logprobs=LOGPROBS)]
    )
    deltas = [answers.Delta(role="assistant", content=""), *(answers.Delta(content=char) for char in text)]
    choices = [[answers.ChunkChoice(delta=delta)] for delta in deltas]
    choices += [[answers.ChunkChoice(delta=answers.Delta(), finish_reason="length")], []]
    chunks = [answers.ChatCompletionChunk(**common, choices=some, usage=None if some else USAGE) for some in choices]
    return whole, chunks


def completion_answers(text: str) -> tuple[Any, list[Any]]:
    common: dict[str, Any] = {"id": "x", "created": 1, "model": "mta"}
    logprobs = answers.CompletionLogprobs(
        tokens=["a"], token_logprobs=[-0.5], top_logprobs=[{"a": -0.5}], text_offset=[0]
    )
    choice = answers.CompletionChoice(text=text, finish_reason="length", logprobs=logprobs)
    whole = answers.Completion(**common, choices=[choice], usage=USAGE)
    choices: list[list[Any]] = [[answers.CompletionChoice(text=char)] for char in text]
    choices += [[answers.CompletionChoice(text="", finish_reason="stop")], []]
    chunks = [answers.Completion(**common, choices=some, usage=None if some else USAGE) for some in choices]
    return whole, chunks


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host, port = server.server_address[:2]
    yield openai.OpenAI(base_url=f"http://{host!s}:{port}/v1", api_key="mta_x", max_retries=0)
    server.shutdown()
    server.server_close()


def test_the_official_client_chats(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="mta",
        messages=[
            {"role": "system", "content": "be short"},
            {"role": "user", "content": [{"type": "text", "text": "é"}]},
        ],
        user="ana",
        max_completion_tokens=7,
        max_tokens=9,
        stop=["\n", "!"],
        temperature=0,
        top_p=1,
        seed=3,
        logprobs=True,
        top_logprobs=2,
        frequency_penalty=0,
        metadata={"a": "b"},
    )
    assert answer.choices[0].message.content == "é|ana|7|('\\n', '!')|2"
    assert answer.choices[0].finish_reason == "stop" and answer.usage and answer.usage.total_tokens == 5
    kept = answer.choices[0].logprobs
    assert kept and kept.content and kept.content[0].top_logprobs[0].logprob == -1.5


def test_the_official_client_streams(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="mta", messages=HI, stream=True, stream_options={"include_usage": True}, stop="x"
    )
    chunks = list(stream)
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == f"hi|None|{LIMITS.default_tokens}|('x',)|None"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[-3:-1]] == [None, "length"]
    assert chunks[-1].choices == [] and chunks[-1].usage and chunks[-1].usage.completion_tokens == 2
    without = list(client.chat.completions.create(model="mta", messages=HI, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in without)


def test_the_official_client_completes(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="mta", prompt=["hi"], logprobs=3, max_tokens=5, echo=False, best_of=1)
    assert answer.choices[0].text == "hi|None|5|()|3"
    assert answer.choices[0].logprobs and answer.choices[0].logprobs.token_logprobs == [-0.5]
    chunks = list(
        client.completions.create(model="mta", prompt="hi", stream=True, stream_options={"include_usage": True})
    )
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices).startswith("hi|")
    assert chunks[-1].usage is not None
    assert [model.id for model in client.models.list()] == ["mta"]


def test_the_official_client_is_told_which_field_is_wrong(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as told:
        client.chat.completions.create(model="mta", messages=HI, n=2)
    assert (told.value.status_code, told.value.param, told.value.type) == (400, "n", "invalid_request_error")
    assert isinstance(told.value.body, dict) and set(told.value.body) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, "invalid_request_error"), (401, "authentication_error"), (404, "invalid_request_error"),
     (429, "rate_limit_error"), (503, "server_error")],
)  # fmt: skip
def test_every_error_has_all_four_fields(status: int, kind: str) -> None:
    body = json.loads(answers.error_answer(status, "no").body())
    assert body == {"error": {"message": "no", "type": kind, "param": None, "code": None}}


# ---- what is refused

WRONG_CHAT = [
    ({"model": 5}, "model"),
    ({"model": ""}, "model"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [*HI, {"role": "user", "content": 5}]}, "messages[1].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content"),
    ({"messages": HI * 1001}, "messages"),
    ({"messages": [{"role": "user", "content": "x" * 100_001}] * 2}, "messages"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": 5.5}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 4097}, "max_tokens"),
    ({"max_completion_tokens": 4097}, "max_completion_tokens"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.01}, "top_p"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop"),
    ({"stop": ["a" * 257]}, "stop"),
    ({"stop": [1]}, "stop"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 0.5}, "seed"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"logprobs": 3}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"n": 2}, "n"),
    ({"n": 0}, "n"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format.type"),
    ({"user": 5}, "user"),
    ({"user": ""}, "user"),
    ({"user": "a\0b"}, "user"),
    ({"user": "😀" * 257}, "user"),
]
WRONG_COMPLETION = [
    ({"prompt": None}, "prompt"),
    ({"prompt": [1, 2]}, "prompt"),
    ({"prompt": ["a", "b"]}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": "x" * 200_001}, "prompt"),
    ({"logprobs": 6}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"best_of": 2}, "best_of"),
    ({"echo": True}, "echo"),
    ({"suffix": "x"}, "suffix"),
]
WRONG_HISTORY = [
    ({"task": "poems"}, "task"),
    ({"task": 3}, "task"),
    ({"items": "a"}, "items"),
    ({"items": ["a"] * 1001}, "items"),
    ({"items": ["a" * 20_001]}, "items"),
    ({"items": [{"text": "a" * 20_001}]}, "items[0].text"),
    ({"items": ["a", {"text": 5}]}, "items[1].text"),
    ({"items": [{"text": "a", "id": ""}]}, "items[0].id"),
    ({"items": [{"text": "a", "id": "\0"}]}, "items[0].id"),
    ({"items": [{"text": "a", "date": "yesterday"}]}, "items[0].date"),
    ({"items": [{"text": "a", "date": "0001-01-01T00:00:00+23:00"}]}, "items[0].date"),
    ({"mode": "prepend"}, "mode"),
    ({"expected_version": -1}, "expected_version"),
]


@pytest.mark.parametrize(("wrong", "param"), WRONG_CHAT)
def test_a_wrong_chat_names_its_field(wrong: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as told:
        chat(**wrong)
    assert (told.value.status, told.value.param) == (400, param)
    assert str(told.value).startswith(param) and len(str(told.value)) < 300
    assert "Value error" not in str(told.value)  # pydantic's words


@pytest.mark.parametrize(("wrong", "param"), WRONG_COMPLETION)
def test_a_wrong_completion_names_its_field(wrong: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as told:
        completion(**wrong)
    assert (told.value.status, told.value.param) == (400, param)


@pytest.mark.parametrize(("wrong", "param"), WRONG_HISTORY)
def test_a_wrong_history_names_its_field(wrong: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as told:
        history(**wrong)
    assert (told.value.status, told.value.param) == (400, param)


@pytest.mark.parametrize("name", ["model", "messages"])
def test_what_is_missing_is_named(name: str) -> None:
    with pytest.raises(BadRequest) as told:
        parse(ChatRequest, json.dumps({k: v for k, v in CHAT.items() if k != name}).encode(), LIMITS)
    assert (told.value.param, told.value.code) == (name, "missing")


NO_OBJECT = (
    b"",
    b"{",
    b"[1]",
    b"null",
    b"\xff",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"model":"mta","messages":[{"role":"user","content":"hi"}],"a":' + b'[{"b":' * 100_000,
    b'{"tools":' + b'[{"a":[' * 1000 + b"]}]" * 1000 + b"}",
    b'{"model":"\\ud800"}',
    b'{"a":' + b"9" * 10_000 + b"}",
)


@pytest.mark.parametrize("body", NO_OBJECT, ids=lambda body: repr(body[:12]))
def test_what_is_no_json_object_is_a_400(body: bytes) -> None:
    with pytest.raises(BadRequest) as told:
        parse(ChatRequest, body, LIMITS)
    assert told.value.status == 400


def test_a_body_that_is_too_large_is_a_413() -> None:
    body = json.dumps(CHAT).encode()
    assert parse(ChatRequest, body, Limits(body_mib=len(body) / 2**20))
    with pytest.raises(BadRequest) as told:
        parse(ChatRequest, body, Limits(body_mib=(len(body) - 1) / 2**20))
    assert (told.value.status, told.value.code) == (413, "body_too_large")


def test_limits_are_settings() -> None:
    small = Limits(
        max_tokens=5, default_tokens=5, prompt_chars=1, messages=1, history_items=1, text_chars=2, id_chars=2
    )
    for kind, wrong in (
        (ChatRequest, CHAT | {"max_tokens": 6}),
        (ChatRequest, CHAT),
        (ChatRequest, CHAT | {"messages": [{"role": "user", "content": "x"}] * 2}),
        (ChatRequest, {"model": "m", "messages": [{"role": "user", "content": "x"}], "user": "ana"}),
        (CompletionRequest, COMPLETION),
        (HistoryRequest, {"items": ["a", "b"]}),
        (HistoryRequest, {"items": ["abc"]}),
    ):
        parse(kind, json.dumps(wrong).encode(), LIMITS)
        with pytest.raises(BadRequest):
            parse(kind, json.dumps(wrong).encode(), small)
    for settings_ in ({"default_tokens": 5000}, {"id_chars": 257}):
        with pytest.raises(ValueError):
            Limits(**settings_)


SHAPES = [None, True, False, 0, 1, -1, 2**63, 2**200, 0.5, 1e308, float("nan"), float("inf"), "", "a", "\0", "\ud800"]
SHAPES += ["1", "2024-01-01", "😀" * 300, [], {}, [[]], [{}], [None], ["a"], ["a", 1], {"a": 1}, {"role": "user"}]
SHAPES += [[{"role": "user", "content": None}], [{"text": "a"}, "b"], {"include_usage": True}, {"type": "text"}]


@pytest.mark.parametrize(
    ("kind", "good"), [(ChatRequest, CHAT), (CompletionRequest, COMPLETION), (HistoryRequest, HISTORY)]
)
def test_anything_is_served_or_refused_with_a_400(kind: Any, good: dict[str, Any]) -> None:
    dice = random.Random(0)
    names = [*kind.model_fields, "unknown"]
    outcomes = []
    for _ in range(1500):
        more = {dice.choice(names): dice.choice(SHAPES) for _ in range(dice.randint(1, 3))}
        try:
            request = parse(kind, json.dumps(good | more).encode(), LIMITS)
            if isinstance(request, HistoryRequest):
                request.history_items()
            outcomes.append("served")
        except BadRequest as error:
            assert error.status == 400 and (error.param or error.code in ("invalid_json", "unknown_field")), more
            assert "error" in json.loads(answers.error_of(error).body())
            outcomes.append("refused")
    assert min(outcomes.count("served"), outcomes.count("refused")) > 20


def test_an_error_does_not_quote_what_was_written() -> None:
    secret = "my secret words"
    for kind, body in (
        (ChatRequest, CHAT | {"messages": [{"role": secret, "content": secret}]}),
        (ChatRequest, CHAT | {"messages": [{"role": "user", "content": [{"type": "x", "text": secret}]}]}),
        (ChatRequest, CHAT | {"user": secret + "\0"}),
        (CompletionRequest, COMPLETION | {"prompt": [secret, secret]}),
        (HistoryRequest, {"items": [{"text": secret, "date": secret}], "task": secret}),
    ):
        with pytest.raises(BadRequest) as told:
            parse(kind, json.dumps(body).encode(), LIMITS)
        assert secret not in str(told.value) and told.value.__cause__ is None
    with pytest.raises(BadRequest) as told:
        parse(ChatRequest, json.dumps(CHAT).encode()[:-3] + secret.encode(), LIMITS)
    assert secret not in str(told.value)


def test_null_is_the_default_everywhere() -> None:
    optional = [name for name, field in ChatRequest.model_fields.items() if not field.is_required()]
    assert chat(**dict.fromkeys(optional)) == chat()
    assert completion(prompt=["hi"]).text == completion().text == "hi"
    assert chat(max_tokens=3).tokens_allowed(LIMITS) == 3
    assert chat(logprobs=True).logprobs_wanted == 0 and chat(logprobs=False).logprobs_wanted is None


@pytest.mark.parametrize("name", ["../etc", "名前", "a b", "😀" * 256])
def test_ids_are_any_unicode(name: str) -> None:
    assert user_id(name, LIMITS) == chat(user=name).user == name


@pytest.mark.parametrize("name", ["", "\0", "\ud800", "a" * 257])
def test_an_id_in_a_path_is_checked_too(name: str) -> None:
    with pytest.raises(BadRequest) as told:
        user_id(name, LIMITS)
    assert told.value.param == "user"


# ---- history


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_items_come_in_lamps_fields_or_in_ours(task: Any) -> None:
    target = task.labels[0] if task.kind == "rating" else "my answer"
    lamp = {task.target_field: int(target) if task.kind == "rating" else target, "id": 7, "date": "2024-01"}
    lamp |= {field: "what was seen" for field in task.content_fields[:1]}
    ours = {"content": "what was seen" if task.content_fields else "", "target": target, "id": "7", "date": "2024-01"}
    wanted = HistoryItem(id="7", content=ours["content"], target=target, date="2024-01")
    assert history(task=task.lamp_id, items=[ours]).task in {
        t.name for t in TASKS.values() if t.lamp_id == task.lamp_id
    }
    for item in (lamp, ours):
        assert history(task=task.name, items=[item]).history_items() == [wanted]


def test_free_text_is_a_target_alone_with_an_id_made_of_it() -> None:
    first, second, third = history(
        items=["one", {"text": "two", "date": "2024-01-31T10:00:00+02:00"}, "one"]
    ).history_items()
    assert (first.content, first.target, second.date) == ("", "one", "2024-01-31T08:00:00")
    assert first.id == third.id != second.id and len(first.id) == 16


@pytest.mark.parametrize(
    ("task", "item", "word"),
    [
        ("free_text", {}, "text"),
        ("movie_tagging", {"description": "x"}, "target (or tag)"),
        ("product_rating", {"text": "x", "score": 6}, "none of 1, 2, 3, 4, 5"),
        ("citation", {}, "target (or citation)"),
    ],
)
def test_an_item_that_says_nothing_is_refused_by_place(task: str, item: dict[str, Any], word: str) -> None:
    good = {"citation": {"title": "only a title"}, "free_text": "x"}.get(task, {"content": "x", "target": "3"})
    with pytest.raises(BadRequest) as told:
        history(task=task, items=[good, item]).history_items()
    assert told.value.param == "items[1]" and word in str(told.value)


# ---- the view of a user


def state(route: UserRoute | None) -> UserState:
    return UserState(
        user=UserId(tenant="acme", id="ana"), task="movie_tagging", version=5, items=2, history_bytes=9,
        history_digest="ab", item_sum=ItemSum(total=np.zeros(2, dtype=np.float32), items=2, encoder="e"), route=route,
        stack_version=None, stack_bytes=0, created_at_s=1.5, updated_at_s=2.5,
    )  # fmt: skip


def test_a_view_names_no_anchor_of_another_tenant() -> None:
    ours, theirs = UserId(tenant="acme", id="bo"), UserId(tenant="other", id="secret name")
    route = UserRoute(anchors=(theirs, ours), weights=(0.75, 0.25), bank_version="b1", history_version=5)
    view = answers.user_view(state(route), slots={ours: 0, theirs: 1}, active_bank="b1", job="none")
    assert [(a.slot, a.weight, a.user) for a in view.anchors] == [(1, 0.75, None), (0, 0.25, "bo")]
    assert view.is_route_current and b"secret name" not in answers.to_json(view)
    old = answers.user_view(state(route), slots={ours: 0}, active_bank="b2", job="waiting")
    assert not old.is_route_current and len(old.anchors) == 1
    cold = answers.user_view(state(None), slots={}, active_bank="b1", job="none")
    assert cold.anchors == [] and cold.bank_version is None and not cold.is_route_current


@pytest.mark.parametrize("job", ["none", "waiting", "training", "failed"])
def test_a_stack_that_is_there_is_ready_until_another_is_asked_for(job: Any) -> None:
    has_one = replace(state(None), stack_version=3, stack_bytes=9)
    for kept, status in ((state(None), job), (has_one, "ready" if job == "none" else job)):
        assert answers.user_view(kept, slots={}, active_bank="b1", job=job).stack_status == status
