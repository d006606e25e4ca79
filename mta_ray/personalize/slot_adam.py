"""AdamW in which every slot is at its own step with its own rate, so that adapters of one pack need not march in line.

A stacked parameter has the slot on axis 0. Under DeepSpeed's ZeRO the optimiser sees flat pieces of such parameters;
then a map says which slot each of their elements belongs to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Of AdamW, under the names that torch and DeepSpeed give them."""
SLOT = "slot"
"""Optimiser state of a flat piece: the slot of each element, int16."""


class SlotAdamW(torch.optim.Optimizer):
    """torch's AdamW (Loshchilov & Hutter, 2019), slot by slot: equal to as many optimisers as there are slots.

    Before each `step`, `rates` says which slots move and how far; the others keep values and step count.
    """

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        *,
        slots: int,
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, {"weight_decay": weight_decay, "betas": betas, "eps": eps})
        self.rates: Mapping[int, float] = {}
        """Slot to learning rate, for the next step."""
        self.steps = [0] * slots
        """Steps that each slot has made."""

    def prepare(self, params: Sequence[Tensor] | None = None, *, is_flat: bool = False) -> None:
        """Make the state now, at zero, for all parameters as the optimiser sees them. Flat ones get a slot map too."""
        for p in params or [p for group in self.param_groups for p in group["params"]]:
            state = self.state[p]
            for moment in MOMENTS:
                state.setdefault(moment, torch.zeros_like(p, memory_format=torch.preserve_format))
            if is_flat:
                state.setdefault(SLOT, torch.zeros_like(p, dtype=torch.int16))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move the slots that `rates` names by one step of AdamW."""
        if not self.rates:
            return
        for slot in self.rates:
            self.steps[slot] += 1
        for group in self.param_groups:
            factors = self._factors(group)
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, group, factors)

    def _factors(self, group: dict[str, Any]) -> Tensor:
        """(4, slots): what is left by weight decay, the step's size, 1/√(second bias correction), moves or not."""
        first, second = group["betas"]
        rows = torch.zeros(4, len(self.steps), dtype=torch.float64)
        rows[0] = rows[2] = 1.0
        for slot, rate in self.rates.items():
            step = self.steps[slot]
            rows[:, slot] = torch.tensor(
                [
                    1 - rate * group["weight_decay"],
                    rate / (1 - first**step),
                    (1 - second**step) ** -0.5,
                    1.0,
                ],
                dtype=torch.float64,
            )
        return rows

    def _move(self, p: Tensor, group: dict[str, Any], factors: Tensor) -> None:
        state = self.state[p]
        if MOMENTS[0] not in state:
            self.prepare([p])
        first, second = (state[moment] for moment in MOMENTS)
        gradient = p.grad.to(first.dtype)  # type: ignore[union-attr]
        kept, size, correction, moves = self._spread(factors, p, state).unbind(0)

        # A slot that rests is multiplied with 1 and gets 0, whatever lies in its gradient.
        gradient = torch.where(moves > 0, gradient, 0)
        first.add_((gradient - first) * moves, alpha=1 - group["betas"][0])
        second.add_((gradient * gradient - second) * moves, alpha=1 - group["betas"][1])
        p.mul_(kept)
        p.sub_(size * first / (second.sqrt() * correction + group["eps"]))

    def _spread(self, factors: Tensor, p: Tensor, state: dict[str, Any]) -> Tensor:
        """(4, like p or broadcast to it)."""
        rows = factors.to(p)
        if SLOT in state:
            return rows[:, state[SLOT].to(torch.int64)]
        return rows.view(4, -1, *[1] * (p.dim() - 1))


def slot_norms(gradients: Sequence[Tensor]) -> Tensor:
    """Norm of each slot's gradient (slots,): axis 0 of every tensor, over all tensors together."""
    return torch.stack([gradient.flatten(1).float().pow(2).sum(1) for gradient in gradients]).sum(0).sqrt()


def clip_factors(norms: Tensor, max_norm: float) -> Tensor:
    """What each slot's gradient is multiplied with, so that its norm is at most `max_norm`: (slots,), at most 1."""
    return (max_norm / norms.clamp(min=1e-12)).clamp(max=1.0)


def per_slot(factors: Tensor, like: Tensor) -> Tensor:
    """One factor a slot, shaped to multiply a stacked tensor."""
    return factors.to(like.dtype).view(-1, *[1] * (like.dim() - 1))
