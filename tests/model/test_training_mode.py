"""Checkpointed and compiled blocks train exactly what plain ones do; what autograd keeps is counted byte by byte."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from architectures import VOCABULARY, random_backbone, random_model
from torch import Tensor, nn

from mta_ray.lora.slots import Route
from mta_ray.model.backbone import Backbone, RoutedModel
from mta_ray.model.batches import collate, row_losses, tokenise
from mta_ray.model.generate import answer
from mta_ray.model.training_mode import prepare_for_training
from mta_ray.personalize.lanes import PACK, Job, prepare_pack
from mta_ray.personalize.train_config import TrainConfig
from mta_ray.personalize.training import train_pack, train_whole
from mta_ray.pipeline.group import GroupConfig

CONFIG = TrainConfig(rank=2, alpha=4.0, learning_rate=1e-2, steps=4, examples_per_step=2)
TEXTS = ("a robot wakes up", "love in paris at night", "an old war", "two sisters and a dog run home", "space")
ARCHITECTURES = ("llama", "bert", "gpt_neox", "gpt2", "gemma2")


def _jobs(backbone: Backbone, count: int = 3) -> list[Job]:
    return [
        Job(id=f"user {n}", examples=[tokenise(backbone, f"film {n}: {t}", t.split()[-1]) for t in TEXTS[: n + 2]])
        for n in range(count)
    ]


def _routed(model_type: str, *, gradient_checkpointing: bool = False, compile: bool = False) -> RoutedModel:
    routed = RoutedModel(random_backbone(model_type))
    prepare_for_training(routed.model, gradient_checkpointing=gradient_checkpointing, compile=compile)
    return routed


def _loss_and_kept_bytes(routed: RoutedModel, slots: list[int]) -> tuple[Tensor, int, list[nn.Parameter]]:
    """A loss whose backward is still to come, and the bytes of activations that autograd keeps for it."""
    trainable = prepare_pack(routed, 3, CONFIG)
    generator = torch.Generator().manual_seed(1)
    for parameter in trainable:
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    batch = collate(routed.backbone, [tokenise(routed.backbone, f"film: {t}", "war") for t in TEXTS], routed.device)
    weights = {p.untyped_storage().data_ptr() for p in routed.model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and VOCABULARY not in tensor.shape:  # logits are kept either way
            kept[storage.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        routing = routed.routing([Route(slots=(slot,), weights=(1.0,)) for slot in slots])
        with routed.router.using(**{PACK: routing}):
            loss = row_losses(routed.model, batch).sum()
    return loss, sum(tensor.untyped_storage().nbytes() for tensor in kept.values()), trainable


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_gradients_are_the_same_bits_and_less_is_kept(model_type: str) -> None:
    loss, kept, trainable = _loss_and_kept_bytes(_routed(model_type), [0, 1, 2, 1, 0])
    wanted = torch.autograd.grad(loss, trainable)
    routed = _routed(model_type, gradient_checkpointing=True)
    loss_again, kept_again, trainable = _loss_and_kept_bytes(routed, [0, 1, 2, 1, 0])
    assert torch.equal(loss_again, loss)
    # The backward pass comes after `using`, and while other routes are in force.
    other = routed.routing([Route(slots=(2,), weights=(0.5,))] * 5)
    with routed.router.using(**{PACK: other}):
        got = torch.autograd.grad(loss_again, trainable)
        assert routed.router.active[PACK] is other
    assert all(torch.equal(one, two) for one, two in zip(got, wanted, strict=True))
    assert any(gradient.abs().max() > 0 for gradient in wanted)

    inputs = 2 * len(TEXTS) * 16 * 32 * 4  # of two blocks, 16 tokens of width 32: the blocks themselves keep them
    assert kept_again + inputs < 0.4 * kept


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_pack_is_the_same_to_the_bit(model_type: str) -> None:
    runs = []
    for gradient_checkpointing in (False, True):
        routed = _routed(model_type, gradient_checkpointing=gradient_checkpointing)
        runs.append(train_pack(routed, _jobs(routed.backbone), CONFIG))
    np.testing.assert_array_equal(runs[0].losses, runs[1].losses)
    for one, two in zip(runs[0].adapters, runs[1].adapters, strict=True):
        for module, factors in one.factors.items():
            assert torch.equal(factors.up, two.factors[module].up)
            assert torch.equal(factors.down, two.factors[module].down)
    assert all(not np.isclose(losses[0], losses[-1]) for losses in runs[0].losses)


def test_a_whole_base_is_the_same_to_the_bit() -> None:
    found = []
    for gradient_checkpointing in (False, True):
        backbone = random_backbone("bert")
        prepare_for_training(backbone.model, gradient_checkpointing=gradient_checkpointing, compile=False)
        losses = train_whole(backbone, _jobs(backbone)[2].examples, CONFIG)
        found.append((losses, copy.deepcopy(backbone.model.state_dict())))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(found[0][1][name], weight) for name, weight in found[1][1].items())


def test_answers_are_the_same_with_it() -> None:
    prompts = ["a robot", "love in a very small town"]
    wanted = answer(_routed("llama"), prompts, max_new_tokens=4)
    assert answer(_routed("llama", gradient_checkpointing=True), prompts, max_new_tokens=4) == wanted


def test_compiled_blocks_see_each_steps_own_routes_and_shapes() -> None:
    """In a process of its own, which nobody has asked to check the types of every call that is compiled.

    Traced and differentiated as ever; machine code for the graphs would take minutes, and is torch's own.
    """
    torch.multiprocessing.spawn(_compare_compiled, nprocs=1)


def _compare_compiled(_: int) -> None:
    torch.set_num_threads(1)
    torch.compile = partial(torch.compile, backend="aot_eager")
    plain = _routed("llama")
    compiled = _routed("llama", gradient_checkpointing=True, compile=True)
    for slots in ([0, 1, 2, 1, 0], [2, 2, 0, 0, 1]):
        (loss, _, trainable), (again, _, compiled_trainable) = (
            _loss_and_kept_bytes(routed, slots) for routed in (plain, compiled)
        )
        torch.testing.assert_close(again, loss, atol=1e-4, rtol=1e-5)
        wanted, got = torch.autograd.grad(loss, trainable), torch.autograd.grad(again, compiled_trainable)
        for one, two in zip(got, wanted, strict=True):
            assert (one - two).norm() < 1e-4 * two.norm()
    losses = train_pack(plain, _jobs(plain.backbone), CONFIG).losses  # batches of other widths
    np.testing.assert_allclose(train_pack(compiled, _jobs(plain.backbone), CONFIG).losses, losses, rtol=1e-3)
    stats = torch._dynamo.utils.counters["stats"]
    graphs = stats["unique_graphs"]
    assert graphs <= 6  # once more for other widths, and for steps of other numbers of different rows
    train_pack(compiled, _jobs(plain.backbone), replace(CONFIG, steps=12))
    assert stats["unique_graphs"] == graphs, "something that changes from step to step was compiled in"


def test_a_model_without_marked_blocks_is_refused() -> None:
    model = random_model("llama")
    model.model.layers = nn.ModuleList()
    prepare_for_training(model, gradient_checkpointing=False, compile=False)
    with pytest.raises(ValueError, match="leave gradient_checkpointing and compile off"):
        prepare_for_training(model, gradient_checkpointing=True, compile=False)


def test_stage_3_and_compile_are_refused_together() -> None:
    with pytest.raises(ValueError, match="compile"):
        GroupConfig(zero_stage=3, compile=True)
