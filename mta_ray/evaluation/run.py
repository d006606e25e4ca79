"""All methods on all tested users, as one table of predictions and one report."""

from __future__ import annotations

import json
import logging
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib import metadata
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from mta_ray.artifacts import is_current, jsonable, located, open_artifact, publish
from mta_ray.cluster import ClusterConfig, connect
from mta_ray.console import progress
from mta_ray.evaluation.methods import OPPU, Methods, Pack
from mta_ray.evaluation.report import table, write_report
from mta_ray.evaluation.summary import Curve, MapPoint, ReportFacts, summarise
from mta_ray.lamp.leaks import Leaks, find_leaks, persons
from mta_ray.lamp.metrics import query_score, score
from mta_ray.lamp.users import FEW_SHOT_ITEMS, User
from mta_ray.lora.bank import Bank, load_bank
from mta_ray.personalize.base_model import BaseModel, Wording, open_base
from mta_ray.personalize.merge_then_adapt import encode
from mta_ray.personalize.train_config import TrainConfig
from mta_ray.pipeline.actors import ActorConfig, crew
from mta_ray.pipeline.adapt_users import packs_of, read_states
from mta_ray.pipeline.embed_users import Embeddings, read_embeddings
from mta_ray.pipeline.group import start_worker
from mta_ray.pipeline.memory import PeakMemory, watch_memory
from mta_ray.pipeline.split import SplitConfig, check_same_line, teachers_of, tested_of

log = logging.getLogger(__name__)
PROGRESS = "evaluate"
VERSIONS = ("ray", "torch", "transformers", "peft", "deepspeed", "sentence-transformers", "pandas")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig:
    """Which artifacts to judge."""

    users: str = "users"
    """The `users` artifact."""
    embeddings: str = "embeddings"
    """The `embeddings` artifact of the same users."""
    base: str = "base"
    """The `base` artifact."""
    bank: str = "bank"
    """The bank."""
    states: str = "user-states"
    """The `user-states` artifact of the tested users."""
    out: str = "reports/report"
    """Folder of report.json, report.html and predictions.parquet."""
    title: str = "Merge, then adapt"
    """Heading of the report."""
    oppu: TrainConfig = OPPU
    """Of the baseline that trains one LoRA a user."""
    split: SplitConfig = field(default_factory=SplitConfig)
    """Who is tested."""
    workers: ActorConfig = field(default_factory=ActorConfig)
    """The actors."""
    force: bool = False
    """Evaluate again although the report is there."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where to run."""


def evaluate(
    config: EvaluateConfig, *, seconds: Mapping[str, float] | None = None, memory: PeakMemory | None = None
) -> str:
    """Publish the report, and print its table.

    `seconds` of earlier stages go into the report beside its own, and what `memory` has seen of them, or its own peak.
    """
    config = located(config, "users", "embeddings", "base", "bank", "states", "out")
    users = open_artifact(config.users, kind="users", verify=False)
    embeddings = read_embeddings(config.embeddings, users=users.hash)
    base = open_base(config.base)
    bank = load_bank(config.bank, base_fingerprint=base.fingerprint)
    hashes = {
        "users": users.hash,
        "embeddings": embeddings.hash,
        "base": base.hash,
        "bank": open_artifact(config.bank, kind="bank", verify=False).hash,
        "states": open_artifact(config.states, kind="user-states", verify=False).hash,
    }
    made_with = open_artifact(config.states, kind="user-states", verify=False).inputs
    other = [name for name in ("users", "embeddings", "base", "bank") if made_with.get(name) != hashes[name]]
    if other:
        raise ValueError(
            f"{config.states} was made with another {' and '.join(other)} than the one given; run adapt-users again"
        )
    for kind, path in (("base", config.base), ("bank", config.bank)):
        check_same_line(config.split, open_artifact(path, kind=kind, verify=False).settings.get("split"), kind)
    settings = {k: v for k, v in jsonable(config).items() if k in ("title", "oppu", "split", "workers")}
    if not config.force and is_current(config.out, kind="report", settings=settings, inputs=hashes):
        log.info("report: %s is current, nothing to do", config.out)
        report = open_artifact(config.out, kind="report", verify=False)
        Console().print(table(json.loads((report.path / "report.json").read_text(encoding="utf-8"))))
        return config.out

    started_s = time.perf_counter()
    with (
        connect(config.cluster),
        publish(config.out, kind="report", settings=settings, inputs=hashes) as draft,
        nullcontext(memory) if memory else watch_memory() as memory,
    ):
        # 1. predictions
        tested, leaks = _tested(config, embeddings)
        rows, costs = _predict(config, tested, embeddings, bank)
        predictions = _scored(rows, base.wording, persons(tested))

        # 2. report
        facts = ReportFacts(
            title=config.title,
            task=base.wording.task.name,
            primary=base.wording.task.primary_metric,
            higher_is_better=base.wording.task.higher_is_better,
            anchors=len(bank),
            bytes_per_user={method: cost.bytes / cost.users for method, cost in costs.items()},
            seconds_per_user={method: cost.seconds / cost.users for method, cost in costs.items()},
            seconds=dict(seconds or {}) | {"report": round(time.perf_counter() - started_s, 1)},
            peak_memory_mib=round(memory.peak_mib),
            versions={name: metadata.version(name) for name in VERSIONS},
            settings={"prompts": asdict(base.wording.prompts), "base": base.source} | settings,
            leaks=leaks,
            curves=_curves(base, bank),
            map_points=_map(embeddings, bank, predictions),
        )

        def metrics(said: list[str], golds: list[str]) -> dict[str, float]:
            return score(base.wording.task, said, golds, base.wording.labels or None)

        summary = summarise(predictions, facts, metrics)
        write_report(draft.path, summary, facts, predictions)
        draft.facts.update(users=summary["users"], queries=summary["queries"])
    Console().print(table(summary))
    log.info("report: with pictures in %s/report.html", config.out)
    return config.out


def _tested(config: EvaluateConfig, embeddings: Embeddings) -> tuple[list[User], Leaks]:
    """The tested users, and what of their questions is known elsewhere."""
    who = (config.users, embeddings, config.split)
    tested = tested_of(*who)
    leaks = find_leaks(tested, teachers_of(*who), max_words=open_base(config.base).wording.prompts.max_words)
    if not leaks.is_clean:
        log.warning("report: %s", leaks.told())
    return tested, leaks


def _predict(
    config: EvaluateConfig, tested: list[User], embeddings: Embeddings, bank: Bank
) -> tuple[list[dict[str, Any]], dict[str, _Cost]]:
    """(rows of predictions, method -> what it took for all users)."""
    row_of = {user_id: row for row, user_id in enumerate(embeddings.user_ids)}
    vectors = encode(embeddings.means[[row_of[user.id] for user in tested]], bank.center)
    vector_of = {user.id: vector for user, vector in zip(tested, vectors, strict=True)}
    packs = packs_of(tested, list(vector_of), config.workers)
    rows: list[dict[str, Any]] = []
    costs: dict[str, _Cost] = defaultdict(_Cost)
    with (
        progress(PROGRESS, len(tested), "users") as meter,
        crew(_Evaluator, config, workers=config.workers, cluster=config.cluster) as actors,
    ):
        work = [(pack, np.stack([vector_of[user.id] for user in pack])) for pack in packs]
        for found, spent in actors.map(lambda actor, job: actor.run.remote(*job), work):
            rows += found
            users = len({row["user_id"] for row in found})
            for method, (bytes_per_user, seconds_per_user) in spent.items():
                costs[method].add(users, float(bytes_per_user), float(seconds_per_user))
            meter.advance(users)
    return rows, costs


@dataclass(slots=True)
class _Cost:
    """Of one method, over all packs."""

    users: int = 0
    bytes: float = 0.0
    seconds: float = 0.0

    def add(self, users: int, bytes_per_user: float, seconds_per_user: float) -> None:
        self.users += users
        self.bytes += users * bytes_per_user
        self.seconds += users * seconds_per_user


class _Evaluator:
    """An actor: base and bank are loaded once, then all methods on one pack a call."""

    def __init__(self, config: EvaluateConfig) -> None:
        start_worker(config.workers.cpus)
        self.config = config

    @cached_property
    def methods(self) -> Methods:
        """With the first call: what goes wrong is then told as it was raised."""
        base = open_base(self.config.base)
        routed, bank = base.load_routed(self.config.bank, device=self.config.workers.device)
        return Methods(routed, bank, base.wording, self.config.oppu)

    def run(self, users: list, vectors: np.ndarray) -> tuple[list[dict[str, Any]], dict[str, tuple[float, float]]]:
        states = read_states(self.config.states, [user.id for user in users])
        missing = sum(user.id not in states for user in users)
        if missing:
            raise ValueError(
                f"{missing} of {len(users)} tested users have no state in {self.config.states}; "
                "run adapt-users with the same users and split"
            )
        rows, costs = [], {}
        for answers in self.methods.run(Pack(users, vectors, states)):
            costs[answers.method] = (answers.bytes_per_user, answers.seconds_per_user)
            queries = [(user, query) for user in users for query in user.queries]
            for (user, query), prediction in zip(queries, answers.predictions, strict=True):
                rows.append(
                    {
                        "method": answers.method,
                        "user_id": user.id,
                        "query_id": query.id,
                        "few_shot": len(user.history) <= FEW_SHOT_ITEMS,
                        "history_items": len(user.history),
                        "gold": query.target or "",
                        "prediction": prediction,
                    }
                )
        return rows, costs


def _scored(rows: list[dict[str, Any]], wording: Wording, person_of: Mapping[str, str]) -> pd.DataFrame:
    frame = pd.DataFrame(rows).sort_values(["method", "user_id", "query_id"], ignore_index=True)
    labels = wording.labels or None
    frame["person"] = [person_of[user_id] for user_id in frame["user_id"]]
    frame["score"] = [
        query_score(wording.task, said, gold, labels)
        for said, gold in zip(frame["prediction"], frame["gold"], strict=True)
    ]
    return frame


def _curves(base: BaseModel, bank: Bank) -> list[Curve]:
    curves = []
    if base.losses:
        curves.append(Curve("base model/loss", range(1, len(base.losses) + 1), base.losses))
    for anchor, losses in enumerate(bank.facts.get("losses", [])):
        curves.append(Curve(f"meta-LoRAs/anchor {anchor}", range(1, len(losses) + 1), losses))
    return curves


def _map(embeddings: Embeddings, bank: Bank, predictions: pd.DataFrame) -> list[MapPoint]:
    """Tested users and anchors on the two main axes of the users' vectors."""
    tested = set(predictions["user_id"])
    rows = [row for row, user_id in enumerate(embeddings.user_ids) if user_id in tested]
    vectors = encode(embeddings.means[rows], bank.center)
    everybody = np.concatenate([vectors, bank.embeddings])
    _, _, axes = np.linalg.svd(everybody - everybody.mean(axis=0), full_matrices=False)
    places = everybody @ axes[:2].T
    nearest = (vectors @ bank.embeddings.T).argmax(axis=1)
    points = []
    for row, place, anchor in zip(rows, places, nearest, strict=False):
        kind = "few_shot" if embeddings.items[row] <= FEW_SHOT_ITEMS else "user"
        points.append(MapPoint(kind, float(place[0]), float(place[1]), int(anchor)))
    for anchor, place in enumerate(places[len(rows) :]):
        points.append(MapPoint("anchor", float(place[0]), float(place[1]), anchor))
    return points
