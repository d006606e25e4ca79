"""One loaded model that is asked users' queries, each user through routes of their own, and that trains own adapters.

Which routes and adapters make a method is not known here.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from mta_ray.lamp.users import User
from mta_ray.lora.adapter import Adapter
from mta_ray.lora.slots import Route, put
from mta_ray.model.backbone import RoutedModel
from mta_ray.model.generate import answer
from mta_ray.personalize.base_model import Wording, tokenised
from mta_ray.personalize.merge_then_adapt import stack_users
from mta_ray.personalize.train_config import TrainConfig

MERGED, STACK = "merged", "stack"
"""Shelves of what is each user's own: a merged adapter, and a trained one on top."""
Below = Mapping[str, Sequence[Route] | None]
"""Shelf to one route a user; None: the shelf is not used."""


class Asker:
    """Answers and own adapters of users who are handled together."""

    def __init__(self, routed: RoutedModel, wording: Wording) -> None:
        self.routed, self.wording = routed, wording

    def answers(
        self, users: Sequence[User], routes: Below | None = None, *, context_items: int | None = None
    ) -> list[str]:
        """The greedy answer to each query, users in turn. `context_items`: items retrieved into each prompt (BM25)."""
        prompts = [e.prompt for user in users for e in self.wording.queries(user, context_items=context_items)]
        counts = [len(user.queries) for user in users]
        by_query = {
            shelf: [route for route, count in zip(rows, counts, strict=True) for _ in range(count)]
            for shelf, rows in (routes or {}).items()
            if rows is not None
        }
        return answer(self.routed, prompts, by_query, max_new_tokens=self.wording.task.max_new_tokens)

    def train_own(
        self,
        users: Sequence[User],
        config: TrainConfig,
        below: Below | None = None,
        *,
        is_one_epoch: bool = False,
        context_items: int | None = None,
    ) -> tuple[list[Adapter | None], float]:
        """One adapter a user over the frozen routes `below`, on the user's items; and the seconds of one user.

        A user without an item to learn from has none. With `is_one_epoch` each user takes as many steps as meet every
        item once; those with as many share a pack.
        """
        started_s = time.perf_counter()
        groups: dict[int, list[int]] = defaultdict(list)
        examples = {n: self.wording.history(user, context_items=context_items) for n, user in enumerate(users)}
        for n, own in examples.items():
            if own:
                epoch = math.ceil(len(own) / config.examples_per_step)
                groups[epoch if is_one_epoch else config.steps].append(n)
        adapters: dict[int, Adapter] = {}
        for steps, members in groups.items():
            work = []
            for n in members:
                background = {shelf: rows[n] for shelf, rows in (below or {}).items() if rows is not None}
                work.append((users[n].id, tokenised(self.routed.backbone, examples[n]), background or None))
            trained = stack_users(self.routed, work, replace(config, steps=steps)).adapters
            adapters |= dict(zip(members, trained, strict=True))
        return [adapters.get(n) for n in range(len(users))], (time.perf_counter() - started_s) / len(users)

    def load(self, shelf: str, adapters: Sequence[Adapter | None]) -> list[Route] | None:
        """Put users' adapters on a shelf: each user's route to its own, an empty slot where there is none.

        None where nobody has one.
        """
        own = [adapter for adapter in adapters if adapter is not None]
        if not own:
            return None
        rank = own[0].rank
        self.routed.add_shelf(shelf, slots=len(adapters), rank=rank, alpha=own[0].scale * rank)
        for slot, adapter in enumerate(adapters):
            if adapter is not None:
                put(self.routed.layers, shelf, slot, adapter)
        return [Route(slots=(slot,), weights=(1.0,)) for slot in range(len(adapters))]


def history_bytes(user: User) -> int:
    """What keeping the user's items takes, as UTF-8."""
    return sum(len(f"{item.content}{item.target}".encode()) for item in user.history)
