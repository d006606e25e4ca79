"""An actor that answers cells: the base and the bank that were asked for last stay loaded. The only place that knows
what a recipe's parts mean.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mta_ray.comparison.cells import Cell, CellAnswers
from mta_ray.comparison.datasets import Subjects, cut, prompt_hash, read_tested
from mta_ray.comparison.pooled import load_pooled
from mta_ray.comparison.recipes import Recipe
from mta_ray.evaluation.asker import MERGED, STACK, Asker, history_bytes
from mta_ray.lamp.prompts import nearest_items
from mta_ray.lamp.users import User
from mta_ray.lora.adapter import Adapter, as_kept, to_bytes
from mta_ray.lora.bank import Bank, load_bank
from mta_ray.lora.slots import Route
from mta_ray.model.backbone import RoutedModel
from mta_ray.personalize.base_model import BaseModel, open_base, tokenised
from mta_ray.personalize.coefficients import train_coefficients
from mta_ray.personalize.lanes import seed_of
from mta_ray.personalize.merge_then_adapt import BANK, encode, fused_adapter, route_users
from mta_ray.personalize.searched_weights import search_weights
from mta_ray.pipeline.actors import ActorConfig
from mta_ray.pipeline.group import start_worker


@dataclass(slots=True)
class Personalised:
    """The users of a pack as a recipe has made them."""

    routes: dict[str, Sequence[Route] | None] = field(default_factory=dict)
    """Shelf to one route a user."""
    bytes: list[float] = field(default_factory=list)
    """What is kept of each user; the answers are by what so many bytes hold."""


class Answerer:
    """Made once, then one cell a call."""

    def __init__(self, workers: ActorConfig) -> None:
        start_worker(workers.cpus)
        self.workers = workers
        self.base_path = self.bank_path = self.tested_path = ""
        self.base: BaseModel
        self.asker: Asker
        self.bank: Bank
        self.subjects: Subjects

    def keyed(self, cell: Cell) -> tuple[str, CellAnswers]:
        """The cell's key and its answers, for a caller who takes whichever is ready first."""
        return cell.key, self.run(cell)

    def run(self, cell: Cell) -> CellAnswers:
        """The answers to all queries of the cell's users, in packs that depend on the cell alone."""
        self._load(cell)
        vectors = self._vectors(cell)
        recipe = cell.recipe.seeded(cell.seed)
        chosen = [n for n, user in enumerate(self.subjects.users) if cell.asks(user)]
        chosen.sort(key=lambda n: (len(self.subjects.users[n].history), self.subjects.users[n].id))
        answers = CellAnswers(rows=[], bytes={}, seconds={}, decode_tokens=0, decode_s=0.0)
        for start in range(0, len(chosen), cell.users_per_pack):
            rows = chosen[start : start + cell.users_per_pack]
            users = [cut(self.subjects.users[n], cell.budget) for n in rows]
            answers = _joined(answers, self._pack(recipe, cell, users, vectors[rows]))
        return answers

    def _pack(self, recipe: Recipe, cell: Cell, users: list[User], vectors: np.ndarray) -> CellAnswers:
        # 1. personalise
        context = self.base.wording.prompts.rag_items if cell.rag else None
        started_s = time.perf_counter()
        made = self._personalise(recipe, cell, users, vectors, context)
        share_s = (time.perf_counter() - started_s) / len(users)
        # Whoever looks for anchors has encoded the user's items before.
        is_encoded = recipe.bank is not None and recipe.pooled is None and recipe.anchors == "nearest"
        item_s, most = (self.subjects.encode_s if is_encoded else 0.0), self.subjects.max_items

        # 2. answer
        started_s = time.perf_counter()
        said = _controlled(recipe, users)
        tokens = 0
        if said is None or None in said:
            spoken = self.asker.answers(users, made.routes, context_items=context)
            said = [text if text is not None else other for text, other in zip(said or spoken, spoken, strict=True)]
            tokenizer = self.asker.routed.backbone.tokenizer
            tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in spoken)
        decode_s = time.perf_counter() - started_s if tokens else 0.0

        # 3. account
        asked = [(user, query) for user in users for query in user.queries]
        return CellAnswers(
            rows=[(u.id, q.id, prompt_hash(q), text or "") for (u, q), text in zip(asked, said, strict=True)],
            bytes={user.id: float(kept) for user, kept in zip(users, made.bytes, strict=True)},
            seconds={user.id: share_s + item_s * min(len(user.history), most) for user in users},
            decode_tokens=tokens,
            decode_s=decode_s,
        )

    def _personalise(
        self, recipe: Recipe, cell: Cell, users: list[User], vectors: np.ndarray, context: int | None
    ) -> Personalised:
        made = Personalised(bytes=[_history_kept(recipe, cell, user) for user in users])
        if recipe.pooled is not None:
            self.asker.load(STACK, [load_pooled(cell.pooled)])
            made.routes[STACK] = [Route(slots=(0,), weights=(1.0,))] * len(users)
            return made

        # 1. a route through the bank
        if recipe.bank is not None:
            routes = self._routes(recipe, cell, users, vectors)
            routes = self._learned(recipe, users, routes, context)
            if recipe.fusion.mode == "exact":
                made.routes[BANK] = routes if recipe.anchors == "all" else [route.as_kept() for route in routes]
                kept = [0 if recipe.anchors == "all" else route.bytes for route in routes]
            else:
                merged = [as_kept(fused_adapter(route, self.bank, recipe.fusion.mode)) for route in routes]
                made.routes[MERGED] = self.asker.load(MERGED, merged)
                kept = [len(to_bytes(adapter)) for adapter in merged]
            made.bytes = [before + more for before, more in zip(made.bytes, kept, strict=True)]

        # 2. an own LoRA on top
        if recipe.own is not None:
            adapters, _ = self.asker.train_own(
                users, recipe.own, made.routes, is_one_epoch=recipe.is_one_epoch, context_items=context
            )
            made.routes[STACK] = self.asker.load(STACK, [as_kept(own) if own else None for own in adapters])
            made.bytes = [before + _adapter_bytes(own) for before, own in zip(made.bytes, adapters, strict=True)]
        return made

    def _routes(self, recipe: Recipe, cell: Cell, users: list[User], vectors: np.ndarray) -> list[Route]:
        anchors, k = len(self.bank), min(recipe.fusion.k, len(self.bank))
        if recipe.anchors == "all":
            return [Route(slots=tuple(range(anchors)), weights=(1 / anchors,) * anchors)] * len(users)
        if recipe.anchors == "random":
            drawn = [np.random.default_rng(seed_of(cell.seed, user.id)).permutation(anchors)[:k] for user in users]
            return [Route(slots=tuple(slots.tolist()), weights=(1 / k,) * k) for slots in drawn]
        return route_users(vectors, self.bank, recipe.fusion, items=[len(user.history) for user in users])

    def _learned(self, recipe: Recipe, users: list[User], routes: list[Route], context: int | None) -> list[Route]:
        """The routes with what is learned on each user's items; a user without any keeps the one given."""
        if recipe.search is None and recipe.coefficients is None:
            return routes
        backbone, wording = self.asker.routed.backbone, self.asker.wording
        examples = {n: wording.history(user, context_items=context) for n, user in enumerate(users)}
        able = [n for n, own in examples.items() if own]
        work = [(users[n].id, tokenised(backbone, examples[n]), routes[n]) for n in able]
        if recipe.search is not None:
            found = search_weights(self.asker.routed, work, recipe.search) if work else []
            work = [(name, own, route) for (name, own, _), route in zip(work, found, strict=True)]
        if recipe.coefficients is not None:
            found = train_coefficients(self.asker.routed, work, recipe.coefficients)
        learned = dict(zip(able, found, strict=True))
        return [learned.get(n, route) for n, route in enumerate(routes)]

    def _vectors(self, cell: Cell) -> np.ndarray:
        means = self.subjects.means[cell.budget]
        return encode(means, self.bank.center) if cell.bank else means

    def _load(self, cell: Cell) -> None:
        if cell.tested != self.tested_path:
            self.subjects, self.tested_path = read_tested(cell.tested), cell.tested
        if cell.base != self.base_path:
            self.base, self.base_path, self.bank_path = open_base(cell.base), cell.base, ""
            routed = RoutedModel(self.base.load(device=self.workers.device), self.base.targets)
            self.asker = Asker(routed, self.base.wording)
        if cell.bank and cell.bank != self.bank_path:
            self.bank, self.bank_path = load_bank(cell.bank, base_fingerprint=self.base.fingerprint), cell.bank
            self.bank.load_into(self.asker.routed.layers)


def _controlled(recipe: Recipe, users: Sequence[User]) -> list[str | None] | None:
    """A control's answers, None for each that it has not: without an item the base model answers. None: no control."""
    if not recipe.control:
        return None
    said: list[str | None] = []
    for user in users:
        most = Counter(item.target for item in user.history).most_common(1)
        for query in user.queries:
            if recipe.control == "oracle":
                said.append(query.best or "")
            elif not most:
                said.append(None)
            else:
                is_majority = recipe.control == "majority_label"
                said.append(most[0][0] if is_majority else nearest_items(user, query, 1)[0].target)
    return said


def _history_kept(recipe: Recipe, cell: Cell, user: User) -> float:
    if cell.rag or recipe.control == "nearest_item":
        return float(history_bytes(user))
    return 1.0 if recipe.control == "majority_label" else 0.0


def _adapter_bytes(adapter: Adapter | None) -> int:
    return len(to_bytes(adapter)) if adapter else 0


def _joined(one: CellAnswers, other: CellAnswers) -> CellAnswers:
    return CellAnswers(
        rows=one.rows + other.rows,
        bytes=one.bytes | other.bytes,
        seconds=one.seconds | other.seconds,
        decode_tokens=one.decode_tokens + other.decode_tokens,
        decode_s=one.decode_s + other.decode_s,
    )
