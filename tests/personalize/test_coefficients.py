"""Coefficients of many users against each one's own plain training over a dense copy of the model's weights."""

from __future__ import annotations

import pytest
import torch
from routed_people import RANK, ROUTES, SCALE, bank_of, people
from torch import Tensor
from torch.func import functional_call

from mta_ray.lora.kernels import dense, gather, reference
from mta_ray.model.backbone import RoutedModel
from mta_ray.personalize.coefficients import CoefficientConfig, train_coefficients
from mta_ray.personalize.lanes import draw_examples
from mta_ray.personalize.train_config import TrainConfig, schedule

TRAIN = TrainConfig(learning_rate=0.1, steps=4, examples_per_step=2, weight_decay=0.1, max_grad_norm=0.02)


def trained_plainly(backbone, adapters, person, config: CoefficientConfig) -> dict[str, Tensor]:  # noqa: ANN001
    """One user, one unrouted model, weights added up densely, torch's own AdamW, row by row."""
    user_id, examples, route = person
    width = RANK if config.per == "direction" else 1
    changes = {name: torch.zeros(len(route.slots), width, requires_grad=True) for name in adapters[0].factors}
    optimizer = torch.optim.AdamW(changes.values(), weight_decay=config.train.weight_decay)
    draw = draw_examples(examples, config.train, user_id)
    for step in range(config.train.steps):
        weights = {}
        for name, change in changes.items():
            added = sum(
                w * SCALE * adapters[slot].factors[name].up
                @ torch.diag((1 + change[j]).expand(RANK)) @ adapters[slot].factors[name].down
                for j, (slot, w) in enumerate(zip(route.slots, route.weights, strict=True))
            )  # fmt: skip
            weights[f"{name}.weight"] = backbone.model.get_submodule(name).weight.detach() + added
        rows = next(draw)
        loss = torch.tensor(0.0)
        for row in rows:
            logits = functional_call(backbone.model, weights, kwargs={"input_ids": torch.tensor([row.ids])}).logits[0]
            start = len(row.ids) - row.target_tokens
            logs = torch.log_softmax(logits, dim=-1)
            loss = loss - sum(logs[place - 1, row.ids[place]] for place in range(start, len(row.ids)))
        (loss / sum(row.target_tokens for row in rows)).backward()
        torch.nn.utils.clip_grad_norm_(changes.values(), config.train.max_grad_norm)
        optimizer.param_groups[0]["lr"] = schedule(step, config.train.steps, config.train)
        optimizer.step()
        optimizer.zero_grad()
    return {name: (1 + change).detach() for name, change in changes.items()}


@pytest.mark.parametrize(("per", "kernel"), [("direction", dense), ("direction", gather), ("anchor", reference)])
def test_a_pack_of_users_equals_each_ones_plain_training(tiny_model, per, kernel):
    config = CoefficientConfig(per=per, train=TRAIN)
    routed = RoutedModel(tiny_model())
    adapters = bank_of(routed)
    before = {name: layer.shelves["bank"].up.clone() for name, layer in routed.layers.items()}
    routed.router.kernel = kernel
    routes = train_coefficients(routed, people(routed.backbone), config)

    plain = tiny_model()
    for route, person in zip(routes, people(plain), strict=True):
        fused = person[2]
        assert (route.slots, route.weights) == (fused.slots, fused.weights)
        wanted = trained_plainly(plain, adapters, person, config)
        for name, values in wanted.items():
            assert route.coefficients is not None and (values - 1).abs().max() > 0.05
            torch.testing.assert_close(route.coefficients[name], values, atol=2e-3, rtol=1e-3)  # kept as float16
        width = RANK if per == "direction" else 1
        assert route.bytes == fused.bytes + 2 * len(routed.layers) * len(fused.slots) * width
    for name, layer in routed.layers.items():
        torch.testing.assert_close(layer.shelves["bank"].up, before[name], atol=0, rtol=0)


def test_users_whose_epochs_end_early_are_left_as_they_are_then(tiny_model):
    config = CoefficientConfig(train=TrainConfig(learning_rate=0.1, steps=3, examples_per_step=2, epochs=1.0))
    routed = RoutedModel(tiny_model())
    bank_of(routed)
    users = people(routed.backbone)  # one, two and three examples: one, one and two steps
    steps: list[int] = []
    together = train_coefficients(routed, users, config, on_step=steps.append)
    assert steps == [1, 2]
    for user, route in zip(users, together, strict=True):
        alone = train_coefficients(routed, [user], config)[0]
        for name, values in alone.coefficients.items():
            torch.testing.assert_close(route.coefficients[name], values, atol=2e-3, rtol=1e-3)


def test_what_cannot_be_trained_is_said(tiny_model):
    routed = RoutedModel(tiny_model())
    bank_of(routed)
    with pytest.raises(ValueError, match="user u has no training example"):
        train_coefficients(routed, [("u", [], ROUTES[0])], CoefficientConfig())
    with torch.no_grad():
        routed.layers[next(iter(routed.layers))].shelves["bank"].up.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="user 0 in step 0 is not finite"):
        train_coefficients(routed, people(routed.backbone)[:1], CoefficientConfig(train=TRAIN))
