"""How an adapter (or a small base model) is trained: its settings, its budget of steps, its learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How each adapter of a pack is trained."""

    rank: int = 8
    """Rank of each adapter."""
    alpha: float = 16.0
    """LoRA's α; an adapter adds (α / rank) · up @ down."""
    learning_rate: float = 3e-3
    """Peak rate of the cosine schedule, reached after warmup_fraction of the steps."""
    warmup_fraction: float = 0.1
    """Share of the steps over which the rate rises linearly."""
    steps: int = 60
    """Optimiser steps of each adapter, at most."""
    epochs: float | None = None
    """An adapter's steps end when it has seen its own examples so many times; none: all have the same steps."""
    examples_per_step: int = 4
    """Examples of each adapter in one step."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Largest norm of one adapter's gradient over all its modules."""
    shared_init: bool = True
    """Start all adapters from the same A, which keeps the cross terms of averaged factors small."""
    seed: int = 0
    """Of the initial A and of the order of examples."""

    def __post_init__(self) -> None:
        for name in ("rank", "steps", "examples_per_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise ValueError(f"epochs must be above 0 and finite, got {self.epochs}; leave it out for no such limit")
        for name in ("alpha", "learning_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)}")
        if not 0 <= self.warmup_fraction <= 1:
            raise ValueError(f"warmup_fraction must lie in [0, 1], got {self.warmup_fraction}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be at least 0 and finite, got {self.weight_decay}")


def budget(examples: int, config: TrainConfig) -> int:
    """Steps of an adapter with so many examples."""
    if config.epochs is None:
        return config.steps
    return max(1, min(config.steps, math.ceil(config.epochs * examples / config.examples_per_step)))


def schedule(step: int, steps: int, config: TrainConfig) -> float:
    """Learning rate of step 0, 1, … of `steps`: linear warm-up, then a cosine to zero."""
    warmup = max(1, round(steps * config.warmup_fraction))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
