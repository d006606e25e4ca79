"""Packs: many adapters trained at once over one frozen base, as if each had been trained alone.

Row group g of every batch is routed to slot g with weight 1. Each adapter draws its own examples from its own seed, its
loss is the mean over its own target tokens, and its gradient is clipped by its own norm: so who shares the pack changes
nothing. Anchors, per-user adapters and stacks are all packs; a stack's rows also pass through the user's frozen route.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from mta_ray.lora.adapter import Adapter
from mta_ray.lora.slots import Route, SlotLinear, take
from mta_ray.model.backbone import Backbone, RoutedModel
from mta_ray.model.batches import Tokens, collate, row_losses

PACK = "pack"
"""The shelf that a pack in training lives on."""


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
    """Optimiser steps of each adapter, however few items it has."""
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
        for name in ("alpha", "learning_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)}")
        if not 0 <= self.warmup_fraction <= 1:
            raise ValueError(f"warmup_fraction must lie in [0, 1], got {self.warmup_fraction}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be at least 0 and finite, got {self.weight_decay}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One adapter to train."""

    id: str
    """Seeds the adapter's own draws; an anchor's or a user's id."""
    examples: Sequence[Tokens]
    background: Mapping[str, Route] | None = None
    """Frozen routes below the adapter: shelf to route. A stack has its user's fused route here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackResult:
    """What a pack gives: its adapters and their losses, in the order of the jobs."""

    adapters: list[Adapter]
    losses: np.ndarray
    """(steps, adapters) mean loss on target tokens, nats."""


@runtime_checkable
class Engine(Protocol):
    """What turns losses into updates: plain torch (TorchEngine) or DeepSpeed (pipeline.deepspeed_engine)."""

    rank: int
    world_size: int

    def backward(self, loss: Tensor) -> None: ...

    def step(self, learning_rate: float) -> None:
        """Clip, update with this rate, zero the gradients."""
        ...

    def total(self, values: Tensor) -> Tensor:
        """The sum of all workers' values, on every worker."""
        ...

    def finish(self) -> None:
        """Make every trainable parameter whole on this worker; no step follows."""
        ...


class TorchEngine:
    """AdamW in one process. With `per_slot`, axis 0 of every parameter is the adapter and each is clipped alone."""

    rank = 0
    world_size = 1

    def __init__(
        self, trainable: Sequence[nn.Parameter], *, weight_decay: float, max_grad_norm: float, per_slot: bool
    ) -> None:
        self.trainable = list(trainable)
        self.max_grad_norm = max_grad_norm
        self.per_slot = per_slot
        self.optimizer = torch.optim.AdamW(self.trainable, lr=0.0, weight_decay=weight_decay)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, learning_rate: float) -> None:
        if self.per_slot:
            clip_each_slot([p.grad for p in self.trainable if p.grad is not None], self.max_grad_norm)
        else:
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


def slot_norms(gradients: Sequence[Tensor]) -> Tensor:
    """Norm of each slot's gradient (slots,): axis 0 of every tensor, over all tensors together."""
    return torch.stack([gradient.flatten(1).float().pow(2).sum(1) for gradient in gradients]).sum(0).sqrt()


def clip_each_slot(gradients: Sequence[Tensor], max_norm: float) -> None:
    """Scale each slot's gradient (axis 0, over all tensors together) to at most `max_norm`, in place."""
    factor = (max_norm / slot_norms(gradients).clamp(min=1e-12)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor.to(gradient.dtype).view(-1, *[1] * (gradient.dim() - 1)))


def schedule(step: int, config: TrainConfig) -> float:
    """Learning rate of step 0, 1, …: linear warm-up, then a cosine to zero."""
    warmup = max(1, round(config.steps * config.warmup_fraction))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, config.steps - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def prepare_pack(routed: RoutedModel, jobs: int, config: TrainConfig) -> list[nn.Parameter]:
    """Make the pack's shelf with fresh factors (A random, B zero) and return its trainable parameters."""
    routed.add_shelf(PACK, slots=jobs, rank=config.rank, alpha=config.alpha)
    trainable: list[nn.Parameter] = []
    for name, layer in routed.layers.items():
        shelf = layer.shelves[PACK]
        with torch.no_grad():
            for slot in range(jobs):
                shelf.down[slot].copy_(_initial_down(layer, name, 0 if config.shared_init else slot, config))
        trainable += [shelf.down.requires_grad_(True), shelf.up.requires_grad_(True)]
    return trainable


def _initial_down(layer: SlotLinear, name: str, slot: int, config: TrainConfig) -> Tensor:
    # As PEFT: Kaiming uniform with a = √5, so U(-1/√fan_in, 1/√fan_in).
    generator = torch.Generator().manual_seed(_seed(config.seed, f"{name}#{slot}"))
    bound = 1 / math.sqrt(layer.base.in_features)
    return (torch.rand(config.rank, layer.base.in_features, generator=generator) * 2 - 1) * bound


def train_pack(
    routed: RoutedModel,
    jobs: Sequence[Job],
    config: TrainConfig,
    *,
    make_engine: Callable[[list[nn.Parameter]], Engine] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> PackResult:
    """Train all jobs' adapters at once. With an engine of several workers each one takes a share of every job's rows.

    Raises ValueError for a job without examples and FloatingPointError when a loss is not finite.
    """
    for job in jobs:
        if not job.examples:
            raise ValueError("an adapter without a single training example cannot be trained; leave that user out")
    trainable = prepare_pack(routed, len(jobs), config)
    engine = (
        make_engine(trainable)
        if make_engine
        else TorchEngine(trainable, weight_decay=config.weight_decay, max_grad_norm=config.max_grad_norm, per_slot=True)
    )
    draws = [_draw(job.examples, config, job.id) for job in jobs]
    losses = np.zeros((config.steps, len(jobs)), dtype=np.float32)
    _check_share(len(jobs) * config.examples_per_step, engine)
    # No dropout: its random stream would depend on who shares the pack.
    routed.model.eval()

    for step in range(config.steps):
        # 1. draw: every worker draws the same rows and keeps its share
        rows = [(slot, row) for slot, draw in enumerate(draws) for row in next(draw)]
        tokens_of = torch.zeros(len(jobs))
        for slot, row in rows:
            tokens_of[slot] += row.target_tokens
        own = rows[engine.rank :: engine.world_size]

        # 2. forward and backward: sum over adapters of each adapter's own mean
        sums = _pack_losses(routed, jobs, own)
        engine.backward((sums / tokens_of.to(sums)).sum())

        # 3. step
        engine.step(schedule(step, config))
        losses[step] = (engine.total(sums.detach().float()).cpu() / tokens_of).numpy()
        if not np.isfinite(losses[step]).all():
            bad = int(np.flatnonzero(~np.isfinite(losses[step]))[0])
            raise FloatingPointError(f"loss of adapter {bad} in step {step} is not finite; lower the learning rate")
        if on_step:
            on_step(step + 1)

    engine.finish()
    for parameter in trainable:
        parameter.requires_grad_(False)
    return PackResult(adapters=[take(routed.layers, PACK, slot) for slot in range(len(jobs))], losses=losses)


def _pack_losses(routed: RoutedModel, jobs: Sequence[Job], rows: Sequence[tuple[int, Tokens]]) -> Tensor:
    """Summed loss of each job's rows (jobs,)."""
    batch = collate(routed.backbone, [row for _, row in rows], routed.device)
    routings = {PACK: routed.routing([Route(slots=(slot,), weights=(1.0,)) for slot, _ in rows])}
    for shelf in jobs[0].background or {}:
        routings[shelf] = routed.routing([jobs[slot].background[shelf] for slot, _ in rows])  # type: ignore[index]
    with routed.router.using(**routings):
        losses = row_losses(routed.model, batch)
    slots = torch.tensor([slot for slot, _ in rows], device=losses.device)
    return losses.new_zeros(len(jobs)).index_add(0, slots, losses)


def _draw(examples: Sequence[Tokens], config: TrainConfig, job_id: str) -> Iterator[list[Tokens]]:
    """Endless steps' worth of examples: shuffled epochs, of this job's own random stream."""
    rng = np.random.default_rng(_seed(config.seed, job_id))
    queue: list[int] = []
    while True:
        while len(queue) < config.examples_per_step:
            queue += rng.permutation(len(examples)).tolist()
        yield [examples[i] for i in queue[: config.examples_per_step]]
        del queue[: config.examples_per_step]


def train_whole(
    backbone: Backbone,
    examples: Sequence[Tokens],
    config: TrainConfig,
    *,
    make_engine: Callable[[list[nn.Parameter]], Engine] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> list[float]:
    """Fine-tune a small base model in place, rank and alpha unused; returns the losses, in nats.

    Token embeddings stay as they are: in a small model they are half of the weights, and few of their rows are met.
    Raises ValueError without examples and FloatingPointError when a loss is not finite.
    """
    if not examples:
        raise ValueError("a base model without a single training example cannot be trained; raise max_examples")
    model = backbone.model
    embedded = {id(p) for p in model.get_input_embeddings().parameters()}
    trainable = [p.requires_grad_(True) for p in model.parameters() if id(p) not in embedded]
    engine = (
        make_engine(trainable)
        if make_engine
        else TorchEngine(
            trainable, weight_decay=config.weight_decay, max_grad_norm=config.max_grad_norm, per_slot=False
        )
    )
    _check_share(config.examples_per_step, engine)
    draw = _draw(examples, config, "base")
    losses: list[float] = []
    # No dropout: in the few hundred steps that a small base gets, it only slows learning down.
    model.eval()
    for step in range(config.steps):
        rows = next(draw)
        tokens = sum(row.target_tokens for row in rows)
        own = rows[engine.rank :: engine.world_size]
        loss = (
            sum(row_losses(model, collate(backbone, alike, model.device)).sum() for alike in _by_length(own)) / tokens
        )
        engine.backward(loss)
        engine.step(schedule(step, config))
        losses.append(float(engine.total(loss.detach())))
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"loss in step {step} is not finite; lower the learning rate")
        if on_step:
            on_step(step + 1)
    engine.finish()
    for parameter in trainable:
        parameter.requires_grad_(False)
    return losses


def _check_share(rows: int, engine: Engine) -> None:
    if rows < engine.world_size:
        raise ValueError(f"{rows} rows a step for {engine.world_size} workers: raise examples_per_step or take fewer")


def _by_length(rows: Sequence[Tokens]) -> list[list[Tokens]]:
    """The rows in two batches, short and long, where that saves more than a quarter of the padded tokens."""
    ordered = sorted(rows, key=lambda row: len(row.ids))
    longest = len(ordered[-1].ids)
    costs = {i: i * len(ordered[i - 1].ids) + (len(ordered) - i) * longest for i in range(1, len(ordered))}
    cut = min(costs, key=costs.__getitem__, default=0)
    if not cut or costs[cut] > 0.75 * len(ordered) * longest:
        return [ordered]
    return [ordered[:cut], ordered[cut:]]


def _seed(seed: int, text: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{text}".encode()).digest()[:7], "little")
