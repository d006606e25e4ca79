"""Every way of answering a user's queries that the report compares. One pack of users at a time, all methods in turn.

A method gives predictions for all queries of the pack, what it keeps for a user in bytes, and the seconds it took to
personalise. Nothing here scores anything.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mta_ray.evaluation.asker import MERGED, STACK, Asker, history_bytes
from mta_ray.lamp.prompts import nearest_items
from mta_ray.lamp.users import User
from mta_ray.lora.adapter import Adapter, to_bytes
from mta_ray.lora.bank import Bank
from mta_ray.lora.fusion_config import FusionConfig
from mta_ray.model.backbone import RoutedModel
from mta_ray.personalize.base_model import Wording
from mta_ray.personalize.merge_then_adapt import BANK, fused_adapter, route_users
from mta_ray.personalize.train_config import TrainConfig
from mta_ray.pipeline.adapt_users import UserState

OPPU = TrainConfig(rank=8, alpha=16.0, learning_rate=1e-2, steps=12, examples_per_step=4)
"""One LoRA a user on the bare base model (OPPU): rank 8 on q and v, as released. Of the rates 2e-3, 5e-3, 1e-2 and 2e-2
the best for the default base (accuracy 0.704, 0.725, 0.733 and 0.656 on few-shot users of the simulated population of
seed 101); the released 1e-4 is for an 8B model."""

RELEASED_FUSION = FusionConfig(k=2, mode="as-released")
RELEASED_STACK = TrainConfig(rank=4, alpha=8.0, learning_rate=5e-5, steps=1, examples_per_step=8)
"""MTA's released settings: top 2, weights swapped, A and B averaged apart; rank 4, one epoch in batches of 8."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What one method gave for a pack."""

    method: str
    predictions: list[str]
    """One for each query, users in the pack's order."""
    bytes_per_user: float | int
    seconds_per_user: float | int


@dataclass(frozen=True, slots=True)
class Pack:
    """The users that are answered together, with all that the methods need of them."""

    users: Sequence[User]
    vectors: np.ndarray
    """(users, dim) in the bank's space."""
    states: Mapping[str, UserState]
    """From `adapt_users`: the routes and stacks of the methods mta_fusion and mta."""


class Methods:
    """The methods over one loaded model: `run` yields the answers of each in turn."""

    def __init__(self, routed: RoutedModel, bank: Bank, wording: Wording, oppu: TrainConfig = OPPU) -> None:
        self.routed, self.bank, self.wording, self.oppu_config = routed, bank, wording, oppu
        self.asker = Asker(routed, wording)

    def run(self, pack: Pack) -> Iterator[Answers]:
        """All methods that apply to the task; the oracle only where the best answers are known."""
        methods: list[Callable[[Pack], Answers]] = [self.non_personalised]
        if self.wording.task.has_label_targets:
            methods += [self.majority_label, self.nearest_item]
        methods += [self.rag, self.oppu, self.nearest_anchor, self.mta_fusion, self.mta, self.as_released]
        if all(query.best is not None for user in pack.users for query in user.queries):
            methods.append(self.oracle)
        for method in methods:
            yield method(pack)

    def non_personalised(self, pack: Pack) -> Answers:
        """The base model alone."""
        return Answers("non_personalised", self.asker.answers(pack.users), 0, 0)

    def majority_label(self, pack: Pack) -> Answers:
        """The user's most frequent target, whatever the query."""
        most = [Counter(item.target for item in user.history).most_common(1)[0][0] for user in pack.users]
        predictions = [label for label, user in zip(most, pack.users, strict=True) for _ in user.queries]
        return Answers("majority_label", predictions, 1, 0)

    def nearest_item(self, pack: Pack) -> Answers:
        """The target of the history item nearest to the query (BM25)."""
        predictions = [nearest_items(user, query, 1)[0].target for user in pack.users for query in user.queries]
        return Answers("nearest_item", predictions, _history_bytes(pack), 0)

    def rag(self, pack: Pack) -> Answers:
        """The base model with the nearest items of the history (BM25) in the prompt."""
        predictions = self.asker.answers(pack.users, context_items=self.wording.prompts.rag_items)
        return Answers("rag", predictions, _history_bytes(pack), 0)

    def oppu(self, pack: Pack) -> Answers:
        """One LoRA a user, trained on the user's items over the bare base model (OPPU, arXiv 2402.04401)."""
        adapters, seconds = self.asker.train_own(pack.users, self.oppu_config)
        own = self.asker.load(STACK, adapters)
        return Answers("oppu", self.asker.answers(pack.users, {STACK: own}), _stack_bytes(adapters), seconds)

    def nearest_anchor(self, pack: Pack) -> Answers:
        """The one nearest anchor's meta-LoRA."""
        started_s = time.perf_counter()
        routes = route_users(pack.vectors, self.bank, FusionConfig(k=1))
        seconds = (time.perf_counter() - started_s) / len(routes)
        return Answers("nearest_anchor", self.asker.answers(pack.users, {BANK: routes}), routes[0].bytes, seconds)

    def mta_fusion(self, pack: Pack) -> Answers:
        """Stage 2: the k nearest anchors with softmax weights, nothing trained."""
        started_s = time.perf_counter()
        config = FusionConfig(k=len(pack.states[pack.users[0].id].route.slots))
        route_users(pack.vectors, self.bank, config)  # timed only: the routes themselves come with the states
        seconds = (time.perf_counter() - started_s) / len(pack.users)
        routes = [pack.states[user.id].route for user in pack.users]
        kept = float(np.mean([route.bytes for route in routes]))
        return Answers("mta_fusion", self.asker.answers(pack.users, {BANK: routes}), kept, seconds)

    def mta(self, pack: Pack) -> Answers:
        """Stages 2 and 3: the fused anchors with the user's own stack on top."""
        states = [pack.states[user.id] for user in pack.users]
        own = self.asker.load(STACK, [state.stack for state in states])
        predictions = self.asker.answers(pack.users, {BANK: [state.route for state in states], STACK: own})
        seconds = float(np.mean([state.seconds for state in states]))
        return Answers("mta", predictions, float(np.mean([state.bytes for state in states])), seconds)

    def as_released(self, pack: Pack) -> Answers:
        """MTA as its released code does it: swapped weights, factors averaged apart, one epoch of rank 4."""
        started_s = time.perf_counter()
        routes = route_users(pack.vectors, self.bank, replace(RELEASED_FUSION, k=min(2, len(self.bank))))
        below = self.asker.load(MERGED, [fused_adapter(route, self.bank, "as-released") for route in routes])
        merged_s = (time.perf_counter() - started_s) / len(pack.users)
        adapters, seconds = self.asker.train_own(pack.users, RELEASED_STACK, {MERGED: below}, is_one_epoch=True)
        own = self.asker.load(STACK, adapters)
        predictions = self.asker.answers(pack.users, {MERGED: below, STACK: own})
        # A merged adapter cannot be shared: it is kept for each user, beside the stack.
        kept = _stack_bytes(adapters) + self.bank.bytes / len(self.bank) / 2
        return Answers("as_released", predictions, kept, merged_s + seconds)

    def oracle(self, pack: Pack) -> Answers:
        """The best possible answers; only the simulator knows them."""
        return Answers("oracle", [q.best or "" for user in pack.users for q in user.queries], 0, 0)


def _stack_bytes(adapters: Sequence[Adapter | None]) -> float:
    return float(np.mean([len(to_bytes(adapter)) if adapter else 0 for adapter in adapters]))


def _history_bytes(pack: Pack) -> float:
    return float(np.mean([history_bytes(user) for user in pack.users]))
