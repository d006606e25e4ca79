"""The methods as data: an ablation is `mta` with one thing changed; what chance has no part in is known."""

from __future__ import annotations

from dataclasses import fields, is_dataclass

import pytest

from mta_ray.comparison.plan import PlanConfig, entries
from mta_ray.comparison.recipes import MethodSettings, ablations, recipes
from mta_ray.comparison.results import ABLATED, CHANCE_FREE, METHODS
from mta_ray.lamp.tasks import task_named


def differing(one: object, other: object, where: str = "") -> list[str]:
    """Names of the values that are not the same, down to the last one."""
    if is_dataclass(one) and is_dataclass(other):
        return [d for f in fields(one) for d in differing(getattr(one, f.name), getattr(other, f.name), f.name)]
    return [] if one == other else [where]


def test_an_ablation_changes_one_thing_of_mta_and_no_other() -> None:
    mta = recipes(MethodSettings())["mta"]
    changed = {}
    for recipe in ablations(MethodSettings(), encoders=("another",)):
        assert recipe.name.startswith(ABLATED)
        changed[recipe.name] = set(differing(mta, recipe)) - {"name", "rag"}
    one = {name for what in changed.values() for name in what}
    assert one == {"anchors", "k", "temperature", "mode", "shared_init", "is_taught", "rank", "alpha", "steps"} | {
        "encoder", "choice", "shrinkage",
    }  # fmt: skip
    # α goes with the rank, so that the scale stays
    assert [len(what) for what in changed.values()] == [2 if "alpha" in what else 1 for what in changed.values()]


def test_every_method_has_its_recipe_and_chance_has_a_part_in_the_ones_that_are_said_to_have_it() -> None:
    known = recipes(MethodSettings())
    assert list(known) == list(METHODS)
    assert {name for name, recipe in known.items() if not recipe.is_drawn} == set(CHANCE_FREE)
    reseeded = {name: differing(recipe.seeded(7), recipe.seeded(8)) for name, recipe in known.items()}
    assert all(names in ([], ["seed"]) for names in reseeded.values())
    assert reseeded["mta_coefficients"] == reseeded["prime"] == reseeded["mta"] == ["seed"]


@pytest.mark.parametrize(
    ("task", "left_out"),
    [
        ("movie_tagging", {"oracle"}),
        ("product_rating", {"oracle"}),
        ("news_headline", {"oracle", "majority_label", "nearest_item"}),
        ("citation", {"oracle", "majority_label", "nearest_item"}),  # a user's targets there are papers, no answers
    ],
)
def test_controls_stand_where_a_users_targets_are_answers(task: str, left_out: set[str]) -> None:
    known = recipes(MethodSettings()).values()
    assert {r.name for r in known if not r.applies_to(task_named(task), is_best_known=False)} == left_out


def test_cells_are_methods_times_seeds_and_some_of_them_times_budgets() -> None:
    config = PlanConfig(
        methods=("non_personalised", "rag", "mta", "oracle"), budgets=("1", "all"), budget_methods=("rag", "mta"),
        seeds=(3, 4), budget_seeds=1,
    )  # fmt: skip
    found = [(e.recipe.name, e.rag, e.budget, e.seed) for e in entries(config)]
    assert set(found) == {
        ("non_personalised", False, "all", 3),
        ("rag", True, "all", 3),
        ("rag", True, "1", 3),
        ("mta", False, "all", 3),
        ("mta", False, "all", 4),
        ("mta", False, "1", 3),
        ("mta", True, "all", 3),
        ("oracle", False, "all", 3),
    }
    assert len(found) == len(set(found))


def test_budgets_with_rag_and_seeds_of_ablations_can_be_had() -> None:
    config = PlanConfig(
        methods=("non_personalised", "mta"), budgets=("1", "all"), budget_methods=("mta",), seeds=(3, 4),
        budget_rag=True, ablations=True, ablation_seeds=2,
    )  # fmt: skip
    found = [(e.recipe.name, e.rag, e.budget, e.seed) for e in entries(config)]
    assert ("mta", True, "1", 3) in found and ("mta", False, "1", 3) in found
    assert {seed for name, _, _, seed in found if name == "mta:k=1"} == {3, 4}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"methods": ("non_personalised", "mtaa")}, "no method is called 'mtaa'"),
        ({"methods": ("mta",)}, "methods must hold non_personalised"),
        ({"budgets": ("1", "many", "all")}, "a budget is a number of items or all, got 'many'"),
        ({"budgets": ("1", "01", "all")}, "a budget is a number of items or all, got '01'"),
        ({"budgets": ("1", "2")}, "all, at which every method stands, must be among them"),
        ({"seeds": (1, 1)}, "seeds must name at least one, and each once"),
    ],
)
def test_a_plan_that_cannot_be_is_told_at_the_door(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlanConfig(**wrong)
