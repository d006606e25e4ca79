"""All stages in their order, on a simulated population (`quickstart`) or on one's own LaMP files (`run`)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from mta_ray.artifacts import located
from mta_ray.cluster import ClusterConfig, connect
from mta_ray.console import announce
from mta_ray.evaluation.run import EvaluateConfig, evaluate
from mta_ray.pipeline.adapt_users import AdaptUsersConfig, adapt_users
from mta_ray.pipeline.build_bank import BuildBankConfig, build_bank
from mta_ray.pipeline.embed_users import EmbedUsersConfig, embed_users
from mta_ray.pipeline.memory import watch_memory
from mta_ray.pipeline.prepare_users import PrepareUsersConfig, look_at, prepare_users
from mta_ray.pipeline.split import SplitConfig
from mta_ray.pipeline.train_base import TrainBaseConfig, train_base
from mta_ray.population.synthesize import SimulateUsersConfig, simulate_users
from mta_ray.settings import save_settings

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StagesConfig:
    """The settings of every stage after the users are there. Paths and the cluster are set by the run as a whole."""

    split: SplitConfig = field(default_factory=SplitConfig)
    """Who teaches and who is tested; the same in all stages."""
    embed: EmbedUsersConfig = field(default_factory=EmbedUsersConfig)
    base: TrainBaseConfig = field(default_factory=TrainBaseConfig)
    bank: BuildBankConfig = field(default_factory=BuildBankConfig)
    adapt: AdaptUsersConfig = field(default_factory=AdaptUsersConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


def _in_minutes() -> StagesConfig:
    """Fewer tested users than by default, so that two CPU cores show the method in minutes."""
    return StagesConfig(split=SplitConfig(max_few_shot=48, max_rest=8))


@dataclass(frozen=True, slots=True, kw_only=True)
class QuickstartConfig:
    """The whole method on people whose taste is known."""

    out: str = "runs/quickstart"
    """Folder of all artifacts; the report lies in OUT/report."""
    users: SimulateUsersConfig = field(default_factory=SimulateUsersConfig)
    """The population."""
    stages: StagesConfig = field(default_factory=_in_minutes)
    """All other stages."""
    force: bool = False
    """Run every stage again."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where to run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """The whole method on LaMP files."""

    out: str = "runs/mine"
    """Folder of all artifacts; the report lies in OUT/report."""
    users: PrepareUsersConfig = field(default_factory=PrepareUsersConfig)
    """The files and their task."""
    stages: StagesConfig = field(default_factory=StagesConfig)
    """All other stages."""
    force: bool = False
    """Run every stage again."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where to run."""


def quickstart(config: QuickstartConfig) -> str:
    """The report's folder."""
    return _all_stages(config, simulate_users, f"simulated users, {config.users.world.task}")


def run(config: RunConfig) -> str:
    """The report's folder."""
    look_at(config.users)  # before a cluster is started
    return _all_stages(config, prepare_users, f"{config.users.task}: {len(config.users.files)} files")


def _all_stages(config: Any, make_users: Callable[[Any], str], title: str) -> str:
    home = located(config, "out").out.rstrip("/")
    stages: StagesConfig = config.stages
    paths = {name: f"{home}/{name}" for name in ("users", "embeddings", "base", "bank", "user-states", "report")}
    shared: dict[str, Any] = {"force": config.force, "cluster": config.cluster}
    reads: dict[str, Any] = {"users": paths["users"], "embeddings": paths["embeddings"]}
    taught = reads | {"base": paths["base"]}
    plan: list[tuple[str, Callable[[Any], str], Any]] = [
        ("users", make_users, replace(config.users, out=paths["users"], **shared)),
        ("embeddings", embed_users, replace(stages.embed, users=paths["users"], out=paths["embeddings"], **shared)),
        ("base", train_base, replace(stages.base, out=paths["base"], split=stages.split, **reads, **shared)),
        ("bank", build_bank, replace(stages.bank, out=paths["bank"], split=stages.split, **taught, **shared)),
        (
            "user-states",
            adapt_users,
            replace(stages.adapt, out=paths["user-states"], bank=paths["bank"], split=stages.split, **taught, **shared),
        ),
    ]
    seconds: dict[str, float] = {}
    with connect(config.cluster), watch_memory() as memory:
        for name, stage, settings in plan:
            started_s = time.perf_counter()
            stage(settings)
            save_settings(paths[name], settings)
            seconds[name] = round(time.perf_counter() - started_s, 1)
            announce(f"{name}: {seconds[name]} s")
        judge = replace(
            stages.evaluate,
            out=paths["report"],
            bank=paths["bank"],
            states=paths["user-states"],
            split=stages.split,
            title=title,
            **taught,
            **shared,
        )
        report = evaluate(judge, seconds=seconds, memory=memory)
        save_settings(report, judge)
    return report
