"""A pack gives what each adapter trained alone gives; and both give what PEFT with torch's own AdamW gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from mta_ray.lora.slots import Route, put
from mta_ray.model.backbone import RoutedModel
from mta_ray.model.batches import Tokens, collate, row_losses, tokenise
from mta_ray.personalize.lanes import Job, initial_down
from mta_ray.personalize.train_config import TrainConfig, schedule
from mta_ray.personalize.training import train_pack, train_whole

CONFIG = TrainConfig(rank=2, alpha=4.0, learning_rate=1e-2, steps=5, examples_per_step=3, max_grad_norm=0.05)
TEXTS = ("a robot wakes up", "love in paris at night", "an old war", "two sisters and a dog run home", "space")


def _jobs(backbone, count: int) -> list[Job]:
    return [
        Job(id=f"user {n}", examples=[tokenise(backbone, f"film {n}: {t}", t.split()[-1]) for t in TEXTS[: n + 2]])
        for n in range(count)
    ]


def test_a_pack_equals_each_adapter_alone(tiny_model):
    together = train_pack(RoutedModel(tiny_model()), _jobs(tiny_model(), 4), CONFIG)
    for n, job in enumerate(_jobs(tiny_model(), 4)):
        alone = train_pack(RoutedModel(tiny_model()), [job], CONFIG)
        for module, factors in alone.adapters[0].factors.items():
            torch.testing.assert_close(together.adapters[n].factors[module].up, factors.up, atol=1e-6, rtol=1e-4)
            torch.testing.assert_close(together.adapters[n].factors[module].down, factors.down, atol=1e-6, rtol=1e-4)
        np.testing.assert_allclose(together.losses[n], alone.losses[0], rtol=1e-4)


def test_an_adapter_alone_equals_peft_with_torch_adamw(tiny_model):
    backbone = tiny_model()
    example = tokenise(backbone, "film: a robot wakes up", "sci-fi")
    routed = RoutedModel(backbone)
    ours = train_pack(routed, [Job(id="u", examples=[example])], CONFIG).adapters[0]

    peft = get_peft_model(tiny_model().model, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]))
    start = RoutedModel(tiny_model()).layers
    own = []
    for name, parameter in peft.named_parameters():
        if "lora_A" in name:
            module = name.removeprefix("base_model.model.").split(".lora_")[0]
            parameter.data.copy_(initial_down(start[module], "u", CONFIG))
        if parameter.requires_grad:
            own.append(parameter)
    optimizer = torch.optim.AdamW(own, weight_decay=CONFIG.weight_decay)
    ids = torch.tensor([example.ids] * 3)
    labels = ids.clone()
    labels[:, : -example.target_tokens] = -100
    for step in range(CONFIG.steps):
        peft(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(own, CONFIG.max_grad_norm)
        optimizer.param_groups[0]["lr"] = schedule(step, CONFIG.steps, CONFIG)
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            module = name.removeprefix("base_model.model.").split(".lora_")[0]
            torch.testing.assert_close(ours.factors[module].up, parameter.data, atol=1e-5, rtol=1e-3)


def test_loss_counts_target_tokens_only_and_padding_changes_nothing(tiny_model):
    backbone = tiny_model()
    short, long = tokenise(backbone, "a", "b c"), tokenise(backbone, "a much longer prompt than that", "d")
    losses = row_losses(backbone.model, collate(backbone, [short, long]))
    for row, loss in zip((short, long), losses, strict=True):
        with torch.no_grad():
            logs = torch.log_softmax(backbone.model(input_ids=torch.tensor([row.ids])).logits[0], dim=-1)
        start = len(row.ids) - row.target_tokens
        wanted = -sum(logs[place - 1, row.ids[place]] for place in range(start, len(row.ids)))
        torch.testing.assert_close(loss, wanted, atol=1e-4, rtol=1e-4)


def test_a_stack_learns_on_top_of_its_frozen_route_and_leaves_it_alone(tiny_model):
    backbone = tiny_model()
    routed = RoutedModel(backbone)
    bank = train_pack(routed, _jobs(backbone, 2), CONFIG).adapters
    routed.add_shelf("bank", slots=2, rank=2, alpha=4.0)
    for slot, adapter in enumerate(bank):
        put(routed.layers, "bank", slot, adapter)
    before = {n: layer.shelves["bank"].up.clone() for n, layer in routed.layers.items()}
    route = Route(slots=(0, 1), weights=(0.5, 0.5))
    thin = TrainConfig(rank=1, alpha=2.0, learning_rate=1e-2, steps=8, examples_per_step=2)
    job = _jobs(backbone, 1)[0]
    with_route = train_pack(routed, [Job(id="u", examples=job.examples, background={"bank": route})], thin)
    without = train_pack(routed, [Job(id="u", examples=job.examples)], thin)
    assert with_route.losses[0][-1] < with_route.losses[0][0]
    assert abs(with_route.losses[0][0] - without.losses[0][0]) > 1e-4  # the route was really underneath
    for name, layer in routed.layers.items():
        torch.testing.assert_close(layer.shelves["bank"].up, before[name], atol=0, rtol=0)


def test_whole_training_lowers_the_loss_and_repeats(tiny_model):
    config = TrainConfig(learning_rate=3e-3, steps=8, examples_per_step=3)
    runs = []
    for _ in range(2):
        backbone = tiny_model()
        runs.append(train_whole(backbone, _jobs(backbone, 4)[3].examples, config))
    assert runs[0] == runs[1]
    assert runs[0][-1] < runs[0][0]


def test_the_schedule_warms_up_and_ends_near_zero():
    config = TrainConfig(steps=10, warmup_fraction=0.2, learning_rate=1.0)
    rates = [schedule(step, 10, config) for step in range(10)]
    assert rates[:2] == [0.5, 1.0]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] < 0.05


def test_an_adapter_without_examples_is_refused(tiny_model):
    with pytest.raises(ValueError, match="without a single training example"):
        train_pack(RoutedModel(tiny_model()), [Job(id="u", examples=[])], CONFIG)
    with pytest.raises(ValueError, match="without a single training example"):
        train_whole(tiny_model(), [], CONFIG)  # it would look for a first example for ever


def test_a_loss_that_is_not_finite_is_said(tiny_model):
    backbone = tiny_model()
    with torch.no_grad():
        backbone.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        train_pack(RoutedModel(backbone), [Job(id="u", examples=[Tokens((101, 5, 6), 1)])], CONFIG)
