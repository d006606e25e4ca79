"""What if the bank were smaller, k larger, the temperature lower, the rank less, the histories shorter?

Nothing is trained: the bank that is there is cut down and routed through in other ways, and the tested users' queries
are answered by each. So a smaller bank is the best covering part of this one, and a smaller rank the best truncation.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.table import Table

from mta_ray.artifacts import is_current, jsonable, located, open_artifact, publish
from mta_ray.cluster import ClusterConfig, connect
from mta_ray.console import table_console
from mta_ray.evaluation.charts import BLUE, GREEN, ORANGE, STYLE, plain_ticks
from mta_ray.evaluation.sections import Section, write_sections
from mta_ray.lora.bank import Bank, load_bank
from mta_ray.lora.fusion_config import FusionConfig
from mta_ray.lora.slots import Route
from mta_ray.personalize.base_model import open_base
from mta_ray.pipeline.actors import ActorConfig
from mta_ray.pipeline.embed_users import read_embeddings
from mta_ray.pipeline.split import SplitConfig, check_same_line, tested_of
from mta_ray.population.judge import BARE, JudgeConfig, Question, gain, judge, spread

log = logging.getLogger(__name__)
KIND = "what-if"
SWEEPS = {
    "anchors": "anchors in the bank",
    "k": "anchors in a user's route (k)",
    "temperature": "temperature of the softmax over cosines",
    "rank": "rank of each anchor's LoRA",
    "history": "latest history items that are known",
}
BF16 = 2
"""Bytes of a stored factor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WhatIfConfig:
    """Whose bank, and what is varied. An empty list leaves a sweep out."""

    users: str = "runs/quickstart/users"
    """The `users` artifact."""
    embeddings: str = "runs/quickstart/embeddings"
    """The `embeddings` artifact of the same users."""
    base: str = "runs/quickstart/base"
    """The `base` artifact."""
    bank: str = "runs/quickstart/bank"
    """The bank."""
    out: str = "runs/what-if"
    """Folder of report.html and report.json."""
    fusion: FusionConfig = field(default_factory=FusionConfig)
    """What stays where something else is varied."""
    anchors: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Sizes of the bank; those beyond the bank's are its whole."""
    k: tuple[int, ...] = (1, 2, 4, 8)
    """Anchors of a route."""
    temperature: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.5, 2.0)
    """Of the softmax."""
    rank: tuple[int, ...] = (1, 2, 4, 8)
    """Of each anchor's LoRA, after truncation."""
    history: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Latest items of a user that are known; elsewhere as many as in the embeddings."""
    split: SplitConfig = field(default_factory=lambda: SplitConfig(max_few_shot=48, max_rest=8))
    """Who is tested."""
    workers: ActorConfig = field(default_factory=ActorConfig)
    """The actors."""
    force: bool = False
    """Do it again although the report is there."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where to run."""

    def __post_init__(self) -> None:
        for name in SWEEPS:
            values = getattr(self, name)
            if any(value <= 0 for value in values):
                raise ValueError(f"{name} must be above 0, got {values}")
        if not any(getattr(self, name) for name in SWEEPS):
            raise ValueError(f"nothing is varied; give values to one of {', '.join(SWEEPS)}")


def simulate_what_if(config: WhatIfConfig) -> str:
    """Publish the report, and print its table."""
    config = located(config, "users", "embeddings", "base", "bank", "out")
    users = open_artifact(config.users, kind="users", verify=False)
    embeddings = read_embeddings(config.embeddings, users=users.hash)
    base = open_base(config.base)
    bank = load_bank(config.bank, base_fingerprint=base.fingerprint)
    inputs = {
        "users": users.hash,
        "embeddings": embeddings.hash,
        "base": base.hash,
        "bank": open_artifact(config.bank, kind="bank", verify=False).hash,
    }
    left_out = ("users", "embeddings", "base", "bank", "out", "force", "cluster")
    settings = {k: v for k, v in jsonable(config).items() if k not in left_out}
    if not config.force and is_current(config.out, kind=KIND, settings=settings, inputs=inputs):
        log.info("what-if: %s is current, nothing to do", config.out)
        return config.out

    for path, kind in ((config.base, "base"), (config.bank, "bank")):
        check_same_line(config.split, open_artifact(path, kind=kind, verify=False).settings.get("split"), kind)
    people = tested_of(config.users, embeddings, config.split)
    encoded = open_artifact(config.embeddings, kind="embeddings", verify=False).settings
    asked = questions(config, bank)
    with connect(config.cluster), publish(config.out, kind=KIND, settings=settings, inputs=inputs) as draft:
        how = JudgeConfig(
            base=config.base, bank=config.bank, max_items=encoded["max_items"], max_words=encoded["max_words"],
            workers=config.workers, cluster=config.cluster,
        )  # fmt: skip
        bare = Question(name=BARE, fusion=None)
        scores = judge(how, [bare, *asked.values()], people)
        rows = []
        for (sweep, value), question in asked.items():
            found = gain(scores, question.name, BARE)
            own = scores.loc[scores["method"] == question.name, "score"]
            rows.append({
                "sweep": sweep, "value": value, "score": float(own.mean()),
                "gain": found.mean, "gain_low": found.low, "gain_high": found.high,
                "route_bytes": _route_bytes(question, bank),
            })  # fmt: skip
        report = {
            "simulation": KIND,
            "task": base.wording.task.name,
            "metric": base.wording.task.primary_metric,
            "users": len(people),
            "queries": int((scores["method"] == BARE).sum()),
            "bank_anchors": len(bank),
            "bank_rank": bank.rank,
            "score_without": float(scores.loc[scores["method"] == BARE, "score"].mean()),
            "rows": rows,
            "bytes_per_user": _bytes_per_user(bank, config.fusion.k),
            "settings": settings,
        }
        write_sections(draft.path, "What if", sections(report), report)
    _print(report)
    return config.out


def questions(config: WhatIfConfig, bank: Bank) -> dict[tuple[str, float | int], Question]:
    """Each point of each sweep; points that are the same in effect are asked once for each sweep, under one name."""
    found: dict[tuple[str, float | int], Question] = {}
    for size in sorted({min(size, len(bank)) for size in config.anchors}):
        fusion = replace(config.fusion, k=min(config.fusion.k, size))
        chosen = spread(bank.embeddings, size) if size < len(bank) else None
        found["anchors", size] = Question(name=f"anchors {size}", fusion=fusion, anchors=chosen)
    for k in sorted({min(k, len(bank)) for k in config.k}):
        found["k", k] = Question(name=f"k {k}", fusion=replace(config.fusion, k=k))
    for temperature in sorted(set(config.temperature)):
        fusion = replace(config.fusion, temperature=temperature)
        found["temperature", temperature] = Question(name=f"temperature {temperature}", fusion=fusion)
    for rank in sorted({min(rank, bank.rank) for rank in config.rank}):
        found["rank", rank] = Question(name=f"rank {rank}", fusion=config.fusion, rank=rank)
    for items in sorted(set(config.history)):
        found["history", items] = Question(name=f"history {items}", fusion=config.fusion, items=items)
    return found


def sections(report: Mapping[str, Any]) -> list[Section]:
    """The report as a page shows it."""
    found = []
    for sweep, label in SWEEPS.items():
        rows = [row for row in report["rows"] if row["sweep"] == sweep]
        if not rows:
            continue
        best = max(rows, key=lambda row: row["score"])
        values = " and ".join(f"{row['value']:g}" for row in rows if row["score"] == best["score"])
        lead = (
            f"{report['metric']} is {'best ' if len(rows) > 1 else ''}at {values} ({best['score']:.3f}; without "
            f"personalising {report['score_without']:.3f})."
        )
        table = [("value", report["metric"], "gain", "95% interval", "bytes of a route")]
        table += [
            (
                f"{row['value']:g}",
                f"{row['score']:.3f}",
                f"{row['gain']:+.3f}",
                f"{row['gain_low']:+.3f} to {row['gain_high']:+.3f}",
                f"{row['route_bytes']:g}",
            )
            for row in rows
        ]
        picture = _sweep_chart(rows, label, report["metric"], is_log=sweep != "rank")
        found.append(
            Section(
                title=label[0].upper() + label[1:], lead=lead, figures=[(f"quality by {label}", picture)], rows=table
            )
        )
    costs = report["bytes_per_user"]
    kept = [("stack", "bytes of a user", "users in a GiB")]
    kept += [(name, f"{size:,}", f"{2**30 // size:,}") for name, size in costs.items()]
    found.append(
        Section(
            title="Bytes per user",
            lead="A route is a few numbers; a stack of the user's own is what costs. (Numbers alone: names and shapes "
            "of a stack's tensors are some 2 KB more.)",
            figures=[("bytes per user by stack", _bytes_chart(costs))],
            rows=kept,
            notes=(
                f"Fused answers alone, {report['users']} users with {report['queries']} queries, task "
                f"{report['task']}; intervals by bootstrap over users. A smaller bank is the best covering part of "
                "this one, a smaller rank the best truncation of it: built that small, both might do better.",
            ),
        )
    )
    return found


@rc_context(STYLE)
def _sweep_chart(rows: Sequence[Mapping[str, Any]], label: str, metric: str, *, is_log: bool) -> Figure:
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    axes = figure.subplots()
    values = [row["value"] for row in rows]
    axes.axhline(0, color="black", linestyle="--", linewidth=1, label="base model alone")
    axes.fill_between(values, [r["gain_low"] for r in rows], [r["gain_high"] for r in rows], color=BLUE, alpha=0.2)
    axes.plot(values, [row["gain"] for row in rows], "o-", color=BLUE, label="fused")
    if is_log:
        axes.set_xscale("log", base=2)
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.minorticks_off()
    axes.set_xlabel(label)
    axes.set_ylabel(f"gain in {metric}")
    axes.legend(loc="best")
    return figure


@rc_context(STYLE)
def _bytes_chart(costs: Mapping[str, int]) -> Figure:
    figure = Figure(figsize=(7, 0.8 + 0.3 * len(costs)), layout="constrained")
    axes = figure.subplots()
    colours = [GREEN if name.startswith("route") else ORANGE for name in costs]
    axes.barh(list(costs), list(costs.values()), color=colours, height=0.6)
    axes.invert_yaxis()
    axes.set_xscale("log")
    plain_ticks(axes.xaxis)
    axes.set_xlabel("bytes of a user")
    axes.grid(axis="y", visible=False)
    return figure


def _route_bytes(question: Question, bank: Bank) -> int:
    assert question.fusion is not None
    k = min(question.fusion.k, len(question.anchors) if question.anchors is not None else len(bank))
    return Route(slots=tuple(range(k)), weights=(1 / k,) * k).bytes


def _bytes_per_user(bank: Bank, k: int) -> dict[str, int]:
    """What is kept of a user, without a stack and with one of each kind: tensors alone, without their file's head."""
    k = min(k, len(bank))
    route = Route(slots=tuple(range(k)), weights=(1 / k,) * k).bytes
    wide = sum(down.shape[2] + bank.up[m].shape[1] for m, down in bank.down.items())
    costs = {"route alone": route, "coefficients of the route": route + BF16 * len(bank.down) * k * bank.rank}
    return costs | {f"stack of rank {rank}": route + BF16 * rank * wide for rank in (1, 2, 4, 8)}


def _print(report: Mapping[str, Any]) -> None:
    table = Table(title=f"what if: {report['metric']} of {report['users']} users, fused", title_justify="left")
    for heading in ("varied", "value", report["metric"], "gain [95%]"):
        table.add_column(heading)
    for row in report["rows"]:
        interval = f"{row['gain']:+.3f} [{row['gain_low']:+.3f}, {row['gain_high']:+.3f}]"
        table.add_row(row["sweep"], f"{row['value']:g}", f"{row['score']:.3f}", interval)
    table_console().print(table)
