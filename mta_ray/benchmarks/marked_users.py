"""A small base model, a bank of random adapters, and users whose answers tell whose model spoke.

For tests and measurements of the service; nobody was taught anything here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mta_ray.artifacts import publish
from mta_ray.lora.adapter import Adapter, Factors, from_bytes, to_bytes
from mta_ray.lora.bank import Bank, assemble, save_bank
from mta_ray.lora.fusion import fuse, stack
from mta_ray.model.backbone import Backbone, embedded_path, load_backbone, merge, target_modules
from mta_ray.model.batches import whole_prompt_ids
from mta_ray.serving.identity import UserId
from mta_ray.serving.user_state import UserStack
from mta_ray.serving.user_store import UserStore
from mta_ray.similarity.embedding import Encoder

TASTES: Mapping[str, str] = {
    "anna": "space and robots",
    "bert": "love and weddings",
    "cleo": "crime and mystery",
    "dora": "cooking for a large family",
    "emil": "war and history",
    "faye": "songs and dancing",
}
"""Anchors, and the text whose embedding each has."""


def tiny_llama(folder: Path) -> str:
    """A random two-layer Llama with the embedded tokenizer; the folder that it was saved in."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30522,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=101,
        eos_token_id=102,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(embedded_path()).save_pretrained(folder)
    return str(folder)


def make_base(out: Path, source: str) -> Path:
    """A model by name or folder as a `base` artifact."""
    backbone = load_backbone(source)
    with publish(out, kind="base", settings={}, inputs={}) as draft:
        draft.facts.update(
            task="movie_tagging",
            labels=["sci-fi", "romance"],
            source=source,
            mode="none",
            dtype="float32",
            targets="qv",
            prompts={"style": "short"},
            fingerprint=backbone.fingerprint,
            losses=[],
        )
    return out


def make_bank(out: Path, source: str, *, seed: int, anchors: Sequence[str] = tuple(TASTES)) -> Bank:
    """Random adapters, with embeddings that are the encoder's own."""
    backbone = load_backbone(source)
    generator = torch.Generator().manual_seed(seed)
    vectors = Encoder().encode([TASTES[anchor] for anchor in anchors])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    center = vectors.mean(axis=0)
    centred = vectors - center
    bank = assemble(
        [random_adapter(backbone, rank=4, generator=generator) for _ in anchors],
        anchor_ids=tuple(anchors),
        embeddings=centred / np.linalg.norm(centred, axis=1, keepdims=True),
        center=center,
        base_fingerprint=backbone.fingerprint,
        encoder="all-MiniLM-L6-v2",
    )
    save_bank(bank, out, settings={"seed": seed}, inputs={})
    return bank


def random_adapter(backbone: Backbone, *, rank: int, generator: torch.Generator) -> Adapter:
    """An adapter of the query and value layers, strong enough to change every answer."""
    factors = {}
    for module in target_modules(backbone.model, "qv"):
        layer = backbone.model.get_submodule(module)
        factors[module] = Factors(
            down=torch.randn(rank, layer.in_features, generator=generator) * layer.in_features**-0.5,  # type: ignore[operator, call-overload]
            up=torch.randn(layer.out_features, rank, generator=generator),  # type: ignore[call-overload]
        )
    return Adapter(factors=factors, scale=2.0)


def stack_of(own: Adapter, view: Mapping[str, Any], backbone: Backbone) -> UserStack:
    """The adapter as the stack of the user whom the service describes so (`GET /v1/users/{id}`)."""
    return UserStack(
        tensors=to_bytes(own),
        kind="lora",
        rank=own.rank,
        scale=own.scale,
        base_fingerprint=backbone.fingerprint,
        bank_version=view["bank_version"],
        history_version=view["version"],
    )


def mark_users(
    http: httpx.Client,
    users: int,
    *,
    store: UserStore,
    tenant: str,
    backbone: Backbone,
    bank: Bank,
    ask: str,
    tokens: int,
) -> dict[str, str]:
    """New users of a running service, each with what the question `ask` must be answered: no two alike.

    The first ones have an anchor's taste and no stack, the others a random stack.
    """
    generator = torch.Generator().manual_seed(0)
    tastes = list(TASTES.values())
    answers: dict[str, str] = {}
    for number in range(users):
        # 1. a history, and the route that comes of it
        name = f"user-{number}"
        history = {"items": [f"{tastes[number % len(tastes)]} {number}"]}
        view = http.put(f"/v1/users/{name}/history", json=history).raise_for_status().json()
        anchors = view["anchors"]
        adapter = fuse([bank.adapter(anchor["slot"]) for anchor in anchors], [anchor["weight"] for anchor in anchors])

        # 2. a stack
        if number >= len(tastes):
            own = random_adapter(backbone, rank=1, generator=generator)
            user_stack = stack_of(own, view, backbone)
            store.put_stack(UserId(tenant=tenant, id=name), user_stack)
            adapter = stack(adapter, from_bytes(user_stack.tensors, own.scale))  # rounded, as it is kept

        # 3. the answer
        answers[name] = plain_answer(backbone, adapter, ask, tokens)
    if len(set(answers.values())) < users:
        raise ValueError(f"{users} users have {len(set(answers.values()))} different answers; ask for more tokens")
    return answers


def plain_answer(backbone: Backbone, adapter: Adapter, prompt: str, tokens: int) -> str:
    """What transformers' own generation says with the adapter in the model's weights."""
    model = copy.deepcopy(backbone.model)
    merge(model, adapter)
    ids = whole_prompt_ids(backbone, prompt)
    out = model.generate(  # type: ignore[operator]
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=backbone.end_id,
        pad_token_id=0,
    )
    text = backbone.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text).strip()
