"""What the methods are made of, one data set at a time: users, embeddings, bases, banks, the LoRA for everybody.

Each is an artifact of a pipeline's stage with the benchmark's settings, made when it is first asked for, and kept.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path

import ray

from mta_ray.artifacts import open_artifact
from mta_ray.cluster import ClusterConfig
from mta_ray.comparison.datasets import SIMULATED, DataSet, join_teachers, write_tested
from mta_ray.comparison.pooled import KIND as POOLED
from mta_ray.comparison.pooled import PooledJob, train_pooled
from mta_ray.comparison.recipes import BankRecipe, Recipe
from mta_ray.files import replace_file
from mta_ray.lamp.leaks import Leaks, check_leaks
from mta_ray.personalize.base_model import open_base
from mta_ray.pipeline.actors import ActorConfig
from mta_ray.pipeline.build_bank import BuildBankConfig, build_bank
from mta_ray.pipeline.embed_users import EmbedUsersConfig, embed_users, read_embeddings
from mta_ray.pipeline.group import cpus_per_worker
from mta_ray.pipeline.prepare_users import PrepareUsersConfig, prepare_users
from mta_ray.pipeline.split import SplitConfig, teachers_of, tested_of
from mta_ray.pipeline.train_base import TrainBaseConfig, train_base
from mta_ray.population.people import WorldConfig
from mta_ray.population.synthesize import SimulateUsersConfig, simulate_users

SECONDS = "seconds.json"
"""Device-seconds that making each material took, by its name: an artifact that rests does not know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MaterialsConfig:
    """How materials are made. The stages' own paths, splits and clusters, and the bank's seed, are set from here."""

    world: WorldConfig = field(default_factory=WorldConfig)
    """What simulated people are like; the task is the data set's."""
    users: int = 400
    """People of a simulated population."""
    split: SplitConfig = field(default_factory=lambda: SplitConfig(max_few_shot=80, max_rest=20))
    """Who is tested."""
    embed: EmbedUsersConfig = field(default_factory=EmbedUsersConfig)
    """The encoder."""
    base: TrainBaseConfig = field(default_factory=TrainBaseConfig)
    """What the base model is, and how it learns the task."""
    bank: BuildBankConfig = field(default_factory=lambda: BuildBankConfig(adapters_per_pack=14))
    """The bank. A pack's adapters are a fixed number: how many fit is another number in another run, and so would the
    rounding be."""


class Materials:
    """One data set's artifacts, in a folder of its own. Methods give the path of what they have made or found there.

    They are called on the connected cluster.
    """

    def __init__(
        self,
        config: MaterialsConfig,
        dataset: DataSet,
        home: str,
        *,
        budgets: tuple[str, ...],
        workers: ActorConfig,
        cluster: ClusterConfig,
    ) -> None:
        self.config, self.dataset, self.home = config, dataset, home
        self.budgets, self.workers, self.cluster = budgets, workers, cluster
        self._made: dict[str, str] = {}

    def users(self) -> str:
        """Everybody: own users, and those who only teach."""
        files, teachers = self.dataset.files, self.dataset.teachers
        if not teachers:
            return self._once("users", partial(self._read, files))
        own = self._once("own-users", partial(self._read, files))
        elsewhere = [self._once(f"teachers-{n}", partial(self._read, (path,))) for n, path in enumerate(teachers)]
        return self._once("users", partial(join_teachers, own, elsewhere))

    def labels(self) -> tuple[str, ...]:
        """The data set's own, those of its teachers from elsewhere left out; none for texts."""
        own = f"{self.home}/own-users" if self.dataset.teachers else self.users()
        return tuple(open_artifact(own, kind="users", verify=False).facts["labels"])

    def embeddings(self, encoder: str | None = None) -> str:
        """Of everybody, by the benchmark's encoder or another one."""
        config = replace(self.config.embed, users=self.users(), cluster=self.cluster)
        config = replace(config, encoder=encoder or config.encoder)
        return self._once(f"embeddings{_part(encoder)}", lambda out: embed_users(replace(config, out=out)))

    def leaks(self, allow: tuple[str, ...]) -> Leaks:
        """What of the tested users' questions is known elsewhere; raises ValueError where that is not allowed."""
        who = (self.users(), read_embeddings(self.embeddings()), self.config.split)
        max_words = self.config.base.prompts.max_words
        return check_leaks(self.dataset.name, tested_of(*who), teachers_of(*who), allow=allow, max_words=max_words)

    def tested(self, encoder: str | None = None) -> str:
        """The tested users, with their vectors at each budget."""
        users, embeddings = self.users(), self.embeddings(encoder)

        def make(out: str) -> str:
            how = {"split": self.config.split, "embed": self.config.embed, "workers": self.workers}
            return write_tested(users, embeddings, out, budgets=self.budgets, **how)  # type: ignore[arg-type]

        return self._once(f"tested{_part(encoder)}", make)

    def base(self, is_taught: bool = True) -> str:
        """The base model taught the task, or as it comes."""
        config = replace(
            self.config.base,
            users=self.users(),
            embeddings=self.embeddings(),
            split=self.config.split,
            mode=self.config.base.mode if is_taught else "none",
            cluster=self.cluster,
        )
        return self._once(
            f"base{_part('' if is_taught else 'untaught')}", lambda out: train_base(replace(config, out=out))
        )

    def bank(self, recipe: BankRecipe, seed: int, *, is_taught: bool = True) -> str:
        """The bank of a recipe, with the seed of its clusters and its training."""
        config = self.config.bank
        config = replace(
            config,
            users=self.users(),
            embeddings=self.embeddings(recipe.encoder),
            base=self.base(is_taught),
            split=self.config.split,
            anchors=recipe.anchors or config.anchors,
            choice=recipe.choice or config.choice,
            train=replace(config.train, seed=seed, shared_init=config.train.shared_init and recipe.shared_init),
            cluster=self.cluster,
        )
        parts = (
            f"{recipe.anchors}-anchors" if recipe.anchors else "",
            recipe.choice,
            "" if recipe.shared_init else "own-init",
            recipe.encoder,
            "" if is_taught else "untaught",
            f"seed-{seed}",
        )
        each = config.group.gpus_per_worker or cpus_per_worker(config.group, groups=config.groups)
        devices = config.groups * config.group.workers * each
        name = f"bank{''.join(map(_part, parts))}"
        return self._once(name, lambda out: build_bank(replace(config, out=out)), devices=devices)

    def pooled(self, recipe: Recipe, budget: str, seed: int, *, rag: bool = False) -> str:
        """One LoRA for everybody, of a recipe with one."""
        assert recipe.pooled is not None and recipe.bank is not None
        cpus = cpus_per_worker(self.config.bank.group, groups=1)
        job = PooledJob(
            users=self.users(),
            embeddings=self.embeddings(),
            base=self.base(),
            bank=self.bank(recipe.bank, seed),
            tested=self.tested(),
            out="",
            budget=budget,
            context_items=open_base(self.base()).wording.prompts.rag_items if rag else None,
            examples_per_bank_step=self.config.bank.train.examples_per_step,
            train=replace(recipe.pooled, seed=seed),
            split=self.config.split,
            cpus=cpus,
            device=self.workers.device,
            devices=self.workers.gpus or cpus,
        )
        task = ray.remote(train_pooled).options(num_cpus=job.cpus, num_gpus=self.workers.gpus)
        name = f"pooled-{budget}-seed-{seed}{_part('rag' if rag else '')}"
        return self._once(name, lambda out: ray.get(task.remote(replace(job, out=out))))

    def bank_device_seconds(self, path: str) -> float:
        """Wall clock of a bank's building, start-up and all, times the devices at work; 0 where it was not seen.

        A device is a GPU, or a CPU where there is none.
        """
        return self._ledger().get(Path(path).name, 0.0)

    def pooled_device_seconds(self, path: str) -> float:
        """Of one LoRA for everybody."""
        facts = open_artifact(path, kind=POOLED, verify=False).facts
        return float(facts["seconds"] * facts["devices"])

    def _read(self, files: tuple[str, ...], out: str) -> str:
        """The users of some files; of no files, or of `simulated`, those of the simulated population."""
        if files and files != (SIMULATED,):
            return prepare_users(PrepareUsersConfig(files=files, task=self.dataset.task, out=out, cluster=self.cluster))
        world = replace(self.config.world, task=self.dataset.task)
        return simulate_users(SimulateUsersConfig(world=world, users=self.config.users, out=out, cluster=self.cluster))

    def _once(self, name: str, make: Callable[[str], str], *, devices: int = 1) -> str:
        """The artifact's path; its stage is called once, and rests where nothing has changed. What it took is noted."""
        if name not in self._made:
            out = f"{self.home}/{name}"
            before, started_s = _stamp(out), time.perf_counter()
            try:
                make(out)
            except BaseException:
                self._note(f"{name} so far", (time.perf_counter() - started_s) * devices)
                raise
            if _stamp(out) != before:
                self._note(name, (time.perf_counter() - started_s) * devices)
            self._made[name] = out
        return self._made[name]

    def _ledger(self) -> dict[str, float]:
        path = Path(self.home, SECONDS)
        return json.loads(path.read_text()) if path.exists() else {}

    def _note(self, name: str, seconds: float) -> None:
        """A material that was stopped has its parts added up when it is there."""
        seconds += (known := self._ledger()).pop(f"{name} so far", 0.0)
        seconds += known.get(name, 0.0) if name.endswith(" so far") else 0.0
        text = json.dumps(known | {name: round(seconds, 2)}, indent=1)
        replace_file(Path(self.home, SECONDS), lambda file: file.write_text(text))


def _part(value: str | None) -> str:
    """Of a folder's name; nothing where nothing differs."""
    if not value:
        return ""
    plain = re.sub(r"[^\w.-]+", "_", value)
    return f"-{plain}" if plain == value else f"-{plain}-{blake2b(value.encode(), digest_size=4).hexdigest()}"


def _stamp(path: str) -> int:
    manifest = Path(path, "manifest.json")
    return manifest.stat().st_mtime_ns if manifest.exists() else 0
