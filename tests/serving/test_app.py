"""The whole service on loopback: real Ray Serve, the official client, and answers compared with plain generation."""

from __future__ import annotations

import asyncio
import gc
import json
import pickle
import re
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import ray
import safetensors.torch
import torch
from running import ANCHORS, FILMS, QUESTION, WAIT_S, Service, put, say, until
from transformers import AutoModelForCausalLM, AutoTokenizer

from mta_ray.benchmarks.marked_users import make_bank
from mta_ray.lamp.users import HistoryItem
from mta_ray.lora.adapter import Adapter, from_bytes, peft_from_bytes
from mta_ray.model.backbone import target_modules
from mta_ray.personalize.base_model import open_base
from mta_ray.serving.banks import Banks
from mta_ray.serving.database import DatabaseConfig, open_database
from mta_ray.serving.exchange import NewHistory, Stored
from mta_ray.serving.identity import UserId
from mta_ray.serving.local import PublishBankConfig, ServeConfig, publish_bank, serve_here
from mta_ray.serving.router import home_of
from mta_ray.similarity.embedding import Encoder

SECRET = "xyzzyplugh"
"""Stands in a prompt and in a history, and may stand in no log."""
HISTORY = (HistoryItem(id="1", content="a film", target="sci-fi"),)


# ---- what an answer should be, by slow and obvious means


def weights_of(service: Service, films: list[str], anchors: tuple[int, ...] = (0, 1, 2)) -> dict[int, float]:
    """The method's formula: mean of unit item vectors, centred, unit; softmax of cosines / 0.1 over the anchors."""
    if not films:
        return {anchor: 1 / len(anchors) for anchor in anchors}
    vectors = Encoder().encode([f"tag: sci-fi description: {film}" for film in films])
    mean = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).mean(axis=0) - service.bank.center
    cosines = service.bank.embeddings[list(anchors)] @ (mean / np.linalg.norm(mean))
    shares = np.exp(cosines / 0.1)
    return dict(zip(anchors, (shares / shares.sum()).tolist(), strict=True))


def told_by_peft(service: Service, weights: dict[int, float], *, stack: Adapter | None = None, tokens: int = 12) -> str:
    """Plain generation by transformers with the weighted adapters given to PEFT, and the stack added to the weights."""
    from peft import PeftModel

    from mta_ray.lora.adapter import save_peft
    from mta_ray.lora.fusion import fuse

    model = AutoModelForCausalLM.from_pretrained(service.folder / "model")
    if stack is not None:
        with torch.no_grad():
            for module in stack.factors:
                model.get_submodule(module).weight += stack.delta(module)
    fused = fuse([service.bank.adapter(anchor) for anchor in weights], list(weights.values()))
    folder = service.folder / f"peft-{time.monotonic_ns()}"
    model = PeftModel.from_pretrained(model, save_peft(fused, folder, base_model=str(service.folder / "model"))).eval()
    tokenizer = AutoTokenizer.from_pretrained(service.folder / "model")
    ids = tokenizer(f"description: {QUESTION} tag:")["input_ids"][:-1]
    out = model.generate(
        input_ids=torch.tensor([ids]), max_new_tokens=tokens, do_sample=False, eos_token_id=102, pad_token_id=0
    )
    return tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()


def peft_file(service: Service, *, seed: int = 5, rank: int = 1, spoil=lambda tensors: None) -> bytes:
    """A random adapter as PEFT writes it, spoiled or not."""
    model = AutoModelForCausalLM.from_pretrained(service.folder / "model")
    draw = torch.Generator().manual_seed(seed)
    sides = {}
    for module in target_modules(model, "qv"):
        layer = model.get_submodule(module)
        sides[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, layer.in_features, generator=draw)
        sides[f"base_model.model.{module}.lora_B.weight"] = torch.randn(layer.out_features, rank, generator=draw)
    spoil(sides)
    return safetensors.torch.save({name: side.bfloat16().contiguous() for name, side in sides.items()})


def train_stack(service: Service, user: str) -> int:
    """The version of the user's stack, once it is trained."""
    with service.http() as http:
        asked = http.post(f"/v1/users/{user}/stack")
        assert (asked.status_code, asked.json()["object"]) == (202, "user.stack")
        until(lambda: http.get(f"/v1/users/{user}").json()["stack_status"] == "ready")
        return http.get(f"/v1/users/{user}").json()["stack_version"]


def stacks_held() -> int:
    """On the one replica's device."""
    from ray import serve

    return serve.get_deployment_handle("Model", "mta").stack_slots.remote().result().held


# ---- laws


def test_a_users_answer_is_that_of_plain_generation_with_the_users_own_adapter(service: Service) -> None:
    with ThreadPoolExecutor(4) as pool:  # decoded together
        told = dict(zip(FILMS, pool.map(lambda user: say(service, user), FILMS), strict=True))
    for user, films in FILMS.items():
        assert told[user] == told_by_peft(service, weights_of(service, films)), user
    cold = told_by_peft(service, weights_of(service, []))
    assert say(service, "nobody-yet") == say(service, None) == cold
    assert len({*told.values(), cold}) == 4


def test_streaming_says_the_same(service: Service) -> None:
    client = service.openai()
    ask = {"model": "mta", "messages": [{"role": "user", "content": QUESTION}], "user": "ann", "max_tokens": 12}
    whole = client.chat.completions.create(**ask, temperature=0, logprobs=True, top_logprobs=2)
    chunks = list(
        client.chat.completions.create(**ask, temperature=0, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage and whole.usage.completion_tokens == 12
    assert len(chunks) > 4 and chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason == "length"
    tokens = whole.choices[0].logprobs.content
    assert len(tokens) == 12 and all(t.logprob == t.top_logprobs[0].logprob <= 0 for t in tokens)

    seeded = [client.chat.completions.create(**ask, temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    texts = [answer.choices[0].message.content for answer in seeded]
    assert texts[0] == texts[1] != texts[2]

    words = whole.choices[0].message.content.split()
    stopped = client.chat.completions.create(**ask, temperature=0, stop=[words[2]])
    assert stopped.choices[0].message.content == whole.choices[0].message.content.split(words[2])[0]
    assert stopped.choices[0].finish_reason == "stop"

    text = client.completions.create(
        model="mta", prompt=f"description: {QUESTION} tag:", user="ann", max_tokens=12, temperature=0, logprobs=1
    )
    assert text.choices[0].text.strip() == whole.choices[0].message.content
    told = text.choices[0].logprobs
    assert len(told.tokens) == len(told.text_offset) == 12 and told.text_offset[-1] > told.text_offset[0] == 0
    for at, token in zip(told.text_offset, told.tokens, strict=True):
        assert text.choices[0].text[at:].lstrip().startswith(token.removeprefix("##"))
    streamed = client.completions.create(
        model="mta", prompt=f"description: {QUESTION} tag:", user="ann", max_tokens=12, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in streamed) == text.choices[0].text
    assert [model.id for model in client.models.list()] == ["mta"] and client.models.retrieve("mta").id == "mta"


def test_tenants_never_meet(service: Service) -> None:
    with service.http("other") as http:
        assert http.get("/v1/users/ann").status_code == 404
        assert say(service, "ann", tenant="other") == say(service, None)
        assert put(http, "ann", FILMS["bob"]).json()["is_route_current"]
        assert say(service, "ann", tenant="other") == say(service, "bob") != say(service, "ann")
        theirs = http.get("/v1/users/ann").json()
        assert all("user" not in anchor for anchor in theirs["anchors"])  # another tenant's users have no name here
        assert http.delete("/v1/users/ann").json() == {
            "id": "ann",
            "object": "user.deleted",
            "deleted": True,
            "was_anchor": False,
        }
    with service.http() as http:
        assert {a["user"] for a in http.get("/v1/users/ann").json()["anchors"]} == set(ANCHORS)


def test_new_history_is_in_force_on_the_next_request(service: Service) -> None:
    films = ["robots"]
    with service.http() as http:
        assert put(http, "new ü/./user", films).json()["history_items"] == 1
        first = say(service, "new ü/./user")
        films += FILMS["bob"]
        assert put(http, "new ü/./user", FILMS["bob"]).json()["history_items"] == 3
        second = say(service, "new ü/./user")
        view = http.get("/v1/users/new%20%C3%BC%2F.%2Fuser").json()
        assert view["id"] == "new ü/./user" and view["is_route_current"]
        assert {ANCHORS[a]: pytest.approx(w, abs=1e-4) for a, w in weights_of(service, films).items()} == {
            a["user"]: a["weight"] for a in view["anchors"]
        }
        replaced = put(http, "new ü/./user", FILMS["ann"], mode="replace").json()
        assert replaced["history_items"] == 2 and replaced["version"] > view["version"]
        assert say(service, "new ü/./user") == say(service, "ann")
        assert put(http, "new ü/./user", films, expected_version=1).status_code == 409
    assert first == told_by_peft(service, weights_of(service, films[:1]))
    assert second == told_by_peft(service, weights_of(service, films))


def test_a_stack_is_trained_behind_the_answer_and_then_used(service: Service) -> None:
    with service.http() as http:
        before = say(service, "cid")
        assert http.post("/v1/users/no-one/stack").status_code == 404
        put(http, "blank", [], mode="replace")
        refused = http.post("/v1/users/blank/stack")
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "no_history")
        assert http.get("/v1/users/cid").json()["stack_status"] == "none"
        train_stack(service, "cid")
        after = say(service, "cid")
    stack = service.users().read_stack(UserId(tenant="acme", id="cid"))
    adapter = from_bytes(stack.tensors, stack.scale)
    assert after == told_by_peft(service, weights_of(service, FILMS["cid"]), stack=adapter) != before
    assert say(service, "ann") == told_by_peft(service, weights_of(service, FILMS["ann"]))  # nobody else changed


def test_an_adapter_from_elsewhere_becomes_the_users_stack_or_is_refused(service: Service) -> None:
    def nan(sides: dict[str, torch.Tensor]) -> None:
        next(iter(sides.values()))[0, 0] = torch.nan

    def huge(sides: dict[str, torch.Tensor]) -> None:
        next(iter(sides.values()))[0, 0] = 1e30

    def half(sides: dict[str, torch.Tensor]) -> None:
        sides.popitem()

    def dora(sides: dict[str, torch.Tensor]) -> None:
        name = next(iter(sides)).replace(".lora_A.weight", ".lora_magnitude_vector")
        sides[name] = torch.ones(4)

    def odd(kind: str, shape: list[int], size: int) -> bytes:
        head = json.dumps(
            {"base_model.model.x.lora_A.weight": {"dtype": kind, "shape": shape, "data_offsets": [0, size]}}
        )
        return len(head).to_bytes(8, "little") + head.encode() + bytes(size)

    def narrow(sides: dict[str, torch.Tensor]) -> None:
        name = next(iter(sides))
        sides[name] = sides[name][:, :-1]

    good = peft_file(service)
    bad = [b"", b"not safetensors", pickle.dumps({"lora": 1}), good[:-1], good[:100]]
    bad += [peft_file(service, spoil=spoil) for spoil in (nan, huge, half, narrow, dora, dict.clear)]
    bad += [peft_file(service, rank=2)]
    bad += [odd(kind, [1, 4], 4) for kind in ("F8_E5M2", "F8_E4M3", "F8_E8M0", "I8", "BOOL")]
    bad += [odd("F4", [1, 4], 2), odd("F32", [0, 2**63], 0), odd("F32", [2**40, 0, 2**40, 2**40], 0)]
    with service.http() as http:
        put(http, "eve", FILMS["bob"])
        before = say(service, "eve")
        for body in bad:
            refused = http.put("/v1/users/eve/stack", content=body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, "bad_adapter"), refused.text
        for query in ("alpha=0", "alpha=nan", "alpha=x", "alpha=1e9", "base_fingerprint=another"):
            assert http.put(f"/v1/users/eve/stack?{query}", content=good).status_code == 400, query
        assert http.put("/v1/users/no-one/stack", content=good).status_code == 404
        assert http.put("/v1/users/eve/stack", content=bytes(2**19)).status_code == 413
        assert say(service, "eve") == before and "stack_version" not in http.get("/v1/users/eve").json()

        fingerprint = open_base(service.base).fingerprint
        view = http.put(f"/v1/users/eve/stack?alpha=3&base_fingerprint={fingerprint}", content=good).json()
        assert view["stack_version"] and view["stack_bytes"] > 0
        after = say(service, "eve")
        other = peft_file(service, seed=6)  # under the same name, where the first one lies on the device
        assert http.put("/v1/users/eve/stack?alpha=3", content=other).json()["stack_version"] > view["stack_version"]
        assert say(service, "eve") == told_by_peft(
            service, weights_of(service, FILMS["bob"]), stack=peft_from_bytes(other, rank=1, alpha=3.0)
        )
    stack = peft_from_bytes(good, rank=1, alpha=3.0)
    assert stack.scale == 3.0
    assert after == told_by_peft(service, weights_of(service, FILMS["bob"]), stack=stack) != before
    assert say(service, "bob") == told_by_peft(service, weights_of(service, FILMS["bob"]))  # nobody else changed


def test_a_full_queue_is_told_at_once(service: Service) -> None:
    body = {"model": "mta", "user": "ann", "max_tokens": 150, "messages": [{"role": "user", "content": "go on"}]}

    async def ask(client: httpx.AsyncClient) -> tuple[int, float, httpx.Headers]:
        began_s = time.perf_counter()
        answer = await client.post("/v1/chat/completions", json=body)
        return answer.status_code, time.perf_counter() - began_s, answer.headers

    async def ask_all() -> list[tuple[int, float, httpx.Headers]]:
        headers = {"authorization": f"Bearer {service.keys['acme']}"}
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=service.url, headers=headers, timeout=WAIT_S, limits=limits, trust_env=False
        ) as client:
            return await asyncio.gather(*(ask(client) for _ in range(24)))

    told = asyncio.run(ask_all())
    assert {status for status, _, _ in told} == {200, 503}
    refused = [(took_s, headers) for status, took_s, headers in told if status == 503]
    assert all(headers["retry-after"] == "1" for _, headers in refused)
    first_s = min(took_s for status, took_s, _ in told if status == 200)
    assert statistics.median(took_s for took_s, _ in refused) < first_s
    assert sum(status == 200 for status, _, _ in told) >= 6


def message(role: str) -> dict[str, str]:
    return {"role": role, "content": "x"}


def test_a_client_that_goes_away_takes_its_request_with_it(service: Service) -> None:
    from ray import serve

    handle = serve.get_deployment_handle("Model", "mta")
    before = handle.engine_stats.remote().result().tokens
    client = service.openai()
    messages = [{"role": "user", "content": "go on"}]
    for _ in range(4):
        stream = client.chat.completions.create(model="mta", messages=messages, max_tokens=190, stream=True)
        next(iter(stream))
        stream.close()
    until(lambda: handle.engine_stats.remote().result().running == 0)
    assert handle.engine_stats.remote().result().tokens - before < 0.9 * 4 * 190


def test_what_was_sent_to_a_replica_is_kept_nowhere_on_the_way(service: Service) -> None:
    """This process takes the ingress's place: nothing of its calls is left in it, each of another user."""
    from ray import serve

    model = serve.get_deployment_handle("Model", "mta").options(stream=True)
    for number in range(5):
        user = UserId(tenant="acme", id=f"once-{number}")
        new = NewHistory(user=user, items=HISTORY, task="LaMP-2", replaces=True, expected_version=None)
        told = list(model.options(multiplexed_model_id=home_of(user)).put_history.remote(new))
        assert isinstance(told[-1], Stored)
        del new

    def is_gone() -> bool:
        gc.collect()
        return not any(type(one) is NewHistory for one in gc.get_objects())

    until(is_gone, 10)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "param"),
    [
        ("POST", "/v1/chat/completions", b"{", 400, None),
        ("POST", "/v1/chat/completions", b'{"model": "mta"}', 400, "messages"),
        (
            "POST",
            "/v1/chat/completions",
            {"model": "gpt", "messages": [{"role": "user", "content": "x"}]},
            404,
            "model",
        ),
        (
            "POST",
            "/v1/chat/completions",
            {"model": "mta", "messages": [{"role": "system", "content": "x"}]},
            400,
            "messages",
        ),
        ("POST", "/v1/completions", {"model": "mta", "prompt": "x", "temperature": 9}, 400, "temperature"),
        ("POST", "/v1/completions", {"model": "mta", "prompt": "x", "max_tokens": 191}, 400, "max_tokens"),
        ("POST", "/v1/completions", {"model": "mta", "prompt": "x " * 300}, 400, "prompt"),
        ("POST", "/v1/completions", {"model": "mta", "prompt": "x", "user": ""}, 400, "user"),
        ("POST", "/v1/completions", b" " * 300_000, 413, None),
        ("PUT", "/v1/users/x/history", {"items": [{"description": "x"}], "task": "LaMP-2"}, 400, "items[0]"),
        ("PUT", "/v1/users/x/history", {"items": ["x"], "task": "LaMP-99"}, 400, "task"),
        ("GET", "/v1/users/no-one", None, 404, "user"),
        ("GET", "/v1/users/" + "x" * 300, None, 400, "user"),
        ("GET", "/v1/users/caf%E9", None, 400, "user"),
        ("GET", "/v1/users/ann%0A", None, 400, "user"),  # not ann
        ("DELETE", "/v1/users/ann%0A", None, 400, "user"),
        ("POST", "/v1/users/ann/stack%0A", None, 400, "user"),
        ("POST", "/v1/completions", {"model": "mta", "prompt": "x", "user": "a\nb"}, 400, "user"),
        ("PUT", "/v1/users/x/history", {"items": ["x"], "expectedversion": 3}, 400, None),
        (
            "POST",
            "/v1/completions",
            {"model": "mta", "prompt": "x", "frequency_penalty": 1.5},
            400,
            "frequency_penalty",
        ),
        ("POST", "/v1/completions", {"model": "mta", "prompt": "x", "logit_bias": {"5": 1}}, 400, "logit_bias"),
        (
            "POST",
            "/v1/chat/completions",
            {"model": "mta", "max_tokens": 190, "messages": [{"role": "user", "content": "a film of robots " * 5}]},
            400,
            "messages",
        ),
        ("GET", "/v1/models/gpt", None, 404, "model"),
        ("GET", "/v1/nowhere", None, 404, None),
        ("PATCH", "/v1/models", None, 405, None),
    ],
)
def test_wrong_input_is_told_in_openais_shape(
    service: Service, method: str, path: str, body: bytes | dict | None, status: int, param: str | None
) -> None:
    content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    with service.http() as http:
        answer = http.request(method, path, content=content)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    if param:
        assert error["param"] == param


def test_keys_open_and_limit(service: Service) -> None:
    for header, code in (
        ({}, "no_api_key"),
        ({"authorization": f"Basic {service.keys['acme']}"}, "no_api_key"),
        ({"authorization": "Bearer mta_x"}, "invalid_api_key"),
    ):
        answer = httpx.get(f"{service.url}/v1/models", headers=header, trust_env=False, timeout=WAIT_S)
        error = answer.json()["error"]
        assert (answer.status_code, error["type"], error["code"]) == (401, "authentication_error", code)
        assert ("send Authorization: Bearer KEY" in error["message"]) == (code == "no_api_key")
    with service.http("slow") as http:
        statuses = [http.get("/v1/models") for _ in range(4)]
    assert [answer.status_code for answer in statuses] == [200, 200, 429, 429]
    assert int(statuses[-1].headers["retry-after"]) >= 1
    for path in ("/healthz", "/readyz"):
        assert httpx.get(service.url + path, trust_env=False, timeout=WAIT_S).status_code == 200


def test_without_a_key_only_this_machine_is_served(service: Service, tmp_path: Path) -> None:
    config = ServeConfig(base=str(service.base), bank=str(service.folder / "bank"), store=str(tmp_path / "empty.db"))
    with pytest.raises(ValueError, match="host is 0.0.0.0 and no API key is configured"):
        serve_here(replace(config, host="0.0.0.0"))


def test_an_answer_goes_on_where_its_replica_was_killed(service: Service) -> None:
    client = service.openai()
    messages = [{"role": "user", "content": QUESTION}]
    ask = {"model": "mta", "messages": messages, "user": "ann", "max_tokens": 180, "temperature": 1.5, "seed": 1}
    expected = client.chat.completions.create(**ask).choices[0].message.content
    stream = client.chat.completions.create(**ask, stream=True)
    told = next(iter(stream)).choices[0].delta.content or ""
    name = next(n["name"] for n in ray.util.list_named_actors(all_namespaces=True) if "Model" in n["name"])
    ray.kill(ray.get_actor(name, namespace="serve"))
    told += "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert told == expected
    assert client.chat.completions.create(**ask).choices[0].message.content == expected


def test_another_bank_is_taken_without_a_failed_request(service: Service) -> None:
    old = Banks(open_database(DatabaseConfig(url=service.store))).state().active_version
    bank = make_bank(service.folder / "bank-2", str(service.folder / "model"), seed=2, anchors=ANCHORS)
    second = replace(service, bank=bank)
    body = {"model": "mta", "user": "ann", "max_tokens": 4, "messages": [{"role": "user", "content": QUESTION}]}
    seen = []
    with service.http() as http:
        assert put(http, "cid", FILMS["cid"], mode="replace").status_code == 200
        version = train_stack(service, "cid")

        def ask() -> bool:
            answer = http.post("/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text
            seen.append(answer.headers["x-mta-bank-version"])
            return seen[-1] == "second"

        assert not ask()
        settings = {"base": str(service.base), "store": service.store, "tenant": "acme"}
        publish_bank(PublishBankConfig(bank=str(service.folder / "bank-2"), version="second", **settings))
        until(ask)
        assert say(service, "ann") == told_by_peft(second, weights_of(second, FILMS["ann"]))
        bare = told_by_peft(second, weights_of(second, FILMS["cid"]))
        assert say(service, "cid") == bare  # a stack is of the bank that it was trained on; asking has it trained anew
        until(lambda: http.get("/v1/users/cid").json()["stack_version"] != version)
        stack = service.users().read_stack(UserId(tenant="acme", id="cid"))
        adapter = from_bytes(stack.tensors, stack.scale)
        assert say(service, "cid") == told_by_peft(second, weights_of(second, FILMS["cid"]), stack=adapter) != bare
        publish_bank(PublishBankConfig(bank=str(service.folder / "bank"), version=old, **settings))
        until(lambda: not ask())
    assert set(seen) == {old, "second"}
    assert say(service, "ann") == told_by_peft(service, weights_of(service, FILMS["ann"]))


def test_a_deleted_user_is_gone_and_a_deleted_anchor_serves_nobody(service: Service) -> None:
    with service.http() as http:
        put(http, "dan", FILMS["bob"])
        assert say(service, "dan") == say(service, "bob")
        assert http.put("/v1/users/dan/stack", content=peft_file(service)).status_code == 200
        before = stacks_held()
        assert say(service, "dan") != say(service, "bob") and stacks_held() == before + 1
        assert http.delete("/v1/users/dan").json()["was_anchor"] is False
        assert stacks_held() == before
        assert http.get("/v1/users/dan").status_code == 404
        assert http.delete("/v1/users/dan").status_code == 404
        assert say(service, "dan") == say(service, "nobody-yet")

        assert http.delete("/v1/users/bert").json()["was_anchor"] is True
        view = http.get("/v1/users/bob").json()  # routed anew before anybody asked
        assert {a["user"] for a in view["anchors"]} == {"anna", "cleo"} and view["is_route_current"]
    rest = (0, 2)
    assert say(service, "bob") == told_by_peft(service, weights_of(service, FILMS["bob"], rest))
    assert say(service, "nobody-yet") == told_by_peft(service, weights_of(service, [], rest))
    bank = Banks(open_database(DatabaseConfig(url=service.store))).active()
    assert bank.needs_rebuild and bank.retired_slots == {1}


def test_prometheus_is_told(service: Service) -> None:
    [node] = ray.nodes()

    def figures() -> dict[str, float]:
        told = httpx.get(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", trust_env=False).text
        found: dict[str, float] = {}
        for name, value in re.findall(r"^ray_mta_(\w+)\{.*\} (\S+)$", told, re.MULTILINE):
            found[name] = found.get(name, 0) + float(value)
        return found

    before = figures()
    with service.http() as http:
        put(http, "meg", FILMS["bob"])
        assert http.put("/v1/users/meg/stack", content=peft_file(service)).status_code == 200
    for _ in range(2):
        say(service, "meg")
    wanted = {"time_to_first_token_ms_count": 2, "time_per_output_token_ms_count": 2, "personalise_ms_count": 2}
    wanted |= {"answer_tokens_total": 24, "prompt_tokens_total": 12, "stack_misses_total": 1, "stack_hits_total": 1}
    until(lambda: all(figures().get(name, 0) - before.get(name, 0) >= least for name, least in wanted.items()))
    assert {"waiting_requests", "batch_requests", "batch_users"} <= set(figures())


def test_no_log_holds_a_key_a_prompt_or_a_history(service: Service) -> None:
    with service.http() as http:
        put(http, "eve", [f"the {SECRET} of history"])
        for path, body in (
            ("/v1/completions", {"model": "mta", "prompt": f"the {SECRET} of a prompt", "max_tokens": 2}),
            ("/v1/completions", {"model": "mta", "prompt": f"the {SECRET} {'x ' * 300}"}),
            ("/v1/chat/completions", {"model": "mta", "messages": SECRET}),
        ):
            http.post(path, json=body)
        http.delete("/v1/users/eve")
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    read = 0
    for file in logs.rglob("*"):
        if file.is_file():
            text = file.read_bytes()
            read += len(text)
            assert SECRET.encode() not in text, file
            assert not any(key.split("_", 2)[2].encode() in text for key in service.keys.values()), file
    assert read > 1000
