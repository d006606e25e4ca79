"""What this package takes for granted of transformers' attention; a version that changes it is found here."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from mta_ray.model.backbone import load_backbone
from mta_ray.model.row_cache import ATTENTION, Chunk, RowCache, StepPlan, forward


def step(cache, model, ids, decoding, chunks):
    """One packed step: `ids` in order, decoding rows first."""
    where = [(row, past) for row, past in enumerate(decoding)]
    where += [(c.row, c.past + t) for c in chunks for t in range(c.tokens)]
    places = torch.tensor([row * cache.tokens + position for row, position in where])
    positions = torch.tensor([position for _, position in where])
    plan = StepPlan(cache, decoding, chunks, places)
    with torch.inference_mode():
        return forward(model, torch.tensor(ids), positions, torch.arange(len(ids)), plan)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_packed_steps_give_the_logits_of_whole_sequences(kind, tiny_model):
    make = tiny_model if kind == "llama" else lambda: load_backbone("all-MiniLM-L6-v2")
    wanted_model, model = make().model, make().model
    first, second = [101, 2003, 2023, 1037, 3231], [101, 7592, 2088]
    cache = RowCache(model, rows=3, tokens=16)
    got_first = step(cache, model, first[:2], [], [Chunk(0, 0, 2)])
    got_first = torch.cat([got_first, step(cache, model, first[2:4], [], [Chunk(0, 2, 2)])])
    both = step(cache, model, [first[4], *second[:2]], [4], [Chunk(1, 0, 2)])
    both = torch.cat([both, step(cache, model, [1999, second[2]], [5, 2], [])])
    with torch.no_grad():
        one = wanted_model(input_ids=torch.tensor([[*first, 1999]])).logits[0]
        two = wanted_model(input_ids=torch.tensor([second])).logits[0]
    torch.testing.assert_close(torch.cat([got_first, both[0:1], both[3:4]]), one, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.cat([both[1:3], both[4:5]]), two, atol=1e-4, rtol=1e-4)


def test_without_a_plan_the_model_is_what_it_was(tiny_model):
    plain, ours = tiny_model().model, tiny_model().model
    RowCache(ours, rows=1, tokens=8)
    ids = torch.tensor([[0, 0, 101, 2003, 2023], [101, 7592, 2088, 2129, 2024]])
    asked = {"attention_mask": (ids > 0).long(), "max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert torch.equal(ours.generate(input_ids=ids, **asked), plain.generate(input_ids=ids, **asked))


def test_another_attention_is_noticed(tiny_model):
    model = tiny_model().model
    cache = RowCache(model, rows=1, tokens=8)
    assert model.config._attn_implementation == ATTENTION
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="0 of 2 layers"):
        step(cache, model, [5], [0], [])


def test_windows_shorter_than_a_request_are_refused():
    config = MistralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=8,
    )
    model = MistralForCausalLM(config).eval()
    with pytest.raises(ValueError, match="window of 8"):
        RowCache(model, rows=1, tokens=16)
    ids = [3, 4, 5, 6]
    wanted = AutoModelForCausalLM.from_config(config)
    wanted.load_state_dict(model.state_dict())
    with torch.no_grad():
        whole = wanted.eval()(input_ids=torch.tensor([ids])).logits[0]
    cache = RowCache(model, rows=1, tokens=8)
    torch.testing.assert_close(step(cache, model, ids, [], [Chunk(0, 0, 4)]), whole, atol=1e-5, rtol=1e-5)
