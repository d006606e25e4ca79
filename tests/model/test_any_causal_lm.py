"""Adapters find their layers in every architecture, and do there what PEFT's do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, VOCABULARY, random_backbone, random_model
from peft import LoraConfig, PeftModel, get_peft_model

from mta_ray.lora.adapter import Adapter, Factors, load_peft, save_peft
from mta_ray.lora.slots import Route, put, take
from mta_ray.model.backbone import RoutedModel, merge, target_modules

QUERY_VALUE = {
    "bert": "query value",
    "phi3": "qkv_proj",
    "gpt2": "c_attn",
    "gpt_bigcode": "c_attn",
    "gpt_neox": "query_key_value",
    "falcon": "query_key_value",
    "bloom": "query_key_value",
}
ALL_LINEAR = {
    "phi3": "qkv_proj o_proj gate_up_proj down_proj",
    "phi": "q_proj k_proj v_proj dense fc1 fc2",
    "gpt_neox": "query_key_value dense dense_h_to_4h dense_4h_to_h",
    "falcon": "query_key_value dense dense_h_to_4h dense_4h_to_h",
    "bloom": "query_key_value dense dense_h_to_4h dense_4h_to_h",
    "gpt2": "c_attn c_proj c_fc c_proj",
    "gpt_bigcode": "c_attn c_proj c_fc c_proj",
    "opt": "q_proj k_proj v_proj out_proj fc1 fc2",
    "bert": "query key value dense dense dense",
}
"""Last names in one block, written down from the papers' and the checkpoints' own names."""
LLAMA_LIKE = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"

IDS = torch.randint(1000, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_targets_are_the_blocks_layers(model_type: str) -> None:
    model = random_model(model_type)
    for targets, wanted in (
        ("qv", QUERY_VALUE.get(model_type, "q_proj v_proj")),
        ("all-linear", ALL_LINEAR.get(model_type, LLAMA_LIKE)),
    ):
        found = [name.rsplit(".", 1)[-1] for name in target_modules(model, targets)]
        assert sorted(found) == sorted(wanted.split() * 2)  # two blocks


@pytest.mark.parametrize("targets", ["qv", "all-linear"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_routed_equals_merged_equals_peft(model_type: str, targets: str, tmp_path: Path) -> None:
    # 1. an adapter that PEFT made and saved
    plain = random_model(model_type)
    peft = get_peft_model(
        random_model(model_type),
        LoraConfig(r=3, lora_alpha=6, target_modules=target_modules(plain, targets)),
    )
    torch.manual_seed(5)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    peft.eval().save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        wanted, without = peft(input_ids=IDS).logits, plain(input_ids=IDS).logits
    assert (wanted - without).abs().max() > 0.05 * without.abs().max()

    # 2. on a shelf, for the second row alone
    adapter = load_peft(tmp_path / "theirs")
    routed = RoutedModel(random_backbone(model_type), targets)
    routed.add_shelf("bank", slots=2, rank=3, alpha=3.0)
    put(routed.layers, "bank", 1, adapter)
    routes = [Route(slots=(slot,), weights=(1.0,)) for slot in (0, 1, 0)]
    with torch.no_grad(), routed.router.using(bank=routed.routing(routes)):
        got = routed.model(input_ids=IDS).logits
    torch.testing.assert_close(got[1], wanted[1], atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(got[::2], without[::2], atol=2e-4, rtol=2e-4)

    # 3. in the weights, and back to PEFT from the shelf
    merge(plain, adapter)
    save_peft(take(routed.layers, "bank", 1), tmp_path / "ours", base_model=model_type)
    again = PeftModel.from_pretrained(random_model(model_type), str(tmp_path / "ours")).eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=IDS).logits, wanted, atol=2e-4, rtol=2e-4)
        torch.testing.assert_close(again(input_ids=IDS).logits, wanted, atol=2e-4, rtol=2e-4)


def test_an_adapter_of_other_shapes_is_refused() -> None:
    routed = RoutedModel(random_backbone("gpt2"))
    routed.add_shelf("bank", slots=1, rank=1, alpha=1.0)
    turned = {name: Factors(down=torch.zeros(1, 96), up=torch.zeros(32, 1)) for name in routed.layers}
    with pytest.raises(ValueError, match="do not fit"):
        put(routed.layers, "bank", 0, Adapter(factors=turned, scale=1.0))
