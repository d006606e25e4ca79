"""A pack gives what each adapter trained alone gives; and both give what PEFT with torch's own AdamW gives."""

from __future__ import annotations

from dataclasses import replace

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


def _by_hand(backbone, prompt: str, target: str) -> tuple[list[int], list[int]]:
    """[CLS] prompt, and target [SEP], as the tokenizer's ids: the model is to learn the second after the first."""
    ids = backbone.tokenizer(f"{prompt} {target}")["input_ids"]
    asked = backbone.tokenizer(prompt)["input_ids"][:-1]
    return asked, ids[len(asked) :]


def test_a_pack_equals_each_adapter_alone(tiny_model):
    together = train_pack(RoutedModel(tiny_model()), _jobs(tiny_model(), 4), CONFIG)
    for n, job in enumerate(_jobs(tiny_model(), 4)):
        alone = train_pack(RoutedModel(tiny_model()), [job], CONFIG)
        for module, factors in alone.adapters[0].factors.items():
            torch.testing.assert_close(together.adapters[n].factors[module].up, factors.up, atol=1e-6, rtol=1e-4)
            torch.testing.assert_close(together.adapters[n].factors[module].down, factors.down, atol=1e-6, rtol=1e-4)
        np.testing.assert_allclose(together.losses[n], alone.losses[0], rtol=1e-4)


@pytest.mark.parametrize(("max_grad_norm", "clipped"), [(0.05, {True}), (0.55, {True, False})])
def test_an_adapter_alone_equals_peft_with_torch_adamw(tiny_model, max_grad_norm, clipped):
    # Adam does not see a loss of another size where all gradients are clipped or none is: so also where some are.
    backbone = tiny_model()
    rows = [("film: a robot wakes up", "sci-fi"), ("an old war", "a very long drama"), ("film: space", "action")]
    config = replace(CONFIG, max_grad_norm=max_grad_norm)  # three examples a step: each step meets all of them
    job = Job(id="u", examples=[tokenise(backbone, *row) for row in rows])
    ours = train_pack(RoutedModel(backbone), [job], config).adapters[0]

    peft = get_peft_model(tiny_model().model, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]))
    start = RoutedModel(tiny_model()).layers
    own = []
    for name, parameter in peft.named_parameters():
        if "lora_A" in name:
            module = name.removeprefix("base_model.model.").split(".lora_")[0]
            parameter.data.copy_(initial_down(start[module], "u", config))
        if parameter.requires_grad:
            own.append(parameter)
    optimizer = torch.optim.AdamW(own, weight_decay=CONFIG.weight_decay)
    ids, labels = torch.zeros(3, 24, dtype=torch.int64), torch.full((3, 24), -100)
    for n, (prompt, target) in enumerate(rows):  # padded on the right; the loss is the mean over all target tokens
        asked, said = _by_hand(backbone, prompt, target)
        ids[n, : len(asked + said)] = torch.tensor(asked + said)
        labels[n, len(asked) : len(asked + said)] = torch.tensor(said)
    norms = []
    for step in range(config.steps):
        peft(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels).loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(own, max_grad_norm)))
        optimizer.param_groups[0]["lr"] = schedule(step, config.steps, config)
        optimizer.step()
        optimizer.zero_grad()
    assert {norm > max_grad_norm for norm in norms} == clipped
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            module = name.removeprefix("base_model.model.").split(".lora_")[0]
            torch.testing.assert_close(ours.factors[module].up, parameter.data, atol=1e-5, rtol=1e-3)


def test_loss_counts_target_tokens_only_and_padding_changes_nothing(tiny_model):
    backbone = tiny_model()
    rows = [("a", "b c"), ("a much longer prompt than that", "d")]
    losses = row_losses(backbone.model, collate(backbone, [tokenise(backbone, *row) for row in rows]))
    for row, loss in zip(rows, losses, strict=True):
        asked, said = _by_hand(backbone, *row)
        with torch.no_grad():
            logs = torch.log_softmax(backbone.model(input_ids=torch.tensor([asked + said])).logits[0], dim=-1)
        wanted = -sum(logs[len(asked) + n - 1, token] for n, token in enumerate(said))
        torch.testing.assert_close(loss, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shared_init", [True, False])
def test_adapters_begin_with_pefts_kaiming_and_all_alike_only_where_the_start_is_shared(tiny_model, shared_init):
    still = replace(CONFIG, learning_rate=1e-9, shared_init=shared_init)
    one, other = train_pack(RoutedModel(tiny_model()), _jobs(tiny_model(), 2), still).adapters
    downs = [factors.down for factors in one.factors.values()]
    for module, factors in one.factors.items():
        assert torch.allclose(factors.down, other.factors[module].down, atol=1e-6) == shared_init
        assert 0.9 / 8 < factors.down.abs().max() < 1 / 8 + 1e-6  # U(-1/√64, 1/√64)
    assert not any(torch.allclose(downs[0], down, atol=1e-3) for down in downs[1:])


def test_each_adapter_meets_all_of_its_examples_once_an_epoch_in_an_order_of_its_own(tiny_model):
    backbone = tiny_model()
    examples = [tokenise(backbone, f"film: {text}", text.split()[-1]) for text in TEXTS]
    still = replace(CONFIG, learning_rate=1e-9, steps=10, examples_per_step=1)
    jobs = [Job(id=f"user {n}", examples=examples) for n in range(3)]
    losses = train_pack(RoutedModel(backbone), jobs, still).losses
    with torch.no_grad():
        each = [float(row_losses(backbone.model, collate(backbone, [e]))) / e.target_tokens for e in examples]
    orders = [[int(np.abs(np.array(each) - loss).argmin()) for loss in own] for own in losses]
    assert all(sorted(order[start : start + 5]) == list(range(5)) for order in orders for start in (0, 5))
    assert len({tuple(order) for order in orders}) == 3


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
