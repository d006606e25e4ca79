"""The packed output layer is the plain one: without gradients, with them, after training, copied and saved."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mta_ray.model.packed_head import PackedHead, pack_head


@pytest.mark.parametrize("rows", [1, 2, 16, 200])
@pytest.mark.parametrize("has_bias", [True, False])
def test_it_is_the_plain_layer(rows: int, has_bias: bool) -> None:
    torch.manual_seed(rows)
    plain = nn.Linear(48, 1000, bias=has_bias)
    packed = PackedHead(plain)
    x = torch.randn(3, rows, 48)
    wanted = x.double() @ plain.weight.double().T + (plain.bias.double() if has_bias else 0)
    with torch.inference_mode():
        torch.testing.assert_close(packed(x).double(), wanted, atol=1e-5, rtol=1e-5)
        assert packed(x[0, 0]).shape == (1000,)
    assert packed._packed is not None, "this machine's torch should pack"


def test_it_is_the_plain_layer_in_bfloat16() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(48, 1000).bfloat16()
    x = torch.randn(5, 48).bfloat16()
    with torch.inference_mode():
        torch.testing.assert_close(PackedHead(plain)(x), plain(x), atol=0.02, rtol=0.02)


def test_a_weight_that_was_trained_is_packed_again(tiny_model) -> None:
    model = tiny_model().model
    plain = copy.deepcopy(model)
    pack_head(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    ids = torch.randint(1000, 3000, (2, 9))
    for _ in range(2):
        for each in (model, plain):
            with torch.inference_mode():
                before = each(input_ids=ids).logits
            each(input_ids=ids, labels=ids).loss.backward()
            for parameter in each.parameters():
                parameter.data.sub_(0.5 * parameter.grad)  # past autograd's count of writes, as some optimisers do
            each.zero_grad()
            with torch.inference_mode():
                assert not torch.allclose(each(input_ids=ids).logits, before, atol=1e-2)
        with torch.inference_mode():
            wanted = plain(input_ids=ids).logits
            torch.testing.assert_close(model(input_ids=ids).logits, wanted, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(copy.deepcopy(model)(input_ids=ids).logits, wanted, atol=1e-4, rtol=1e-4)


def test_a_tied_layer_stays_tied(tmp_path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=500,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    pack_head(model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        torch.testing.assert_close(model(input_ids=ids).logits, again(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
