"""One optimiser of many slots is many optimisers of torch's, each at its own step and rate."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mta_ray.personalize.slot_adam import MOMENTS, SLOT, SlotAdamW, clip_factors, slot_norms

SLOTS, STEPS = 3, 8
GENERATOR = torch.Generator().manual_seed(0)
START = [torch.randn(SLOTS, 2, 5, generator=GENERATOR), torch.randn(SLOTS, 4, 2, generator=GENERATOR)]
GRADIENTS = [[torch.randn(p.shape, generator=GENERATOR) for p in START] for _ in range(STEPS)]
MOVES = [
    {0: 1e-2},
    {0: 1e-2, 1: 3e-2},
    {0: 2e-2, 1: 1e-2, 2: 5e-2},
    {2: 1e-2},
    {0: 1e-3, 2: 1e-2},
    {},
    {1: 1e-2},
    {0: 1.0},
]


def by_torch() -> list[torch.Tensor]:
    slots = []
    for slot in range(SLOTS):
        own = [nn.Parameter(p[slot].clone()) for p in START]
        optimizer = torch.optim.AdamW(own, lr=0.0, weight_decay=0.1)
        for rates, gradients in zip(MOVES, GRADIENTS, strict=True):
            if slot in rates:
                optimizer.param_groups[0]["lr"] = rates[slot]
                for p, gradient in zip(own, gradients, strict=True):
                    p.grad = gradient[slot].clone()
                optimizer.step()
        slots.append([p.detach() for p in own])
    return [torch.stack([slot[n] for slot in slots]) for n in range(len(START))]


@pytest.mark.parametrize("is_flat", [False, True])
def test_each_slot_is_moved_as_by_an_adamw_of_its_own(is_flat: bool) -> None:
    if is_flat:  # one piece that holds both parameters, as DeepSpeed cuts them
        params = [nn.Parameter(torch.cat([p.flatten() for p in START]))]
    else:
        params = [nn.Parameter(p.clone()) for p in START]
    optimizer = SlotAdamW(params, slots=SLOTS, weight_decay=0.1)
    optimizer.prepare(is_flat=is_flat)
    if is_flat:
        slots = [torch.arange(SLOTS)[:, None, None].expand(p.shape).flatten() for p in START]
        optimizer.state[params[0]][SLOT].copy_(torch.cat(slots))
    for rates, gradients in zip(MOVES, GRADIENTS, strict=True):
        rest = set(range(SLOTS)) - set(rates)
        noisy = [g.clone() for g in gradients]
        for gradient in noisy:
            gradient[list(rest)] = float("nan")  # what lies in the gradient of a slot that rests does not matter
        flat = [torch.cat([g.flatten() for g in noisy])]
        for p, gradient in zip(params, flat if is_flat else noisy, strict=True):
            p.grad = gradient
        optimizer.rates = rates
        optimizer.step()
    wanted = by_torch()
    got = [p.detach() for p in params]
    if is_flat:
        sizes = [p.numel() for p in START]
        got = [part.view(p.shape) for part, p in zip(got[0].split(sizes), START, strict=True)]
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert optimizer.steps == [sum(slot in rates for rates in MOVES) for slot in range(SLOTS)]
    assert all(torch.isfinite(optimizer.state[p][moment]).all() for p in params for moment in MOMENTS)


def test_each_slot_is_clipped_alone() -> None:
    gradients = [torch.zeros(2, 1, 2), torch.zeros(2, 1, 2)]
    gradients[0][0], gradients[1][0] = 3.0, 4.0  # norm √(2·9 + 2·16) = √50
    gradients[0][1] = 0.1  # norm √0.02
    norms = slot_norms(gradients)
    torch.testing.assert_close(norms, torch.tensor([50**0.5, 0.02**0.5]))
    torch.testing.assert_close(clip_factors(norms, 1.0), torch.tensor([50**-0.5, 1.0]))
    assert clip_factors(torch.zeros(1), 1.0) == 1.0
