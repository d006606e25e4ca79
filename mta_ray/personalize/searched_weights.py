"""Merge weights searched without gradients, on the user's own items: what PriME does (arXiv 2503.18008).

An evolution strategy (CMA-ES, Hansen 2016) of a few generations for each user; all users' candidates of a generation
are looked at together, as rows with other routes over one frozen bank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import cma
import numpy as np
import torch
from torch import Tensor

from mta_ray.lora.slots import Route, Routing
from mta_ray.model.backbone import RoutedModel
from mta_ray.model.batches import Tokens
from mta_ray.personalize.lanes import seed_of
from mta_ray.personalize.merge_then_adapt import BANK
from mta_ray.personalize.routed_losses import routed_losses


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchConfig:
    """How far the search goes."""

    generations: int = 2
    """Of candidates; times `candidates` is the budget, 10 as released."""
    candidates: int = 5
    """Weights of a user that are tried in one generation."""
    spread: float = 0.3
    """Standard deviation of the first candidates around the route's own weights."""
    max_examples: int = 32
    """Latest examples of a user that a candidate's loss is the mean of, at most."""
    seed: int = 0
    """Of the candidates; each user has draws of their own."""

    def __post_init__(self) -> None:
        for name, least in (("generations", 1), ("candidates", 2), ("max_examples", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.spread < math.inf:
            raise ValueError(f"spread must be above 0 and finite, got {self.spread}")


def search_weights(
    routed: RoutedModel,
    users: Sequence[tuple[str, Sequence[Tokens], Route]],
    config: SearchConfig,
    *,
    shelf: str = BANK,
) -> list[Route]:
    """Of each (user id, examples, route) the route with the best weights that were met, its own among them.

    Best is the lowest mean loss on the user's target tokens. A route over one slot has nothing to weigh and comes back
    as it is. Raises ValueError for a user without examples.
    """
    for user_id, examples, _ in users:
        if not examples:
            raise ValueError(f"user {user_id} has no training example, so no weights can be searched; leave it out")
    routed.model.eval()
    found = [route for _, _, route in users]
    able = [n for n, route in enumerate(found) if len(route.slots) > 1]  # CMA-ES wants two dimensions
    if not able:
        return found
    rows = [list(users[n][1])[-config.max_examples :] for n in able]
    least = _losses(routed, shelf, [[found[n]] for n in able], rows)[:, 0]
    searches = [_search(users[n][0], found[n], config) for n in able]
    for _ in range(config.generations):
        asked = [search.ask() for search in searches]
        tried = [
            [replace(found[n], weights=tuple(float(w) for w in weights)) for weights in candidates]
            for n, candidates in zip(able, asked, strict=True)
        ]
        losses = _losses(routed, shelf, tried, rows)
        for i, n in enumerate(able):
            searches[i].tell(asked[i], losses[i].tolist())
            best = int(losses[i].argmin())
            if losses[i, best] < least[i]:
                least[i], found[n] = losses[i, best], tried[i][best]
    return found


def _search(user_id: str, route: Route, config: SearchConfig) -> cma.CMAEvolutionStrategy:
    rng = np.random.default_rng(seed_of(config.seed, user_id))
    options = {
        "popsize": config.candidates,
        "randn": lambda *shape: rng.standard_normal(shape),  # draws of its own: pycma's are numpy's, which all share
        "seed": np.nan,
        "verbose": -9,
    }
    return cma.CMAEvolutionStrategy(list(route.weights), config.spread, options)


@torch.no_grad()
def _losses(
    routed: RoutedModel, shelf: str, candidates: Sequence[Sequence[Route]], examples: Sequence[Sequence[Tokens]]
) -> np.ndarray:
    """(users, candidates) mean loss on each user's target tokens through each of their candidates."""
    routing = routed.routing([route for tried in candidates for route in tried])
    wanted = [
        (n * len(tried) + c, row)
        for n, (tried, rows) in enumerate(zip(candidates, examples, strict=True))
        for c in range(len(tried))
        for row in rows
    ]
    which = torch.tensor([candidate for candidate, _ in wanted], device=routed.device)
    sums = torch.zeros(len(routing.slots), dtype=torch.float64, device=routed.device)

    def of(numbers: Tensor) -> Routing:
        return Routing(routing.slots[which[numbers]], routing.weights[which[numbers]])

    for numbers, losses in routed_losses(routed, shelf, [row for _, row in wanted], of):
        sums.index_add_(0, which[numbers], losses.double())
    tokens = np.array([sum(row.target_tokens for row in rows) for rows in examples])
    return sums.cpu().numpy().reshape(len(examples), -1) / tokens[:, None]
