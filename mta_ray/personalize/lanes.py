"""Lanes: many adapters trained at once over one frozen base, each as if it had been trained alone.

Row group g of every batch is routed to slot g with weight 1. Each adapter draws its own examples from its own seed, its
loss is the mean over its own target tokens, its gradient is clipped by its own norm, and its rate follows its own step
of its own budget: so who shares the pack, and since when, changes nothing. An adapter that has done its steps leaves
its lane, and the next one takes it in the same breath.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from mta_ray.lora.adapter import Adapter, Factors
from mta_ray.lora.kernels import gather
from mta_ray.lora.slots import Route, SlotLinear
from mta_ray.model.backbone import RoutedModel
from mta_ray.model.batches import Tokens, collate, row_losses
from mta_ray.personalize.engines import SlotEngine, SlotState, TorchSlotEngine
from mta_ray.personalize.train_config import TrainConfig, budget, schedule

PACK = "pack"
"""The shelf that a pack in training lives on."""
SIDES = ("down", "up")
CPU_TOKENS, CPU_NUMBERS = 1024, 2**17
"""Tokens of one forward on a CPU, and numbers of one hidden state, whichever is more tokens: see `cpu_tokens`."""
RowT = TypeVar("RowT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """An adapter on its way: what it takes to go on elsewhere."""

    state: SlotState
    """Its tensors lie in the order of `parameter_names`."""
    losses: tuple[float, ...]
    """Mean loss on target tokens of each step so far, nats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One adapter to train."""

    id: str
    """Seeds the adapter's own draws; an anchor's or a user's id."""
    examples: Sequence[Tokens]
    background: Mapping[str, Route] | None = None
    """Frozen routes below the adapter: shelf to route. A stack has its user's fused route here."""
    start: Checkpoint | None = None
    """Where it was stopped; None: at the beginning."""

    def __post_init__(self) -> None:
        if not self.examples:
            raise ValueError("an adapter without a single training example cannot be trained; leave that user out")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What a worker would like to happen before the next step. It happens on all workers if one of them wishes it."""

    take: bool = False
    """Ask for jobs: there are free lanes and there may be jobs again."""
    keep: bool = False
    """Keep a checkpoint of every lane."""
    stop: bool = False
    """Keep a checkpoint of every lane, then end."""


@runtime_checkable
class Dispatcher(Protocol):
    """Where lanes get their jobs, and where they leave what becomes of them.

    With several workers `take` gives the same jobs on each of them; the rest is called on each with the same values.
    """

    def take(self, lanes: int) -> list[Job]:
        """At most so many jobs, to be trained now; none: there is no more to do, or not yet."""
        ...

    def wishes(self, has_free_lanes: bool) -> Wishes: ...

    def stepped(self, done: Mapping[str, int], losses: Mapping[str, float], tokens: int) -> None:
        """By job: steps made so far and this step's loss; and the tokens of all rows of the step."""
        ...

    def finished(self, job: Job, adapter: Adapter, losses: Sequence[float]) -> None: ...

    def failed(self, job: Job, reason: str) -> None:
        """This adapter's loss or gradient is not finite. The others go on as if it had not been there."""
        ...

    def keep(self, checkpoints: Sequence[tuple[Job, Checkpoint]]) -> None: ...


@dataclass(slots=True)
class _Lane:
    job: Job
    draw: Iterator[list[Tokens]]
    steps: int
    """Its budget."""
    losses: list[float] = field(default_factory=list)

    @property
    def done(self) -> int:
        return len(self.losses)


def train_lanes(
    routed: RoutedModel,
    lanes: int,
    dispatcher: Dispatcher,
    config: TrainConfig,
    *,
    make_engine: Callable[[list[nn.Parameter]], SlotEngine] | None = None,
) -> None:
    """Train what the dispatcher gives, `lanes` at once, until it gives no more or wishes to stop.

    With an engine of several workers each one takes a share of every step's rows.
    """
    trainable = prepare_pack(routed, lanes, config)
    engine = (
        make_engine(trainable)
        if make_engine
        else TorchSlotEngine(trainable, weight_decay=config.weight_decay, max_grad_norm=config.max_grad_norm)
    )
    try:
        with _gathering(routed):
            _Pack(routed, lanes, dispatcher, config, engine, trainable).run()
        engine.finish()  # only where all workers come: what one of them failed with must not wait for the others
    finally:
        for parameter in trainable:
            parameter.requires_grad_(False)


class _Pack:
    def __init__(
        self,
        routed: RoutedModel,
        lanes: int,
        dispatcher: Dispatcher,
        config: TrainConfig,
        engine: SlotEngine,
        trainable: list[nn.Parameter],
    ) -> None:
        self.routed = routed
        self.dispatcher = dispatcher
        self.config = config
        self.engine = engine
        self.trainable = trainable
        self.free = list(range(lanes))
        self.busy: dict[int, _Lane] = {}
        self.wishes = Wishes(take=True)

    def run(self) -> None:
        # No dropout: its random stream would depend on who shares the pack.
        self.routed.model.eval()
        while True:
            if self.wishes.take and self.free:
                self._take()
            if not self.busy:
                return
            self._step()
            if self.wishes.keep or self.wishes.stop:
                self._keep()
            if self.wishes.stop:
                return

    def _take(self) -> None:
        states = {}
        for job in self.dispatcher.take(len(self.free)):
            slot = self.free.pop(0)
            lane = _Lane(job, draw_examples(job.examples, self.config, job.id), budget(len(job.examples), self.config))
            states[slot] = job.start.state if job.start else _fresh_state(self.routed, job, self.config)
            if job.start is not None:
                lane.losses = list(job.start.losses)
                for _ in lane.losses:
                    next(lane.draw)
            self.busy[slot] = lane
        self.engine.load(states)

    def _step(self) -> None:
        # 1. draw: every worker draws the same rows
        rows = [(slot, row) for slot, lane in sorted(self.busy.items()) for row in next(lane.draw)]
        losses: Tensor | None = None
        before = len(self.busy)
        while losses is None and self.busy:
            # 2. forward, backward and step, again without the lanes whose numbers are not finite
            rows = [(slot, row) for slot, row in rows if slot in self.busy]
            losses = self._try_step(rows)
        if len(self.busy) < before:  # others may take the lanes of those that have left
            self.wishes = replace(self.wishes, take=True)
        if losses is None:
            return

        # 3. account
        done, loss = {}, {}
        for slot, lane in self.busy.items():
            lane.losses.append(float(losses[slot]))
            done[lane.job.id], loss[lane.job.id] = lane.done, lane.losses[-1]
        self.dispatcher.stepped(done, loss, sum(len(row.ids) for _, row in rows))

        # 4. who is done leaves
        finished = [slot for slot, lane in self.busy.items() if lane.done == lane.steps]
        if finished:
            states = self.engine.read(finished)
            for slot in finished:
                lane = self.busy.pop(slot)
                self.free.append(slot)
                self.dispatcher.finished(lane.job, _adapter(self.routed, states[slot]), lane.losses)
            self.wishes = replace(self.wishes, take=True)

    def _try_step(self, rows: list[tuple[int, Tokens]]) -> Tensor | None:
        """Each slot's mean loss; None where some lane's was not finite: it has left, and nothing was updated."""
        slots = len(self.free) + len(self.busy)
        tokens = torch.zeros(slots)
        for slot, row in rows:
            tokens[slot] += row.target_tokens

        # 1. forward: the sum over adapters of each adapter's own mean; what this worker wishes travels with its losses
        sums, loss = self._forward(rows, tokens.clamp(min=1))
        own = self.dispatcher.wishes(bool(self.free))
        wishes = torch.tensor([float(own.take), float(own.keep), float(own.stop)], device=sums.device)
        totals = self.engine.total(torch.cat([sums, wishes])).cpu()
        self.wishes = Wishes(take=bool(totals[-3]), keep=bool(totals[-2]), stop=bool(totals[-1]))
        losses = totals[:-3] / tokens.clamp(min=1)
        if not self._drop(losses, "loss"):
            return None

        # 2. backward and step
        self.engine.backward(loss)
        bad = self.engine.step({slot: schedule(lane.done, lane.steps, self.config) for slot, lane in self.busy.items()})
        norms = torch.zeros(slots)
        norms[bad] = float("nan")
        return losses if self._drop(norms, "gradient") else None

    def _drop(self, numbers: Tensor, what: str) -> bool:
        """Take out the lanes whose number is not finite; whether there were none."""
        bad = [slot for slot in self.busy if not math.isfinite(numbers[slot])]
        for slot in bad:
            lane = self.busy.pop(slot)
            self.free.append(slot)
            reason = f"its {what} in step {lane.done} is not finite; lower the learning rate, or look at its examples"
            self.dispatcher.failed(lane.job, reason)
        return not bad

    def _forward(self, rows: list[tuple[int, Tokens]], tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(slots,) summed loss of each slot's rows of this worker, and the loss to go backward from."""
        # A step may draw an example of a short history several times: it is looked at once, and counts so often.
        batches = by_length(list(Counter(rows).items()), _length)
        if self.engine.is_whole and self.routed.device.type == "cpu":
            most = cpu_tokens(self.routed) * self.engine.world_size
            batches = [part for batch in batches for part in parts_of(batch, _length, most)]
        # A slot's rows side by side: where all slots have as many, each slot's are one product.
        batches = [sorted(batch, key=lambda one: one[0][0]) for batch in batches]
        sums, losses = torch.zeros(len(tokens), device=self.routed.device), []
        gradients: list[Tensor] = []
        for batch in batches:
            part = self._summed_losses(batch, len(tokens))
            sums += part.detach()
            losses.append((part / tokens.to(part)).sum())
            if self.engine.is_whole and len(batches) > 1:  # backward at once, so that its activations can go
                found = torch.autograd.grad(losses.pop(), self.trainable)
                gradients = gradients or [torch.zeros_like(one) for one in found]
                for total, one in zip(gradients, found, strict=True):
                    total.add_(one)
        # A loss with those gradients: every engine is given one loss a step.
        losses += [(p * gradient).sum() for p, gradient in zip(self.trainable, gradients, strict=False)]
        return sums, torch.stack(losses).sum()

    def _summed_losses(self, counted: list[tuple[tuple[int, Tokens], int]], slots: int) -> Tensor:
        """(slots,) summed loss of each slot's rows of this worker, each as often as it counts; differentiable."""
        # Every worker runs as many forwards as the others: one without a row of its own looks at the first.
        own = counted[self.engine.rank :: self.engine.world_size] or [(counted[0][0], 0)]
        losses = self._row_losses([row for row, _ in own])
        times = torch.tensor([count for _, count in own], dtype=losses.dtype, device=losses.device)
        index = torch.tensor([slot for (slot, _), _ in own], device=losses.device)
        return losses.new_zeros(slots).index_add(0, index, losses * times)

    def _row_losses(self, rows: list[tuple[int, Tokens]]) -> Tensor:
        batch = collate(self.routed.backbone, [row for _, row in rows], self.routed.device)
        routings = {PACK: self.routed.routing([Route(slots=(slot,), weights=(1.0,)) for slot, _ in rows])}
        below = [self.busy[slot].job.background or {} for slot, _ in rows]
        for shelf in below[0]:
            routings[shelf] = self.routed.routing([routes[shelf] for routes in below])
        with self.routed.router.using(**routings):
            return row_losses(self.routed.model, batch)

    def _keep(self) -> None:
        states = self.engine.read(sorted(self.busy))
        self.dispatcher.keep(
            [
                (lane.job, Checkpoint(state=states[slot], losses=tuple(lane.losses)))
                for slot, lane in sorted(self.busy.items())
            ]
        )


def prepare_pack(routed: RoutedModel, lanes: int, config: TrainConfig) -> list[nn.Parameter]:
    """Make the pack's shelf of empty slots; its trainable parameters in the order of `parameter_names`."""
    routed.add_shelf(PACK, slots=lanes, rank=config.rank, alpha=config.alpha, dtype=torch.float32)
    shelves = [layer.shelves[PACK] for layer in routed.layers.values()]
    return [getattr(shelf, side).requires_grad_(True) for shelf in shelves for side in SIDES]


def parameter_names(routed: RoutedModel) -> list[str]:
    """`MODULE.down` and `MODULE.up` of each adapted module, in the order in which states hold their tensors."""
    return [f"{name}.{side}" for name in routed.layers for side in SIDES]


def initial_down(layer: SlotLinear, job_id: str, config: TrainConfig) -> Tensor:
    """A as PEFT draws it: Kaiming uniform with a = √5, so U(-1/√fan_in, 1/√fan_in); (rank, fan_in)."""
    seed = seed_of(config.seed, f"{layer.name}#{'0' if config.shared_init else job_id}")
    generator = torch.Generator().manual_seed(seed)
    bound = 1 / math.sqrt(layer.base.in_features)
    return (torch.rand(config.rank, layer.base.in_features, generator=generator) * 2 - 1) * bound


def _length(counted: tuple[tuple[int, Tokens], int]) -> int:
    return len(counted[0][1].ids)


def by_length(rows: Sequence[RowT], length: Callable[[RowT], int]) -> list[list[RowT]]:
    """The rows in two batches, short and long, where that saves more than a quarter of the padded tokens."""
    ordered = sorted(rows, key=length)
    longest = length(ordered[-1])
    costs = {i: i * length(ordered[i - 1]) + (len(ordered) - i) * longest for i in range(1, len(ordered))}
    cut = min(costs, key=costs.__getitem__, default=0)
    if not cut or costs[cut] > 0.75 * len(ordered) * longest:
        return [ordered]
    return [ordered[:cut], ordered[cut:]]


def parts_of(rows: Sequence[RowT], length: Callable[[RowT], int], tokens: int) -> Iterator[list[RowT]]:
    """The rows, which are in order of length, in turn: as many at once as have so many tokens."""
    while rows:
        take = len(rows)
        while take > 1 and take * length(rows[take - 1]) > tokens:
            take -= 1
        yield list(rows[:take])
        rows = rows[take:]


def cpu_tokens(routed: RoutedModel) -> int:
    """Of one forward on a CPU, at most: more than its caches hold makes it slower. A GPU is given all rows at once."""
    return max(CPU_TOKENS, CPU_NUMBERS // min(layer.base.in_features for layer in routed.layers.values()))


def _fresh_state(routed: RoutedModel, job: Job, config: TrainConfig) -> SlotState:
    values: list[Tensor] = []
    for layer in routed.layers.values():
        values += [initial_down(layer, job.id, config), torch.zeros(config.rank, layer.base.out_features)]
    return SlotState.fresh(values)


def _adapter(routed: RoutedModel, state: SlotState) -> Adapter:
    pairs = zip(state.values[::2], state.values[1::2], strict=True)
    factors = {
        name: Factors(down=down, up=up.T.contiguous()) for name, (down, up) in zip(routed.layers, pairs, strict=True)
    }
    return Adapter(factors=factors, scale=float(next(iter(routed.layers.values())).shelves[PACK].scale))


def draw_examples(examples: Sequence[Tokens], config: TrainConfig, job_id: str) -> Iterator[list[Tokens]]:
    """Endless steps' worth of examples: shuffled epochs, of this job's own random stream."""
    rng = np.random.default_rng(seed_of(config.seed, job_id))
    queue: list[int] = []
    while True:
        while len(queue) < config.examples_per_step:
            queue += rng.permutation(len(examples)).tolist()
        yield [examples[i] for i in queue[: config.examples_per_step]]
        del queue[: config.examples_per_step]


@contextmanager
def _gathering(routed: RoutedModel) -> Iterator[None]:
    """Within the block every row reads its own slots alone: what is not finite in one slot stays in that slot."""
    before = routed.router.kernel
    routed.router.kernel = before or gather
    try:
        yield
    finally:
        routed.router.kernel = before


def seed_of(seed: int, text: str) -> int:
    """A seed of its own for each text."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{text}".encode()).digest()[:7], "little")
