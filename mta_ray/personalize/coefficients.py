"""The smallest stack: a user trains no adapter, only how much of each part of the fused anchors there is in each layer.

Bank and base stay frozen. A coefficient multiplies one direction (a rank of an anchor) or one anchor of the user's
route in one adapted layer, and starts at one: at the fused route itself. It needs no slot when it is served.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from mta_ray.lora.slots import Route, Routing
from mta_ray.model.backbone import RoutedModel
from mta_ray.model.batches import Tokens
from mta_ray.personalize.engines import TorchSlotEngine
from mta_ray.personalize.lanes import draw_examples
from mta_ray.personalize.merge_then_adapt import BANK
from mta_ray.personalize.routed_losses import routed_losses
from mta_ray.personalize.train_config import TrainConfig, budget, schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class CoefficientConfig:
    """What is trained, and how."""

    per: Literal["direction", "anchor"] = "direction"
    """`direction`: k·r numbers in each adapted layer. `anchor`: k numbers in each, a route learned layer by layer."""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(learning_rate=0.2, steps=12, examples_per_step=4, weight_decay=0.01)
    )
    """Steps and rates; weight decay pulls a coefficient towards one. Rank and alpha mean nothing here. Of the rates
    0.05, 0.2 and 0.4 the best for the default base and `direction`, by loss on the simulated population of seed 101."""


def train_coefficients(
    routed: RoutedModel,
    users: Sequence[tuple[str, Sequence[Tokens], Route]],
    config: CoefficientConfig,
    *,
    shelf: str = BANK,
    on_step: Callable[[int], None] | None = None,
) -> list[Route]:
    """The route of each (user id, examples, fused route) with its coefficients, all users trained in one pack.

    Each user's loss is the mean over the user's own target tokens, the gradient is clipped by its own norm and examples
    are drawn from the user's own seed: who shares the pack changes nothing. Coefficients come rounded to float16.
    Raises ValueError for a user without examples and FloatingPointError where a loss or gradient is not finite.
    """
    for user_id, examples, _ in users:
        if not examples:
            raise ValueError(f"user {user_id} has no training example, so no coefficients can be trained; leave it out")
    if not users:
        return []
    pack = _Pack(routed, users, config, shelf)
    for step in range(max(pack.steps)):
        pack.step(step)
        if on_step:
            on_step(step + 1)
    return pack.routes()


class _Pack:
    def __init__(
        self,
        routed: RoutedModel,
        users: Sequence[tuple[str, Sequence[Tokens], Route]],
        config: CoefficientConfig,
        shelf: str,
    ) -> None:
        self.routed, self.users, self.config, self.shelf = routed, users, config, shelf
        routed.model.eval()
        self.fused = routed.routing([replace(route, coefficients=None) for _, _, route in users])
        # What is added to one: so that weight decay pulls towards the fused route.
        rank = next(iter(routed.layers.values())).shelves[shelf].down.shape[1]
        shape = (*self.fused.slots.shape, rank if config.per == "direction" else 1)
        self.changes = {name: nn.Parameter(torch.zeros(shape, device=routed.device)) for name in routed.layers}
        self.engine = TorchSlotEngine(
            list(self.changes.values()),
            weight_decay=config.train.weight_decay,
            max_grad_norm=config.train.max_grad_norm,
        )
        self.draws: list[Iterator[list[Tokens]]] = [draw_examples(own, config.train, name) for name, own, _ in users]
        self.steps = [budget(len(own), config.train) for _, own, _ in users]

    def step(self, step: int) -> None:
        # 1. draw
        going = [n for n, steps in enumerate(self.steps) if step < steps]
        # an example that is drawn several times is looked at once, and counts so often
        rows = Counter((n, row) for n in going for row in next(self.draws[n]))
        owner = torch.tensor([n for n, _ in rows], device=self.routed.device)
        times = torch.tensor(list(rows.values()), dtype=torch.float32, device=self.routed.device)
        tokens = torch.zeros(len(self.users))
        for (n, row), count in rows.items():
            tokens[n] += count * row.target_tokens
        tokens = tokens.to(self.routed.device)

        # 2. forward and backward: the sum over users of each one's own mean
        sums = torch.zeros_like(tokens)
        for numbers, losses in routed_losses(
            self.routed, self.shelf, [row for _, row in rows], lambda numbers: self._routing(owner[numbers])
        ):
            whose, counted = owner[numbers], losses * times[numbers]
            sums.index_add_(0, whose, counted.detach())
            self.engine.backward((counted / tokens[whose]).sum())

        # 3. step
        bad = [n for n, loss in enumerate(sums.tolist()) if not math.isfinite(loss)]
        train = self.config.train
        bad = bad or self.engine.step({n: schedule(step, self.steps[n], train) for n in going})
        if bad:
            raise FloatingPointError(
                f"the loss or gradient of user {self.users[bad[0]][0]} in step {step} is not finite; lower the "
                "learning rate, or look at the examples"
            )

    def routes(self) -> list[Route]:
        return [
            replace(route, coefficients={name: kept[n, : len(route.slots)].clone() for name, kept in self._kept()})
            for n, (_, _, route) in enumerate(self.users)
        ]

    def _kept(self) -> list[tuple[str, Tensor]]:
        return [(name, (1 + change).detach().half().float().cpu()) for name, change in self.changes.items()]

    def _routing(self, users: Tensor) -> Routing:
        coefficients: Mapping[str, Tensor] = {
            name: (1 + change[users]).to(self.routed.dtype) for name, change in self.changes.items()
        }
        return Routing(self.fused.slots[users], self.fused.weights[users], coefficients)
