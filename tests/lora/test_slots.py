"""The first law: routed = merged into the weights = PEFT."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from mta_ray.artifacts import ArtifactError
from mta_ray.lora.adapter import Adapter, Factors, load_peft, save_peft
from mta_ray.lora.bank import assemble, load_bank, save_bank
from mta_ray.lora.fusion import fuse
from mta_ray.lora.kernels import dense, gather
from mta_ray.lora.slots import Route, put, take
from mta_ray.model.backbone import RoutedModel, merge

IDS = torch.tensor([[101, 2003, 2023, 1037, 3231], [101, 7592, 2088, 2129, 2024]])


def _adapters(routed: RoutedModel, count: int, *, rank: int = 4, scale: float = 2.0) -> list[Adapter]:
    torch.manual_seed(7)
    return [
        Adapter(
            factors={
                name: Factors(
                    down=torch.randn(rank, layer.base.in_features) * 0.2,
                    up=torch.randn(layer.base.out_features, rank) * 0.2,
                )
                for name, layer in routed.layers.items()
            },
            scale=scale,
        )
        for _ in range(count)
    ]


def _logits(routed: RoutedModel, **routes: list[Route]) -> torch.Tensor:
    with torch.no_grad(), routed.router.using(**{s: routed.routing(r) for s, r in routes.items()}):
        return routed.model(input_ids=IDS).logits


def _fill(routed: RoutedModel, adapters: list[Adapter], shelf: str = "bank") -> None:
    routed.add_shelf(shelf, slots=len(adapters), rank=adapters[0].rank, alpha=1.0)
    for slot, adapter in enumerate(adapters):
        put(routed.layers, shelf, slot, adapter)


def test_routed_equals_merged_equals_peft(tiny_model, tmp_path):
    routed = RoutedModel(tiny_model())
    adapters = _adapters(routed, 3)
    own = _adapters(routed, 1, rank=1)[0]
    _fill(routed, adapters)
    _fill(routed, [own], "stack")
    routes = [Route(slots=(0, 2), weights=(0.7, 0.3))] * 2
    got = _logits(routed, bank=routes, stack=[Route(slots=(0,), weights=(1.0,))] * 2)

    one = fuse([adapters[0], adapters[2], own], [0.7, 0.3, 1.0])
    merged = tiny_model().model
    merge(merged, one)
    with torch.no_grad():
        torch.testing.assert_close(got, merged(input_ids=IDS).logits, atol=1e-4, rtol=1e-4)

    folder = save_peft(one, tmp_path / "exported", base_model="tiny")
    peft = PeftModel.from_pretrained(tiny_model().model, str(folder)).eval()
    with torch.no_grad():
        torch.testing.assert_close(got, peft(input_ids=IDS).logits, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(got, tiny_model().model(input_ids=IDS).logits, atol=1e-2)


def test_what_peft_trained_enters_a_bank_with_the_same_logits(tiny_model, tmp_path):
    peft = get_peft_model(tiny_model().model, LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(5)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    peft.eval().save_pretrained(tmp_path / "theirs")
    routed = RoutedModel(tiny_model())
    _fill(routed, [load_peft(tmp_path / "theirs")])
    with torch.no_grad():
        wanted = peft(input_ids=IDS).logits
    got = _logits(routed, bank=[Route(slots=(0,), weights=(1.0,))] * 2)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_each_row_has_its_own_route_and_neighbours_do_not_matter(tiny_model):
    routed = RoutedModel(tiny_model())
    _fill(routed, _adapters(routed, 3))
    first, second = Route(slots=(0,), weights=(1.0,)), Route(slots=(1, 2), weights=(0.4, 0.6))
    mixed = _logits(routed, bank=[first, second])
    torch.testing.assert_close(mixed[0], _logits(routed, bank=[first, first])[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed[1], _logits(routed, bank=[second, second])[1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(mixed[0], _logits(routed, bank=[second, second])[0], atol=1e-2)


def test_packed_tokens_are_routed_one_by_one(tiny_model):
    routed = RoutedModel(tiny_model())
    adapters = _adapters(routed, 2)
    _fill(routed, adapters)
    name, layer = next(iter(routed.layers.items()))
    x = torch.randn(1, 3, layer.base.in_features)
    routes = [Route(slots=(t % 2,), weights=(1.0,)) for t in range(3)]
    with routed.router.using(bank=routed.routing(routes)):
        got = layer(x)
    for token in range(3):
        wanted = layer.base(x[0, token]) + adapters[token % 2].delta(name) @ x[0, token]
        torch.testing.assert_close(got[0, token], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("slots", [(0, 0, 1, 1, 2, 2), (1, 1, 1, 1), (0, 0, 1), (0, 1, 1, 0), (2, 0, 2, 0)])
@pytest.mark.parametrize("form", [None, dense, gather])
@pytest.mark.parametrize("also", [(), (1,)])  # one slot a row may be a piece of the shelf, two never are
def test_rows_of_one_route_side_by_side_or_not_are_each_their_own(tiny_model, slots, form, also):
    routed = RoutedModel(tiny_model())
    adapters = _adapters(routed, 3)
    _fill(routed, adapters)
    routed.router.kernel = form
    name, layer = next(iter(routed.layers.items()))
    x = torch.randn(len(slots), 5, layer.base.in_features)
    routes = [Route(slots=(slot, *also), weights=(0.5, 0.25)[: 1 + len(also)]) for slot in slots]
    with routed.router.using(bank=routed.routing(routes)):
        got = layer(x)
    for row, slot in enumerate(slots):
        added = 0.5 * adapters[slot].delta(name) + sum(0.25 * adapters[other].delta(name) for other in also)
        torch.testing.assert_close(got[row], layer.base(x[row]) + x[row] @ added.T, atol=1e-5, rtol=1e-5)


def test_coefficients_scale_single_directions(tiny_model):
    routed = RoutedModel(tiny_model())
    adapters = _adapters(routed, 2)
    _fill(routed, adapters)
    name, layer = next(iter(routed.layers.items()))
    scales = {n: torch.rand(2, 4) for n in routed.layers}
    x = torch.randn(1, 5, layer.base.in_features)
    with routed.router.using(bank=routed.routing([Route(slots=(1, 0), weights=(0.5, 0.5), coefficients=scales)])):
        got = layer(x)
    dense = sum(
        0.5 * 2.0 * adapters[slot].factors[name].up @ torch.diag(scales[name][j]) @ adapters[slot].factors[name].down
        for j, slot in enumerate((1, 0))
    )
    torch.testing.assert_close(got, layer.base(x) + x @ dense.T, atol=1e-5, rtol=1e-5)


def test_a_route_as_it_is_kept_has_float16_s_numbers():
    route = Route(slots=(3, 1), weights=(0.7, 0.3), coefficients={"q": torch.tensor([[1.1, 0.9], [1.0, 1e-9]])})
    kept = route.as_kept()
    assert kept.slots == (3, 1)
    assert kept.weights == tuple(np.array([0.7, 0.3], np.float16).tolist()) != route.weights
    assert kept.coefficients["q"].tolist() == np.array([[1.1, 0.9], [1.0, 0.0]], np.float16).tolist()
    assert kept.bytes == route.bytes == 2 * (2 + 2) + 4 * 2


def test_rows_with_finer_coarser_and_no_coefficients_share_a_batch(tiny_model):
    routed = RoutedModel(tiny_model())
    _fill(routed, _adapters(routed, 2))
    of_slots = {name: torch.rand(2, 1) for name in routed.layers}
    rows = [
        Route(slots=(1, 0), weights=(0.5, 0.5), coefficients=of_slots),
        Route(slots=(1, 0), weights=(0.5, 0.5), coefficients={name: c.expand(2, 4) for name, c in of_slots.items()}),
        Route(slots=(1,), weights=(0.5,)),
    ]
    name, layer = next(iter(routed.layers.items()))
    x = torch.randn(1, 5, layer.base.in_features).repeat(3, 1, 1)
    with routed.router.using(bank=routed.routing(rows)):
        together = layer(x)
    for row, route in enumerate(rows):
        with routed.router.using(bank=routed.routing([route])):
            torch.testing.assert_close(together[row], layer(x[:1])[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(together[0], together[1])
    assert not torch.allclose(together[0], together[2], atol=1e-3)
    assert [route.bytes for route in rows] == [8 + 2 * 2 * 4, 8 + 2 * 8 * 4, 4]  # four adapted layers


def test_put_and_take_are_inverse_and_a_misfit_changes_nothing(tiny_model):
    routed = RoutedModel(tiny_model())
    adapter, thin = _adapters(routed, 1)[0], _adapters(routed, 1, rank=2)[0]
    _fill(routed, [adapter])
    back = take(routed.layers, "bank", 0)
    for name in adapter.factors:
        torch.testing.assert_close(back.delta(name), adapter.delta(name))
    with pytest.raises(ValueError, match="do not fit"):
        put(routed.layers, "bank", 0, thin)
    part = Adapter(factors=dict(list(adapter.factors.items())[:1]), scale=1.0)
    with pytest.raises(ValueError, match="modules"):
        put(routed.layers, "bank", 0, part)
    for name in adapter.factors:
        torch.testing.assert_close(take(routed.layers, "bank", 0).delta(name), adapter.delta(name))


def test_a_routing_of_the_wrong_size_is_refused(tiny_model):
    routed = RoutedModel(tiny_model())
    _fill(routed, _adapters(routed, 2))
    with pytest.raises(ValueError, match="routing of 3 rows"):
        _logits(routed, bank=[Route(slots=(0,), weights=(1.0,))] * 3)


def test_saved_banks_come_back_and_another_base_is_refused(tiny_model, tmp_path):
    routed = RoutedModel(tiny_model())
    vectors = np.eye(3, 8, dtype=np.float32)
    adapters = [replace(a, scale=s) for a, s in zip(_adapters(routed, 3), (2.0, 0.5, 3.0), strict=True)]
    bank = assemble(
        adapters,
        anchor_ids=("a", "../b", "<c>"),
        embeddings=vectors,
        center=np.arange(8, dtype=np.float32),
        base_fingerprint="f" * 64,
        encoder="e",
    )
    save_bank(bank, tmp_path / "bank", settings={}, inputs={})
    again = load_bank(tmp_path / "bank", base_fingerprint="f" * 64)
    assert (again.anchor_ids, again.encoder, again.scale) == (bank.anchor_ids, bank.encoder, bank.scale)
    np.testing.assert_array_equal(again.embeddings, bank.embeddings)
    np.testing.assert_array_equal(again.center, bank.center)
    for name in routed.layers:
        for n, adapter in enumerate(adapters):  # a bank has one scale, and yet each anchor is what it was
            wanted = adapter.scale * adapter.factors[name].up @ adapter.factors[name].down
            torch.testing.assert_close(again.adapter(n).delta(name), wanted)
    with pytest.raises(ValueError, match="another base|made with base model"):
        load_bank(tmp_path / "bank", base_fingerprint="0" * 64)
    data = (tmp_path / "bank" / "factors.safetensors").read_bytes()
    (tmp_path / "bank" / "factors.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ArtifactError, match="factors.safetensors"):
        load_bank(tmp_path / "bank")


def test_untrained_and_broken_adapters_do_not_enter_a_bank(tiny_model):
    routed = RoutedModel(tiny_model())
    good = _adapters(routed, 1)[0]
    zero = Adapter(
        factors={m: Factors(down=f.down, up=torch.zeros_like(f.up)) for m, f in good.factors.items()}, scale=1.0
    )
    broken = Adapter(
        factors={m: Factors(down=f.down * float("nan"), up=f.up) for m, f in good.factors.items()}, scale=1.0
    )
    fields = {"anchor_ids": ("a",), "embeddings": np.eye(1), "center": np.zeros(1)}
    fields |= {"base_fingerprint": "", "encoder": ""}
    with pytest.raises(ValueError, match="all zero"):
        assemble([zero], **fields)
    with pytest.raises(ValueError, match="not finite"):
        assemble([broken], **fields)


def test_peft_folders_that_are_no_plain_lora_are_refused(tiny_model, tmp_path):
    routed = RoutedModel(tiny_model())
    folder = save_peft(_adapters(routed, 1)[0], tmp_path / "good", base_model="tiny")
    config = json.loads((folder / "adapter_config.json").read_text())
    for change, match in (({"use_dora": True}, "use_dora"), ({"r": 3}, "not rank 3"), ({"bias": "all"}, "all")):
        (folder / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=match):
            load_peft(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="safetensors"):
        load_peft(folder)
