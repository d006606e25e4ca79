"""What turns losses into updates: here plain torch in one process; pipeline.deepspeed_engine, over several workers.

Two kinds: an engine of a whole model, and one of slots, whose adapters come, go and are kept one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mta_ray.personalize.slot_adam import MOMENTS, SlotAdamW, clip_factors, per_slot, slot_norms


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotState:
    """One adapter in training, apart from the pack it is in: it goes on in any slot of any pack as if never moved."""

    steps: int
    """Optimiser steps it has made."""
    values: tuple[Tensor, ...]
    """One fp32 tensor on the CPU for each stacked parameter, without its slot axis."""
    first: tuple[Tensor, ...]
    """AdamW's first moments, as `values`."""
    second: tuple[Tensor, ...]
    """AdamW's second moments, as `values`."""

    @classmethod
    def fresh(cls, values: Sequence[Tensor]) -> SlotState:
        """An adapter before its first step."""
        zeros = tuple(torch.zeros_like(value) for value in values)
        return cls(steps=0, values=tuple(values), first=zeros, second=zeros)


class Workers(Protocol):
    """Who shares the rows of a step."""

    rank: int
    world_size: int

    def total(self, values: Tensor) -> Tensor:
        """The sum of all workers' values, on every worker."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Gradients of the sum of all workers' losses; once before each step."""
        ...

    def finish(self) -> None:
        """Make every trainable parameter whole on this worker; no step follows."""
        ...


@runtime_checkable
class Engine(Workers, Protocol):
    """Of a whole model."""

    def step(self, learning_rate: float) -> None:
        """Clip, update with this rate, zero the gradients."""
        ...


@runtime_checkable
class SlotEngine(Workers, Protocol):
    """Of stacked parameters, axis 0 of which is the slot. Every worker makes the same calls in the same order."""

    is_whole: bool
    """Whether this worker holds every trainable parameter whole between steps, and may look at its gradient."""

    def step(self, rates: Mapping[int, float]) -> list[int]:
        """Clip each of these slots by its own norm and update it with its rate; zero the gradients.

        Where the gradient of one of them is not finite nothing is updated at all, and those slots are returned.
        """
        ...

    def load(self, states: Mapping[int, SlotState]) -> None:
        """Put adapters into slots, with their moments."""
        ...

    def read(self, slots: Sequence[int]) -> dict[int, SlotState]:
        """The adapters in these slots as they are now: copies."""
        ...


class TorchEngine:
    """AdamW over a whole model in one process."""

    rank = 0
    world_size = 1

    def __init__(self, trainable: Sequence[nn.Parameter], *, weight_decay: float, max_grad_norm: float) -> None:
        self.trainable = list(trainable)
        self.max_grad_norm = max_grad_norm
        self.optimizer = torch.optim.AdamW(self.trainable, lr=0.0, weight_decay=weight_decay)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, learning_rate: float) -> None:
        nn.utils.clip_grad_norm_(self.trainable, self.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def total(self, values: Tensor) -> Tensor:
        """The values: there is one worker."""
        return values

    def finish(self) -> None:
        """Nothing to do: every parameter is whole."""


class TorchSlotEngine:
    """AdamW slot by slot, in one process."""

    is_whole = True
    rank = 0
    world_size = 1

    def __init__(self, trainable: Sequence[nn.Parameter], *, weight_decay: float, max_grad_norm: float) -> None:
        self.trainable = list(trainable)
        self.max_grad_norm = max_grad_norm
        self.optimizer = SlotAdamW(self.trainable, slots=len(self.trainable[0]), weight_decay=weight_decay)
        self.optimizer.prepare()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, rates: Mapping[int, float]) -> list[int]:
        gradients = [p.grad for p in self.trainable if p.grad is not None]
        norms = slot_norms(gradients).cpu()
        bad = [slot for slot in rates if not torch.isfinite(norms[slot])]
        if not bad:
            factors = clip_factors(norms, self.max_grad_norm).to(gradients[0].device)
            for gradient in gradients:
                gradient.mul_(per_slot(factors, gradient))
            self.optimizer.rates = rates
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return bad

    def total(self, values: Tensor) -> Tensor:
        """The values: there is one worker."""
        return values

    @torch.no_grad()
    def load(self, states: Mapping[int, SlotState]) -> None:
        for slot, state in states.items():
            self.optimizer.steps[slot] = state.steps
            for number, p in enumerate(self.trainable):
                p[slot].copy_(state.values[number])
                for moment, values in zip(MOMENTS, (state.first, state.second), strict=True):
                    self.optimizer.state[p][moment][slot].copy_(values[number])

    def read(self, slots: Sequence[int]) -> dict[int, SlotState]:
        def copies(tensors: Sequence[Tensor], slot: int) -> tuple[Tensor, ...]:
            return tuple(tensor[slot].detach().float().cpu().clone() for tensor in tensors)

        first, second = ([self.optimizer.state[p][moment] for p in self.trainable] for moment in MOMENTS)
        return {
            slot: SlotState(
                steps=self.optimizer.steps[slot],
                values=copies(self.trainable, slot),
                first=copies(first, slot),
                second=copies(second, slot),
            )
            for slot in slots
        }

    def finish(self) -> None:
        """Nothing to do: every parameter is whole."""
