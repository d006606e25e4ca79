"""What is exported is the same adapter to PEFT, and has the form that vLLM documents."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from mta_ray.lora.adapter import Adapter, Factors, load_peft, target_names
from mta_ray.lora.export import VLLM_RANKS, export, padded, vllm_rank
from mta_ray.lora.fusion import fuse, stack
from mta_ray.lora.slots import Route, put
from mta_ray.model.backbone import RoutedModel

IDS = torch.tensor([[101, 2023, 2003, 1037, 3231, 102]])


def drawn(routed: RoutedModel, seed: int, *, rank: int, scale: float) -> Adapter:
    draw = torch.Generator().manual_seed(seed)
    factors = {
        name: Factors(
            down=torch.randn(rank, layer.base.in_features, generator=draw) * 0.3,
            up=torch.randn(layer.base.out_features, rank, generator=draw) * 0.3,
        )
        for name, layer in routed.layers.items()
    }
    return Adapter(factors=factors, scale=scale)


@pytest.mark.parametrize("pad_rank", [False, True])
@pytest.mark.parametrize("targets", ["qv", "all-linear"])
def test_peft_with_the_exported_adapter_is_the_routed_model(tiny_model, tmp_path, targets, pad_rank):
    # 1. a user of 4 of 5 anchors and a stack, routed
    routed = RoutedModel(tiny_model(), targets)
    anchors = [drawn(routed, seed, rank=8, scale=2.0) for seed in range(5)]
    own = drawn(routed, 9, rank=1, scale=1.5)
    routed.add_shelf("bank", slots=5, rank=8, alpha=16.0)
    routed.add_shelf("stack", slots=1, rank=1, alpha=1.5)
    for slot, adapter in enumerate(anchors):
        put(routed.layers, "bank", slot, adapter)
    put(routed.layers, "stack", 0, own)
    route, top = Route(slots=(4, 0, 3, 1), weights=(0.4, 0.3, 0.2, 0.1)), Route(slots=(0,), weights=(1.0,))
    with torch.no_grad(), routed.router.using(bank=routed.routing([route]), stack=routed.routing([top])):
        wanted = routed.model(input_ids=IDS).logits

    # 2. the same by PEFT
    user = stack(fuse([anchors[slot] for slot in route.slots], route.weights), own)
    folder = export(user, tmp_path / "user", base_model="tiny", pad_rank=pad_rank)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == (64 if pad_rank else 33)
    peft = PeftModel.from_pretrained(tiny_model().model, str(folder)).eval()
    with torch.no_grad():
        torch.testing.assert_close(peft(input_ids=IDS).logits, wanted, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(tiny_model().model(input_ids=IDS).logits, wanted, atol=1e-2)


def test_the_folder_has_the_form_that_vllm_documents(tiny_model, tmp_path):
    routed = RoutedModel(tiny_model())
    folder = export(drawn(routed, 1, rank=5, scale=0.7), tmp_path / "one", base_model="tiny", pad_rank=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert isinstance(config["r"], int) and isinstance(config["lora_alpha"], int) and config["r"] in VLLM_RANKS
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert config["peft_type"] == "LORA" and config["bias"] == "none"
    refused = ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern")
    assert not any(config.get(key) for key in refused)
    tensors = load_file(folder / "adapter_model.safetensors")
    wanted = {f"base_model.model.{m}.lora_{side}.weight" for m in routed.layers for side in "AB"}
    assert set(tensors) == wanted
    assert all(t.shape[0 if ".lora_A." in name else 1] == 8 for name, t in tensors.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one"]


def test_padding_adds_nothing(tiny_model):
    one = drawn(RoutedModel(tiny_model()), 1, rank=3, scale=2.0)
    more = padded(one, 8)
    assert more.rank == 8
    for module in one.factors:
        torch.testing.assert_close(more.delta(module), one.delta(module))
    with pytest.raises(ValueError, match="rank 8, which cannot be padded to 3"):
        padded(more, 3)


def test_vllm_takes_some_ranks():
    assert [vllm_rank(rank) for rank in (1, 2, 8, 33, 65, 257, 321, 512, 513)] == [
        1,
        8,
        8,
        64,
        128,
        320,
        512,
        512,
        None,
    ]


def test_target_names_are_last_names_only_where_they_are_true():
    whole = [f"layers.{n}.attn.{side}" for n in range(3) for side in ("q", "v")]
    assert target_names(whole) == ["q", "v"]
    assert target_names(whole[:-1]) == sorted(whole[:-1])  # the last block lacks v
    assert target_names(["lm_head", *whole]) == sorted(["lm_head", *whole])


def test_what_is_there_is_not_replaced_and_bad_values_are_not_written(tiny_model, tmp_path):
    one = drawn(RoutedModel(tiny_model()), 1, rank=1, scale=2.0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not replaced"):
        export(one, tmp_path / "mine")
    with pytest.raises(ValueError, match="a URL"):
        export(one, "s3://bucket/mine")
    next(iter(one.factors.values())).up[0] = float("inf")
    with pytest.raises(ValueError, match="not finite"):
        export(one, tmp_path / "bad")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_scale_that_is_no_share_comes_back_through_peft_files(tiny_model, tmp_path):
    one = drawn(RoutedModel(tiny_model()), 1, rank=3, scale=0.7)
    again = load_peft(export(one, tmp_path / "one"))
    assert again.scale == 1.0
    for module in one.factors:
        torch.testing.assert_close(again.delta(module), one.delta(module))
