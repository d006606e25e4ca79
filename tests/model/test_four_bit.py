"""A base in 4 bits against transformers' own loading, PEFT's own adapters, and its weights written out again."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from mta_ray.artifacts import publish
from mta_ray.lora.adapter import Adapter, Factors, save_peft
from mta_ray.lora.slots import Route, put
from mta_ray.model.backbone import Backbone, RoutedModel, load_backbone, merge, target_modules
from mta_ray.model.batches import tokenise
from mta_ray.model.four_bit import check_available, is_four_bit, quantize
from mta_ray.model.generate import answer
from mta_ray.personalize.base_model import open_base
from mta_ray.personalize.training import Job, TrainConfig, train_pack
from mta_ray.pipeline.train_base import TrainBaseConfig

IDS = torch.tensor([[101, 2003, 2023, 1037, 3231], [101, 7592, 2088, 2129, 2024]])
CONFIG = TrainConfig(rank=2, alpha=4.0, learning_rate=1e-2, steps=6, examples_per_step=2)

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="pip install 'mta-ray[4bit]'"
)


@pytest.fixture
def folder(tiny_model, tmp_path: Path) -> str:
    """The tiny model, saved as a checkpoint."""
    backbone = tiny_model()
    backbone.model.save_pretrained(tmp_path / "tiny")
    backbone.tokenizer.save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


def _adapter(backbone: Backbone, seed: int = 3) -> Adapter:
    torch.manual_seed(seed)
    layers = {name: backbone.model.get_submodule(name) for name in target_modules(backbone.model, "qv")}
    return Adapter(
        factors={
            name: Factors(
                down=torch.randn(2, layer.in_features) * 0.2,  # type: ignore[operator]
                up=torch.randn(layer.out_features, 2) * 0.2,  # type: ignore[operator]
            )
            for name, layer in layers.items()
        },
        scale=1.0,
    )


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_what_transformers_loads(folder: str, dtype: str) -> None:
    from transformers import BitsAndBytesConfig

    ours = load_backbone(folder, dtype=dtype, quantization="nf4").model
    theirs = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, dtype),
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        ),
    ).eval()
    packed = {name for name, module in theirs.named_modules() if is_four_bit(module)}
    assert packed == {name for name, module in ours.named_modules() if is_four_bit(module)}
    for name in packed:
        assert torch.equal(ours.get_submodule(name).weight, theirs.get_submodule(name).weight)
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits, atol=1e-2, rtol=1e-2)
    assert sum(p.nbytes for p in ours.model.layers.parameters()) < 0.3 * sum(
        p.nbytes for p in load_backbone(folder, dtype=dtype).model.model.layers.parameters()
    )


@needs_bitsandbytes
def test_routed_equals_peft_over_the_same_4_bits(folder: str, tmp_path: Path) -> None:
    from peft import PeftModel

    routed = RoutedModel(load_backbone(folder, quantization="nf4"))
    assert routed.dtype == torch.float32
    adapter = _adapter(load_backbone(folder))
    routed.add_shelf("bank", slots=1, rank=2, alpha=2.0)
    put(routed.layers, "bank", 0, adapter)
    with torch.no_grad(), routed.router.using(bank=routed.routing([Route(slots=(0,), weights=(1.0,))] * 2)):
        got = routed.model(input_ids=IDS).logits

    plain = load_backbone(folder, quantization="nf4").model
    with torch.no_grad():
        assert not torch.allclose(got, plain(input_ids=IDS).logits, atol=1e-2)
    plain.is_loaded_in_4bit = True  # PEFT asks, before it looks at the layers
    peft = PeftModel.from_pretrained(plain, str(save_peft(adapter, tmp_path / "peft", base_model="tiny"))).eval()
    with torch.no_grad():
        torch.testing.assert_close(got, peft(input_ids=IDS).logits, atol=1e-4, rtol=1e-4)


@needs_bitsandbytes
def test_an_adapter_is_merged_before_the_weights_are_quantised(folder: str) -> None:
    import bitsandbytes

    adapter = _adapter(load_backbone(folder))
    whole = load_backbone(folder, adapter=adapter)
    wanted = load_backbone(folder)
    merge(wanted.model, adapter)
    name = next(iter(adapter.factors))
    torch.testing.assert_close(whole.model.get_submodule(name).weight, wanted.model.get_submodule(name).weight)

    packed = load_backbone(folder, quantization="nf4", adapter=adapter)
    weight = packed.model.get_submodule(name).weight
    again = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    error = (again - whole.model.get_submodule(name).weight).detach()
    assert error.norm() < 0.15 * adapter.delta(name).norm()  # the adapter is in it, up to the 4 bits
    with pytest.raises(ValueError, match="pass load_backbone an adapter"):
        merge(packed.model, adapter)


@needs_bitsandbytes
def test_the_fingerprint_is_its_own_and_repeats(folder: str) -> None:
    plain, adapter = load_backbone(folder), _adapter(load_backbone(folder))
    marks = [load_backbone(folder, quantization="nf4").fingerprint for _ in range(2)]
    merged = load_backbone(folder, quantization="nf4", adapter=adapter).fingerprint
    assert marks[0] == marks[1]
    assert len({marks[0], plain.fingerprint, merged, load_backbone(folder, adapter=adapter).fingerprint}) == 4


@needs_bitsandbytes
def test_layers_outside_the_blocks_stay_as_they_are_and_all_targets_are_found(folder: str) -> None:
    for source in (folder, "all-MiniLM-L6-v2"):
        plain, packed = load_backbone(source).model, load_backbone(source, quantization="nf4").model
        inner = target_modules(plain, "all-linear")
        assert target_modules(packed, "all-linear") == inner
        assert target_modules(packed, "qv") == target_modules(plain, "qv")
        linear = [name for name, module in packed.named_modules() if isinstance(module, nn.Linear)]
        assert [name for name in linear if is_four_bit(packed.get_submodule(name))] == inner
        head = packed.get_output_embeddings()
        assert torch.equal(head.weight, plain.get_output_embeddings().weight)


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_pack_learns_over_4_bits_after_answers_were_given(folder: str, dtype: str) -> None:
    """Answering first: some CPUs lay 4-bit weights out anew for it, in a form that has no gradients."""
    routed = RoutedModel(load_backbone(folder, dtype=dtype, quantization="nf4"))
    fresh = RoutedModel(load_backbone(folder, dtype=dtype, quantization="nf4"))
    answer(routed, ["a robot"], None, max_new_tokens=2)
    jobs = [Job(id="u", examples=[tokenise(routed.backbone, "film: a robot wakes up", "sci-fi")])]
    losses = [train_pack(each, jobs, CONFIG).losses for each in (routed, fresh)]
    np.testing.assert_array_equal(losses[0], losses[1])
    assert all(each[-1] < each[0] - 0.1 for each in losses[0])


@needs_bitsandbytes
@pytest.mark.parametrize("mode", ["none", "adapter"])
def test_the_base_artifact_says_so_and_is_loaded_so(folder: str, tmp_path: Path, mode: str) -> None:
    adapter = _adapter(load_backbone(folder)) if mode == "adapter" else None
    mark = load_backbone(folder, quantization="nf4", adapter=adapter).fingerprint
    for quantization in ("nf4", "none"):
        out = tmp_path / quantization
        with publish(out, kind="base", settings={}, inputs={}) as draft:
            if adapter:
                save_peft(adapter, draft.path / "adapter", base_model="tiny")
            draft.facts.update(
                task="movie_tagging", labels=[], prompts={}, source=folder, mode=mode, dtype="float32", targets="qv"
            )
            draft.facts.update(quantization=quantization, fingerprint=mark, losses=[])
    base = open_base(tmp_path / "nf4")
    assert base.quantization == "nf4"
    assert any(is_four_bit(module) for module in base.load().model.modules())
    with pytest.raises(ValueError, match="not the one"):
        open_base(tmp_path / "none").load()


@needs_bitsandbytes
def test_layers_that_have_no_4_bit_form_are_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64))
    with pytest.raises(ValueError, match="quantization none"):
        quantize(model, device="cpu")


def test_mode_full_is_refused() -> None:
    with pytest.raises(ValueError, match="use mode adapter or none"):
        TrainBaseConfig(mode="full", quantization="nf4")


def test_without_bitsandbytes_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(ImportError, match=r"pip install 'mta-ray\[4bit\]'"):
        check_available()
