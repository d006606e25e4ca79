"""Every method as a recipe: which bank, which route through it, what is trained for a user on top. Data, no code.

An ablation is the recipe `mta` with one thing changed. A recipe is written down with every result it leads to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from mta_ray.comparison.results import ABLATED
from mta_ray.evaluation.methods import OPPU, RELEASED_FUSION, RELEASED_STACK
from mta_ray.lamp.tasks import Task
from mta_ray.lora.fusion_config import FusionConfig
from mta_ray.personalize.coefficients import CoefficientConfig
from mta_ray.personalize.searched_weights import SearchConfig
from mta_ray.personalize.train_config import TrainConfig
from mta_ray.pipeline.adapt_users import AdaptUsersConfig
from mta_ray.similarity.anchors import AnchorChoice

Control = Literal["", "majority_label", "nearest_item", "oracle"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BankRecipe:
    """How a bank differs from the benchmark's own."""

    anchors: int | None = None
    """Clusters of candidate users; None: as many as the benchmark's bank has."""
    choice: AnchorChoice | None = None
    """Which candidate of a cluster; None: as in the benchmark's bank."""
    shared_init: bool = True
    """All meta-LoRAs start from the same A."""
    encoder: str | None = None
    """Of users' items; None: the benchmark's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One way of answering a user. What is None or empty is left out."""

    name: str
    """In every table."""
    control: Control = ""
    """Answers without a model."""
    is_taught: bool = True
    """Over the base model with its task adapter; else over the one without."""
    bank: BankRecipe | None = None
    """Whose anchors the route leads through; for a pooled LoRA, the bank that has met as many examples."""
    anchors: Literal["nearest", "all", "random"] = "nearest"
    """Which of them: the nearest, weighed by `fusion`; all alike; `fusion.k` drawn by seed and user, alike."""
    fusion: FusionConfig = field(default_factory=FusionConfig)
    """A mode other than exact makes one adapter a user of the route."""
    search: SearchConfig | None = None
    """Weights of the route are searched on the user's items."""
    coefficients: CoefficientConfig | None = None
    """Coefficients of the route are trained on the user's items."""
    own: TrainConfig | None = None
    """One LoRA a user, trained on the user's items over what stands before."""
    is_one_epoch: bool = False
    """The own LoRA meets every item once, instead of `own.steps`."""
    pooled: TrainConfig | None = None
    """One LoRA for everybody, trained on tested users' items and on so many of teachers' that it meets as many examples
    as the bank has met."""
    rag: Literal["both", "never", "always"] = "both"
    """Whether the method also stands with the user's items (BM25) in its prompts."""

    @property
    def is_drawn(self) -> bool:
        """Whether chance has a part in it; if not, one seed is all."""
        return self.bank is not None or self.own is not None or self.pooled is not None

    def reads_history(self, rag: bool) -> bool:
        """Whether a user's items have a part in the answers; if not, they are the same at every budget."""
        return rag or bool(self.bank or self.own or self.pooled or self.control in ("majority_label", "nearest_item"))

    def applies_to(self, task: Task, *, is_best_known: bool) -> bool:
        """Whether the task has what the method needs."""
        if self.control == "oracle":
            return is_best_known
        return not self.control or task.has_label_targets

    def seeded(self, seed: int) -> Recipe:
        """The recipe with this seed in all that is drawn for a user."""
        coefficients = self.coefficients and replace(
            self.coefficients, train=replace(self.coefficients.train, seed=seed)
        )
        return replace(
            self,
            own=self.own and replace(self.own, seed=seed),
            pooled=self.pooled and replace(self.pooled, seed=seed),
            search=self.search and replace(self.search, seed=seed),
            coefficients=coefficients,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodSettings:
    """What the methods are set to. Rates were chosen on the simulated population of seed 101, for the default base."""

    fusion: FusionConfig = field(default_factory=FusionConfig)
    """Of all methods that weigh the nearest anchors."""
    stack: TrainConfig = field(default_factory=lambda: AdaptUsersConfig().stack)
    """Of a user's own LoRA on top, and of `stack_only`."""
    oppu: TrainConfig = OPPU
    """One LoRA a user on the bare base model."""
    pooled: TrainConfig = field(default_factory=lambda: TrainConfig(learning_rate=1e-3, examples_per_step=16))
    """Of `all_users_lora`; its steps are those in which it meets as many examples as the bank has met. Of the rates
    2.5e-4, 5e-4, 1e-3, 2e-3, 5e-3 and 1e-2 the best (0.577, 0.573, 0.592, 0.585, 0.573 and 0.565)."""
    coefficients: CoefficientConfig = field(default_factory=CoefficientConfig)
    """Of `mta_coefficients`."""
    learned_route: CoefficientConfig = field(default_factory=lambda: CoefficientConfig(per="anchor"))
    """Of `mta_learned_route`. Of the rates 0.05, 0.2 and 0.8 the best (0.765, 0.775 and 0.763)."""
    search: SearchConfig = field(default_factory=SearchConfig)
    """Of `prime`."""
    shrinkage: float = 4.0
    """Of the ablation `mta:shrinkage`, in history items: with so many the fused anchors have half of their strength."""


def recipes(settings: MethodSettings) -> dict[str, Recipe]:
    """Every method's recipe by its name, in the order of tables."""
    fusion, stack, own = settings.fusion, settings.stack, BankRecipe()
    alike = replace(fusion, mode="exact")
    found = [
        Recipe(name="non_personalised", rag="never"),
        Recipe(name="majority_label", control="majority_label", rag="never"),
        Recipe(name="nearest_item", control="nearest_item", rag="never"),
        Recipe(name="rag", rag="always"),
        Recipe(name="oppu", own=settings.oppu),
        Recipe(name="all_users_lora", bank=own, pooled=settings.pooled),
        Recipe(name="nearest_anchor", bank=own, fusion=FusionConfig(k=1)),
        Recipe(name="uniform_mean", bank=own, anchors="all", fusion=alike),
        Recipe(name="random_anchors", bank=own, anchors="random", fusion=alike),
        Recipe(name="stack_only", own=stack),
        Recipe(name="prime", bank=own, fusion=replace(fusion, k=3), search=settings.search),
        Recipe(name="as_released", bank=own, fusion=RELEASED_FUSION, own=RELEASED_STACK, is_one_epoch=True),
        Recipe(name="mta_fusion", bank=own, fusion=fusion),
        Recipe(name="mta", bank=own, fusion=fusion, own=stack),
        Recipe(name="mta_coefficients", bank=own, fusion=fusion, coefficients=settings.coefficients),
        Recipe(name="mta_learned_route", bank=own, fusion=fusion, coefficients=settings.learned_route),
        Recipe(name="oracle", control="oracle", rag="never"),
    ]
    return {recipe.name: recipe for recipe in found}


def ablations(settings: MethodSettings, *, encoders: Sequence[str] = ()) -> list[Recipe]:
    """The recipe of `mta` with one thing changed, for each of its parts: `mta:anchors=4`, `mta:k=1`, …"""
    mta = replace(recipes(settings)["mta"], rag="never")
    fusion, stack, own = settings.fusion, settings.stack, BankRecipe()
    changes: dict[str, Recipe] = {}
    for anchors in (4, 7, 28):
        changes[f"anchors={anchors}"] = replace(mta, bank=replace(own, anchors=anchors))
    for k in (1, 2, 8):
        changes[f"k={k}"] = replace(mta, fusion=replace(fusion, k=k))
    for factor in (0.5, 2.0):
        temperature = fusion.temperature * factor
        changes[f"temperature={temperature:g}"] = replace(mta, fusion=replace(fusion, temperature=temperature))
    changes[f"shrinkage={settings.shrinkage:g}"] = replace(mta, fusion=replace(fusion, shrinkage=settings.shrinkage))
    changes["fusion=linear with shares"] = replace(mta, fusion=replace(fusion, mode="linear"))
    changes["fusion=svd"] = replace(mta, fusion=replace(fusion, mode="svd"))
    changes["own A"] = replace(mta, bank=replace(own, shared_init=False))
    changes["no task adapter"] = replace(mta, is_taught=False)
    for rank in (2, 4):
        changes[f"stack rank={rank}"] = replace(
            mta, own=replace(stack, rank=rank, alpha=stack.alpha * rank / stack.rank)
        )
    for factor in (0.5, 2.0):
        steps = max(1, round(stack.steps * factor))
        changes[f"stack steps={steps}"] = replace(mta, own=replace(stack, steps=steps))
    for encoder in encoders:
        changes[f"encoder={encoder}"] = replace(mta, bank=replace(own, encoder=encoder))
    choices: tuple[AnchorChoice, ...] = ("medoid", "random", "cover")
    for choice in choices:
        changes[f"choice={choice}"] = replace(mta, bank=replace(own, choice=choice))
    return [replace(recipe, name=f"{ABLATED}{change}") for change, recipe in changes.items()]
