"""Batched greedy answers with a route a row equal each prompt alone on a model with the adapter merged in."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

from mta_ray.lora.adapter import Adapter, Factors
from mta_ray.lora.slots import Route, put
from mta_ray.model.backbone import RoutedModel, fingerprint, load_backbone, merge, target_modules
from mta_ray.model.batches import prompt_ids
from mta_ray.model.generate import answer


def test_mixed_batch_equals_each_user_alone_with_merged_weights(tiny_model):
    routed = RoutedModel(tiny_model())
    torch.manual_seed(3)
    adapters = [
        Adapter(
            factors={
                name: Factors(down=torch.randn(2, 64), up=torch.randn(layer.base.out_features, 2))
                for name, layer in routed.layers.items()
            },
            scale=0.5,
        )
        for _ in range(2)
    ]
    routed.add_shelf("bank", slots=2, rank=2, alpha=1.0)
    for slot, adapter in enumerate(adapters):
        put(routed.layers, "bank", slot, adapter)
    prompts = ["a robot", "love in a very small town by the sea", "war", "an old man and his dog"]
    routes = [Route(slots=(n % 2,), weights=(1.0,)) for n in range(4)]
    got = answer(routed, prompts, {"bank": routes}, max_new_tokens=5, rows_per_batch=3)

    for n, prompt in enumerate(prompts):
        backbone = tiny_model()
        merge(backbone.model, adapters[n % 2])
        ids = torch.tensor([prompt_ids(backbone, prompt)])
        for _ in range(5):
            with torch.no_grad():
                token = backbone.model(input_ids=ids).logits[0, -1].argmax()
            ids = torch.cat([ids, token.view(1, 1)], dim=1)
            if token == backbone.end_id:
                break
        new = ids[0, len(prompt_ids(backbone, prompt)) :]
        assert got[n] == backbone.tokenizer.decode(new, skip_special_tokens=True).strip()
    assert len(set(got)) > 1


def test_long_prompts_lose_their_oldest_words_and_leave_room(tiny_model):
    backbone = tiny_model()
    ids = prompt_ids(backbone, " ".join(f"word{n}" for n in range(300)), room=10)
    assert len(ids) == backbone.max_tokens - 10
    assert ids[0] == 101
    assert ids[-3:] == prompt_ids(backbone, "word299")[-3:]


def test_the_embedded_model_is_a_causal_decoder():
    """The answer at a position may not depend on what comes after it."""
    model = load_backbone("all-MiniLM-L6-v2").model
    one, other = torch.tensor([[101, 2023, 2003, 1037]]), torch.tensor([[101, 2023, 2003, 7592]])
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=one).logits[:, :3], model(input_ids=other).logits[:, :3])


def test_fingerprints_tell_base_models_apart(tiny_model):
    assert tiny_model(0).fingerprint == tiny_model(0).fingerprint
    assert tiny_model(0).fingerprint != tiny_model(1).fingerprint
    changed = tiny_model(0).model
    with torch.no_grad():
        changed.model.norm.weight += 1
    assert fingerprint(changed) != tiny_model(0).fingerprint


def test_target_modules_by_table_by_name_and_all(tiny_model):
    model = tiny_model().model
    assert {name.rsplit(".", 1)[-1] for name in target_modules(model, "qv")} == {"q_proj", "v_proj"}
    assert len(target_modules(model, "all-linear")) == 14
    assert len(target_modules(model, "o_proj")) == 2
    with pytest.raises(ValueError, match="no linear layer named"):
        target_modules(model, "wrong")


def test_a_base_model_that_is_not_there_is_said():
    with pytest.raises(ValueError, match="no causal language model"):
        load_backbone("/nowhere/at-all")


def test_greedy_is_greedy_whatever_a_checkpoint_says_of_its_generation(tiny_model, tmp_path):
    backbone = tiny_model()
    for name, penalty in (("plain", None), ("penalised", 50.0)):
        backbone.model.save_pretrained(tmp_path / name)
        backbone.tokenizer.save_pretrained(tmp_path / name)
        if penalty:
            GenerationConfig(repetition_penalty=penalty, num_beams=2).save_pretrained(tmp_path / name)
    said = [
        answer(RoutedModel(load_backbone(str(tmp_path / name))), ["a film about robots"], max_new_tokens=12)
        for name in ("plain", "penalised")
    ]
    assert said[0] == said[1] and said[0][0]
