"""Train a pack of adapters whose users are all at hand, or a small base model as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from mta_ray.lora.adapter import Adapter
from mta_ray.model.backbone import Backbone, RoutedModel
from mta_ray.model.batches import Tokens, collate, row_losses
from mta_ray.personalize.engines import Engine, SlotEngine, TorchEngine
from mta_ray.personalize.lanes import Checkpoint, Job, Wishes, by_length, draw_examples, train_lanes
from mta_ray.personalize.train_config import TrainConfig, schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class PackResult:
    """What a pack gives, in the order of the jobs."""

    adapters: list[Adapter]
    losses: list[list[float]]
    """Of each adapter, the mean loss on its target tokens in each of its steps, nats."""


def train_pack(
    routed: RoutedModel,
    jobs: Sequence[Job],
    config: TrainConfig,
    *,
    make_engine: Callable[[list[nn.Parameter]], SlotEngine] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> PackResult:
    """Train all jobs' adapters at once; `on_step` is told how many steps have been made.

    Raises FloatingPointError when a loss or gradient is not finite.
    """
    at_hand = _AtHand(jobs, on_step)
    train_lanes(routed, len(jobs), at_hand, config, make_engine=make_engine)
    results = [at_hand.results[number] for number in range(len(jobs))]
    return PackResult(adapters=[adapter for adapter, _ in results], losses=[losses for _, losses in results])


class _AtHand:
    """A dispatcher of jobs that all begin at once and whose results stay in memory."""

    def __init__(self, jobs: Sequence[Job], on_step: Callable[[int], None] | None) -> None:
        self.jobs = list(jobs)
        self.waiting = list(jobs)
        self.on_step = on_step
        self.results: dict[int, tuple[Adapter, list[float]]] = {}
        self._steps = 0

    def take(self, lanes: int) -> list[Job]:
        taken, self.waiting = self.waiting[:lanes], self.waiting[lanes:]
        return taken

    def wishes(self, has_free_lanes: bool) -> Wishes:
        return Wishes()

    def stepped(self, done: Mapping[str, int], losses: Mapping[str, float], tokens: int) -> None:
        self._steps += 1
        if self.on_step:
            self.on_step(self._steps)

    def finished(self, job: Job, adapter: Adapter, losses: Sequence[float]) -> None:
        self.results[self._number(job)] = (adapter, list(losses))

    def failed(self, job: Job, reason: str) -> None:
        raise FloatingPointError(f"adapter {self._number(job)}: {reason}")

    def keep(self, checkpoints: Sequence[tuple[Job, Checkpoint]]) -> None:
        """Never wished for."""

    def _number(self, job: Job) -> int:
        return next(number for number, known in enumerate(self.jobs) if known is job)


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
        else TorchEngine(trainable, weight_decay=config.weight_decay, max_grad_norm=config.max_grad_norm)
    )
    if config.examples_per_step < engine.world_size:
        raise ValueError(
            f"{config.examples_per_step} examples a step for {engine.world_size} workers: raise examples_per_step, or "
            "take fewer workers"
        )
    draw = draw_examples(examples, config, "base")
    losses: list[float] = []
    # No dropout: in the few hundred steps that a small base gets, it only slows learning down.
    model.eval()
    for step in range(config.steps):
        rows = next(draw)
        tokens = sum(row.target_tokens for row in rows)
        own = rows[engine.rank :: engine.world_size]
        batches = by_length(own, lambda row: len(row.ids))
        loss = sum(row_losses(model, collate(backbone, alike, model.device)).sum() for alike in batches) / tokens
        engine.backward(loss)
        engine.step(schedule(step, config.steps, config))
        losses.append(float(engine.total(loss.detach())))
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"loss in step {step} is not finite; lower the learning rate")
        if on_step:
            on_step(step + 1)
    engine.finish()
    for parameter in trainable:
        parameter.requires_grad_(False)
    return losses
