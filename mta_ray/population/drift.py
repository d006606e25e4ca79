"""Tastes change: how long are routes and a bank good for, what does fresh history regain, when must it be rebuilt?

The same users some weeks later, with the tastes of then (people.WorldConfig: moves and fashion), ask new questions.
They are answered by the route of the first week's history, by one of fresh history through the old bank, and, where
that is asked for, through a bank that was built anew of the teachers' fresh histories. The base model stays.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.table import Table

from mta_ray.artifacts import Artifact, is_current, jsonable, located, open_artifact, publish
from mta_ray.cluster import ClusterConfig, connect
from mta_ray.console import table_console
from mta_ray.evaluation.charts import BLUE, GREEN, GREY, ORANGE, STYLE
from mta_ray.evaluation.sections import Section, write_sections
from mta_ray.lamp.users import User
from mta_ray.lora.fusion_config import FusionConfig
from mta_ray.personalize.base_model import open_base
from mta_ray.pipeline.actors import ActorConfig
from mta_ray.pipeline.build_bank import PLACING, BuildBankConfig, build_bank
from mta_ray.pipeline.embed_users import EmbedUsersConfig, embed_users, read_embeddings
from mta_ray.pipeline.split import SplitConfig, check_same_line, tested_of
from mta_ray.population.judge import BARE, JudgeConfig, Question, gain, judge
from mta_ray.population.people import WorldConfig
from mta_ray.population.synthesize import SimulateUsersConfig, simulate_users
from mta_ray.settings import settings_of

log = logging.getLogger(__name__)
KIND = "drift"
STALE, FRESH, REBUILT = "old route, old bank", "fresh route, old bank", "fresh route, bank rebuilt"
LINES = {STALE: ORANGE, FRESH: BLUE, REBUILT: GREEN, BARE: GREY}


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftConfig:
    """Whose tastes change, how fast, and when one looks."""

    users: str = "runs/quickstart/users"
    """A simulated `users` artifact: the first week."""
    base: str = "runs/quickstart/base"
    """The `base` artifact that learnt from them."""
    bank: str = "runs/quickstart/bank"
    """Their bank."""
    out: str = "runs/drift"
    """Folder of report.html and report.json; the later weeks' users and banks lie beside it, in OUT.weeks."""
    weeks: tuple[int, ...] = (0, 4, 8, 16, 32)
    """When one looks."""
    rebuild: tuple[int, ...] = (8, 32)
    """Those of them in which a bank is built anew."""
    moves: float = 0.02
    """Chance in each week that a user turns to another archetype."""
    fashion: float = 0.02
    """Share of each archetype's likes that changes in a week."""
    fusion: FusionConfig = field(default_factory=FusionConfig)
    """How anchors are weighed."""
    split: SplitConfig = field(default_factory=lambda: SplitConfig(max_few_shot=48, max_rest=8))
    """Who is tested."""
    embed: EmbedUsersConfig = field(default_factory=EmbedUsersConfig)
    """How histories are encoded. Paths and the cluster are set by the run as a whole."""
    build: BuildBankConfig = field(default_factory=BuildBankConfig)
    """How a bank is built anew. If it says no more than where and how fast: as the first one was, so that the
    difference is the drift's."""
    workers: ActorConfig = field(default_factory=ActorConfig)
    """The actors."""
    force: bool = False
    """Do it again although the report is there."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where to run."""

    def __post_init__(self) -> None:
        if not self.weeks or min(self.weeks) < 0 or sorted(set(self.weeks)) != list(self.weeks):
            raise ValueError(f"weeks must be different, ascending and at least 0, got {self.weeks}")
        if strange := set(self.rebuild) - set(self.weeks):
            raise ValueError(f"rebuild has weeks {sorted(strange)}, which weeks has not; add them there")


def simulate_drift(config: DriftConfig) -> str:
    """Publish the report, and print its table. What was made of a week already is not made again."""
    config = located(config, "users", "base", "bank", "out")
    artifact = open_artifact(config.users, kind="users", verify=False)
    if not artifact.facts.get("is_simulated"):
        raise ValueError(f"{config.users} holds no simulated users: the tastes of real ones are not known to change")
    base, bank = open_base(config.base), open_artifact(config.bank, kind="bank", verify=False)
    for kind, taught in (("base", open_artifact(config.base, kind="base", verify=False)), ("bank", bank)):
        check_same_line(config.split, taught.settings.get("split"), kind)
    if config.rebuild:
        config = replace(config, build=_as_the_first(config.build, bank))
    inputs = {"users": artifact.hash, "base": base.hash, "bank": bank.hash}
    left_out = ("users", "base", "bank", "out", "force", "cluster")
    settings = {k: v for k, v in jsonable(config).items() if k not in left_out}
    if not config.force and is_current(config.out, kind=KIND, settings=settings, inputs=inputs):
        log.info("drift: %s is current, nothing to do", config.out)
        return config.out

    world = WorldConfig(**artifact.settings["world"])
    made = SimulateUsersConfig(
        world=world, users=artifact.settings["users"], first=artifact.settings["first"], cluster=config.cluster
    )
    rows: list[dict[str, Any]] = []
    with connect(config.cluster), publish(config.out, kind=KIND, settings=settings, inputs=inputs) as draft:
        before = _tested(config, config.users, f"{config.out}.weeks/0")
        for week in config.weeks:
            rows += _look(config, made, week, before)
        report = {
            "simulation": KIND,
            "task": base.wording.task.name,
            "metric": base.wording.task.primary_metric,
            "users": len(before),
            "queries": sum(len(user.queries) for user in before),
            "rows": rows,
            "settings": settings,
        }
        write_sections(draft.path, "Drift", sections(report), report)
    _print(report)
    return config.out


def _as_the_first(build: BuildBankConfig, bank: Artifact) -> BuildBankConfig:
    """How the first bank was built, placed as `build` says; or `build`, where it says more than where and how fast."""
    placed = {name: getattr(build, name) for name in PLACING}
    if build != replace(BuildBankConfig(), **placed):
        return build
    return replace(settings_of(BuildBankConfig, bank.settings, source=str(bank.path)), **placed)


def _look(config: DriftConfig, made: SimulateUsersConfig, week: int, before: list[User]) -> list[dict[str, Any]]:
    """One week: a row for each way of answering."""
    # 1. the users of then
    home = f"{config.out}.weeks/{week}"
    world = replace(made.world, week=made.world.week + week, moves=config.moves, fashion=config.fashion)
    path = config.users if week == 0 else simulate_users(replace(made, world=world, out=f"{home}/users"))
    then = before if week == 0 else _tested(config, path, home)

    # 2. ways of answering
    asked = [
        Question(name=BARE, fusion=None),
        Question(name=STALE, fusion=config.fusion, known="first week"),
        Question(name=FRESH, fusion=config.fusion),
    ]
    if week in config.rebuild:
        bank = f"{home}/bank"
        build_bank(
            replace(
                config.build,
                users=path,
                embeddings=f"{home}/embeddings",
                base=config.base,
                out=bank,
                split=config.split,
                cluster=config.cluster,
            )  # fmt: skip
        )
        asked.append(Question(name=REBUILT, fusion=config.fusion, bank=bank))

    # 3. answers
    how = JudgeConfig(
        base=config.base, bank=config.bank, max_items=config.embed.max_items, max_words=config.embed.max_words,
        workers=config.workers, cluster=config.cluster,
    )  # fmt: skip
    scores = judge(how, asked, then, {"first week": before})
    means = scores.groupby("method")["score"].mean()
    rows = []
    for question in asked:
        row: dict[str, Any] = {"week": week, "line": question.name, "score": float(means[question.name])}
        over = {FRESH: STALE, REBUILT: FRESH, STALE: BARE}.get(question.name)
        if over:
            found = gain(scores, question.name, over)
            row |= {"over": over, "gain": found.mean, "gain_low": found.low, "gain_high": found.high}
        rows.append(row)
    return rows


def _tested(config: DriftConfig, users: str, home: str) -> list[User]:
    """The tested users of a week, by id: the same in every week. Embeds everybody, as a bank needs it."""
    vectors = embed_users(replace(config.embed, users=users, out=f"{home}/embeddings", cluster=config.cluster))
    return tested_of(users, read_embeddings(vectors), config.split)


def findings(report: Mapping[str, Any]) -> list[str]:
    """When fresh history is worth the routing, and when a new bank is: from which week on all intervals exclude 0."""
    said = []
    for line, action in ((FRESH, "routing users anew by fresh history"), (REBUILT, "building the bank anew")):
        rows = [row for row in report["rows"] if row["line"] == line]
        tried = ", ".join(str(row["week"]) for row in rows)
        some = ", ".join(str(row["week"]) for row in rows if row["gain_low"] > 0)
        last = max((place for place, row in enumerate(rows) if row["gain_low"] <= 0), default=-1)
        lasting = rows[last + 1 :]
        if lasting:
            first = lasting[0]
            said.append(
                f"From week {first['week']} on {action} pays: {first['gain']:+.3f} "
                f"[{first['gain_low']:+.3f}, {first['gain_high']:+.3f}]."
            )
        elif some:
            said.append(f"In week {some} of those that were looked at ({tried}) {action} paid, and later not.")
        elif rows:
            said.append(f"In no week that was looked at ({tried}) {action} can be told from not doing so.")
    return said


def sections(report: Mapping[str, Any]) -> list[Section]:
    """The report as a page shows it."""
    table = [("week", "answered by", report["metric"], "gain over", "gain [95% interval]")]
    for row in report["rows"]:
        interval = f"{row['gain']:+.3f} [{row['gain_low']:+.3f}, {row['gain_high']:+.3f}]" if "gain" in row else ""
        table.append((str(row["week"]), row["line"], f"{row['score']:.3f}", row.get("over", ""), interval))
    drift = report["settings"]
    note = (
        f"{report['users']} users, {report['queries']} queries in each week, task {report['task']}; each week one user "
        f"in {1 / max(drift['moves'], 1e-9):.0f} turns to another archetype and {drift['fashion']:.0%} of what each "
        "archetype likes changes. The base model stays as it was. Intervals by bootstrap over users."
    )
    return [
        Section(
            title="Tastes that change",
            lead=" ".join(findings(report)),
            figures=[("quality by week, for each way of answering", _chart(report))],
            rows=table,
            notes=(note,),
        )
    ]


@rc_context(STYLE)
def _chart(report: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    for line, colour in LINES.items():
        rows = [row for row in report["rows"] if row["line"] == line]
        dashes = "--" if line == BARE else "-"
        axes.plot([r["week"] for r in rows], [r["score"] for r in rows], f"o{dashes}", color=colour, label=line)
    axes.set_xlabel("week")
    axes.set_ylabel(report["metric"])
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _print(report: Mapping[str, Any]) -> None:
    table = Table(title=f"drift: {report['metric']} of {report['users']} users", title_justify="left")
    for heading in ("week", *LINES):
        table.add_column(heading)
    for week in dict.fromkeys(row["week"] for row in report["rows"]):
        found = {row["line"]: f"{row['score']:.3f}" for row in report["rows"] if row["week"] == week}
        table.add_row(str(week), *(found.get(line, "–") for line in LINES))
    console = table_console()
    console.print(table)
    for said in findings(report):
        console.print(said)
