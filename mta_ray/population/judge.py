"""What fused users' answers are worth: one process with base and bank, asked again and again with other routes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from mta_ray.cluster import ClusterConfig
from mta_ray.evaluation.statistics import Interval, paired_bootstrap, paired_gains
from mta_ray.lamp.metrics import query_score
from mta_ray.lamp.users import User
from mta_ray.lora.adapter import Adapter
from mta_ray.lora.bank import Bank, load_bank
from mta_ray.lora.fusion import fuse
from mta_ray.lora.fusion_config import FusionConfig
from mta_ray.lora.slots import put
from mta_ray.model.backbone import RoutedModel
from mta_ray.model.generate import answer
from mta_ray.personalize.base_model import open_base
from mta_ray.personalize.merge_then_adapt import encode, route_users
from mta_ray.pipeline.actors import ActorConfig, crew
from mta_ray.pipeline.embed_users import item_texts
from mta_ray.pipeline.group import start_worker
from mta_ray.similarity.embedding import Encoder

BARE = "non_personalised"
"""The question without a route: the base model alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One way of answering all users' queries."""

    name: str
    fusion: FusionConfig | None
    """None: the base model alone."""
    bank: str | None = None
    """Path; none: the one that the judge was made with."""
    anchors: tuple[int, ...] | None = None
    """Slots that are in service; none: all."""
    rank: int | None = None
    """To which each anchor's ΔW is truncated; none: as trained."""
    items: int | None = None
    """Latest history items that are known of a user; none: all that the embedding takes."""
    known: str | None = None
    """Name of other histories of the same users, which they are routed by; none: their own of now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeConfig:
    """What a judge is made of."""

    base: str
    bank: str
    max_items: int
    """Latest items of a user that are encoded, where a question does not say."""
    max_words: int
    """Words of each."""
    workers: ActorConfig
    cluster: ClusterConfig = field(default_factory=ClusterConfig)


def judge(
    config: JudgeConfig,
    questions: Sequence[Question],
    users: Sequence[User],
    known: Mapping[str, Sequence[User]] | None = None,
) -> pd.DataFrame:
    """(method, user_id, query_id, prediction, score), a row for each question and query. On the connected cluster.

    `known` names other states of the same users, in the same order, for questions that route by them.
    """
    what = (config, list(users), dict(known or {}))
    with crew(_Judge, *what, workers=config.workers, cluster=config.cluster, calls=len(questions)) as actors:
        rows = [row for found in actors.map(lambda actor, q: actor.ask.remote(q), questions) for row in found]
    return pd.DataFrame(rows)


def gain(scores: pd.DataFrame, method: str, over: str) -> Interval:
    """The mean gain of a question's answers over another's, with its 95% interval over users."""
    pairs = paired_gains(scores, method, over)
    return paired_bootstrap(pairs["user_id"], pairs["gain"])


def spread(embeddings: np.ndarray, count: int) -> tuple[int, ...]:
    """`count` anchors that cover the others best, greedily: each next one is the farthest from those before.

    Gonzalez' 2-approximation of k-centres (Theoretical Computer Science 38, 1985), begun at the most central one; so
    the choice of a smaller count is the beginning of that of a larger one.
    """
    if not 1 <= count <= len(embeddings):
        raise ValueError(f"{count} of {len(embeddings)} anchors; ask for at least 1 and at most all")
    chosen = [int((embeddings @ embeddings.mean(axis=0)).argmax())]
    nearest = embeddings @ embeddings[chosen[0]]
    while len(chosen) < count:
        nearest[chosen] = np.inf
        chosen.append(int(nearest.argmin()))
        nearest = np.maximum(nearest, embeddings @ embeddings[chosen[-1]])
    return tuple(chosen)


class _Judge:
    """An actor: base and banks are loaded once."""

    def __init__(self, config: JudgeConfig, users: list[User], known: dict[str, list[User]]) -> None:
        start_worker(config.workers.cpus)
        self.config, self.users, self.known = config, users, known
        base = open_base(config.base)
        self.fingerprint = base.fingerprint
        self.routed = RoutedModel(base.load(device=config.workers.device), base.targets)
        self.wording = base.wording
        self.banks: dict[str, Bank] = {}
        self.shelves: set[str] = set()
        self.means: dict[tuple[str | None, int, str], np.ndarray] = {}
        self.encoders: dict[str, Encoder] = {}
        self.prompts = [example.prompt for user in users for example in self.wording.queries(user)]

    def ask(self, question: Question) -> list[dict[str, Any]]:
        routes = None
        if question.fusion is not None:
            path = question.bank or self.config.bank
            bank = self._bank(path)
            shelf = self._shelf(path, bank, question.rank)
            without: Collection[int] = ()
            if question.anchors is not None:
                without = set(range(len(bank))) - set(question.anchors)
            vectors = encode(self._means(question.known, question.items or self.config.max_items, bank), bank.center)
            people = self.known[question.known] if question.known else self.users
            items = [min(len(user.history), question.items or len(user.history)) for user in people]
            found = route_users(vectors, bank, question.fusion, without=without, items=items)
            routes = {shelf: [route for user, route in zip(self.users, found, strict=True) for _ in user.queries]}
        said = answer(self.routed, self.prompts, routes, max_new_tokens=self.wording.task.max_new_tokens)
        labels = self.wording.labels or None
        asked = [(user, query) for user in self.users for query in user.queries]
        return [
            {
                "method": question.name,
                "user_id": user.id,
                "query_id": query.id,
                "prediction": text,
                "score": query_score(self.wording.task, text, query.target or "", labels),
            }
            for (user, query), text in zip(asked, said, strict=True)
        ]

    def _bank(self, path: str) -> Bank:
        if path not in self.banks:
            self.banks[path] = load_bank(path, base_fingerprint=self.fingerprint)
        return self.banks[path]

    def _shelf(self, path: str, bank: Bank, rank: int | None) -> str:
        """The shelf with the bank's adapters, truncated where that is asked for."""
        name = f"{list(self.banks).index(path)} {rank}"
        if name in self.shelves:
            return name
        self.shelves.add(name)
        if rank is None or rank >= bank.rank:
            bank.load_into(self.routed.layers, name)
            return name
        for slot in range(len(bank)):
            adapter: Adapter = fuse([bank.adapter(slot)], [1.0], mode="svd", rank=rank)
            if slot == 0:
                self.routed.add_shelf(name, slots=len(bank), rank=rank, alpha=adapter.scale * rank)
            put(self.routed.layers, name, slot, adapter)
        return name

    def _means(self, known: str | None, items: int, bank: Bank) -> np.ndarray:
        """(users, dim): users' mean item vectors, of so many of their latest items, by the bank's encoder."""
        key = known, items, bank.encoder
        if key not in self.means:
            users = self.known[known] if known else self.users
            if bank.encoder not in self.encoders:
                self.encoders[bank.encoder] = Encoder(bank.encoder, device=self.config.workers.device)
            texts = [item_texts(user, items, self.config.max_words) for user in users]
            self.means[key] = self.encoders[bank.encoder].embed_users(texts)
        return self.means[key]
