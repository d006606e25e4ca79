"""Which cells a benchmark is made of: methods, with and without RAG, at which budgets, with which seeds."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Literal

from mta_ray.artifacts import open_artifact
from mta_ray.comparison.cells import Cell, made_by
from mta_ray.comparison.datasets import read_tested
from mta_ray.comparison.materials import Materials
from mta_ray.comparison.pooled import KIND as POOLED
from mta_ray.comparison.recipes import MethodSettings, Recipe, ablations, recipes
from mta_ray.comparison.results import ALL, BASELINE, METHODS
from mta_ray.personalize.base_model import open_base
from mta_ray.pipeline.actors import ActorConfig

BUDGETS = ("0", "1", "2", "5", "10", ALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanConfig:
    """What is compared."""

    methods: tuple[str, ...] = tuple(METHODS)
    """Names of methods; one that a task has no use for is left out there."""
    rag: Literal["first-seed", "every-seed", "none"] = "first-seed"
    """With which seeds methods also stand with retrieved items in their prompts, training prompts among them."""
    budgets: tuple[str, ...] = BUDGETS
    """Latest history items that a tested user has; the same users and queries at each."""
    budget_methods: tuple[str, ...] = ("non_personalised", "rag", "oppu", "mta_fusion", "mta", "mta_coefficients")
    """Methods that stand at all budgets; the others only with the whole history."""
    budget_seeds: int = 1
    """So many of the seeds, the first ones, stand at the budgets below the whole history."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of clusters, banks, per-user training and drawn anchors. Methods without chance stand with the first one."""
    budget_rag: bool = False
    """Whether the methods at all budgets stand there with retrieved items too, not only those that are nothing without
    them."""
    ablations: bool = False
    """Whether `mta` also stands with one part changed, for each part, with the whole history."""
    ablation_seeds: int = 1
    """So many of the seeds, the first ones, stand for each of those."""
    encoders: tuple[str, ...] = ()
    """Other encoders for the ablations, by name or path."""
    settings: MethodSettings = field(default_factory=MethodSettings)
    """Rates, steps, k and the like of the methods."""

    def __post_init__(self) -> None:
        for name in ("methods", "budget_methods"):
            if unknown := [value for value in getattr(self, name) if value not in METHODS]:
                raise ValueError(f"{name}: no method is called {unknown[0]!r}; wanted some of {', '.join(METHODS)}")
        if BASELINE not in self.methods:
            raise ValueError(f"methods must hold {BASELINE}, which every gain is measured against; add it")
        for name in ("methods", "budgets", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must name at least one, and each once; got {values}")
        if bad := [budget for budget in self.budgets if budget != ALL and not re.fullmatch("0|[1-9][0-9]*", budget)]:
            raise ValueError(f"a budget is a number of items or {ALL}, got {bad[0]!r}")
        if ALL not in self.budgets:
            raise ValueError(f"budgets are {self.budgets}; {ALL}, at which every method stands, must be among them")
        if not all(0 <= seed < 2**31 for seed in self.seeds) or self.budget_seeds < 1 or self.ablation_seeds < 1:
            raise ValueError(
                f"got seeds={self.seeds}, budget_seeds={self.budget_seeds}, ablation_seeds={self.ablation_seeds}; "
                "wanted seeds 0, 1, … below 2**31 and at least 1 of them"
            )
        if self.encoders and not self.ablations:
            raise ValueError("encoders are ablations, which are off; add --ablations, or leave --encoders out")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One cell, before there is anything to make it with."""

    recipe: Recipe
    rag: bool
    budget: str
    seed: int


def entries(config: PlanConfig) -> list[Entry]:
    """Every cell of one data set, those with the whole history first."""
    known = recipes(config.settings)
    found = []
    for name in config.methods:
        recipe = known[name]
        for rag in {"never": (False,), "always": (True,), "both": (False, True)}[recipe.rag]:
            is_extra = rag and recipe.rag == "both"
            if is_extra and config.rag == "none":
                continue
            seeds = config.seeds if recipe.is_drawn else config.seeds[:1]
            if is_extra and config.rag == "first-seed":
                seeds = seeds[:1]
            for seed in seeds:
                found.append(Entry(recipe=recipe, rag=rag, budget=ALL, seed=seed))
                is_there = name in config.budget_methods and (config.budget_rag or not is_extra)
                if is_there and seed in seeds[: config.budget_seeds]:
                    rest = [budget for budget in config.budgets if budget != ALL]
                    found += [Entry(recipe=recipe, rag=rag, budget=budget, seed=seed) for budget in rest]
    if config.ablations:
        changed = ablations(config.settings, encoders=config.encoders)
        for seed in config.seeds[: config.ablation_seeds]:
            found += [Entry(recipe=recipe, rag=False, budget=ALL, seed=seed) for recipe in changed]
    return sorted(found, key=lambda entry: entry.budget != ALL)


def cells(config: PlanConfig, materials: Materials, workers: ActorConfig) -> list[Cell]:
    """Every cell of one data set that its task has a use for, with what it is made of; that is made where missing.

    Cells that share a base and a bank follow each other.
    """
    wording = open_base(materials.base()).wording
    read = cache(read_tested)
    digest = cache(lambda tested, budget: read(tested).digest(budget))
    people = read(materials.tested()).users
    is_best_known = all(query.best is not None for user in people for query in user.queries)
    found = [
        _cell(entry, materials, workers, digest)
        for entry in entries(config)
        if entry.recipe.applies_to(wording.task, is_best_known=is_best_known)
    ]
    return sorted(found, key=lambda cell: (cell.budget != ALL, cell.base, cell.bank))


def _cell(entry: Entry, materials: Materials, workers: ActorConfig, digest: Callable[[str, str], str]) -> Cell:
    recipe = entry.recipe
    encoder = recipe.bank.encoder if recipe.bank else None
    tested, base = materials.tested(encoder), materials.base(recipe.is_taught)
    hashes = [digest(tested, entry.budget), open_base(base).hash]
    cell = Cell(
        dataset=materials.dataset.name,
        recipe=recipe,
        rag=entry.rag,
        budget=entry.budget,
        seed=entry.seed,
        whole=recipe.pooled is None,
        tested=tested,
        base=base,
        users_per_pack=workers.users_per_pack,
        inputs=(),
        made_by=made_by(workers),
        devices=workers.gpus or workers.cpus,
    )
    if recipe.bank is not None:
        bank = materials.bank(recipe.bank, entry.seed, is_taught=recipe.is_taught)
        hashes.append(_hash(bank, "bank"))
        cell = replace(cell, bank=bank, bank_device_seconds=materials.bank_device_seconds(bank))
    if recipe.pooled is not None:
        pooled = materials.pooled(recipe, entry.budget, entry.seed, rag=entry.rag)
        hashes.append(_hash(pooled, POOLED))
        # What stands for a bank has none of its own.
        cell = replace(cell, pooled=pooled, pooled_device_seconds=materials.pooled_device_seconds(pooled))
        cell = replace(cell, bank="", bank_device_seconds=0.0)
    return replace(cell, inputs=tuple(hashes))


def _hash(path: str, kind: str) -> str:
    return open_artifact(path, kind=kind, verify=False).hash
