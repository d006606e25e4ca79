"""The simulations that stand on a bank, one after the other on one small world: what each says of the same answers."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import pytest

from mta_ray.artifacts import open_artifact
from mta_ray.benchmarks.small_world import ITEMS, WORLD, make_world
from mta_ray.evaluation.run import EvaluateConfig, evaluate
from mta_ray.lora.bank import load_bank
from mta_ray.lora.fusion_config import FusionConfig
from mta_ray.personalize.base_model import open_base
from mta_ray.personalize.train_config import TrainConfig
from mta_ray.pipeline.actors import ActorConfig
from mta_ray.pipeline.adapt_users import AdaptUsersConfig, adapt_users
from mta_ray.pipeline.build_bank import BuildBankConfig, build_bank
from mta_ray.pipeline.embed_users import EmbedUsersConfig
from mta_ray.pipeline.split import SplitConfig
from mta_ray.population.crowd.simulate import SimulatePopulationConfig, simulate_population
from mta_ray.population.drift import FRESH, REBUILT, STALE, DriftConfig, simulate_drift
from mta_ray.population.joined import JoinReportsConfig, join_reports
from mta_ray.population.judge import BARE
from mta_ray.population.people import user_name
from mta_ray.population.what_if import WhatIfConfig, simulate_what_if
from mta_ray.serving.banks import Banks
from mta_ray.serving.database import Database, DatabaseConfig, open_database
from mta_ray.serving.identity import DEFAULT_TENANT, UserId
from mta_ray.serving.served_bank import describe
from mta_ray.serving.user_store import UserStore

ONE = ActorConfig(actors=1)
SPLIT = SplitConfig(max_few_shot=6, max_rest=2)
FUSION = FusionConfig(k=2, temperature=0.1)
FEW = TrainConfig(rank=1, alpha=2.0, steps=2, examples_per_step=2, learning_rate=1e-2)
BUILD = BuildBankConfig(
    anchors=3, adapters_per_pack=3, split=SPLIT, train=TrainConfig(rank=4, alpha=8.0, steps=12, learning_rate=2e-2)
)


@dataclass(frozen=True)
class World:
    """Paths, and what an evaluation said."""

    home: Path
    predictions: pd.DataFrame

    def path(self, name: str) -> str:
        return str(self.home / name)

    def artifacts(self, *names: str) -> dict[str, str]:
        return {name: self.path(name) for name in names}

    def report(self, name: str) -> dict:
        return json.loads((self.home / name / "report.json").read_text())

    def score(self, method: str) -> float:
        return float(self.predictions.loc[self.predictions["method"] == method, "score"].mean())


@pytest.fixture(scope="module")
def world(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> World:
    home = tmp_path_factory.mktemp("simulations")
    make_world(home, users=30)
    told = World(home=home, predictions=pd.DataFrame())
    made = told.artifacts("users", "embeddings", "base")
    build_bank(replace(BUILD, **made, out=told.path("bank")))
    assert len(load_bank(told.path("bank"))) == 3
    made |= told.artifacts("bank")
    states = told.path("states")
    adapt_users(AdaptUsersConfig(**made, fusion=FUSION, stack=FEW, split=SPLIT, workers=ONE, out=states))
    evaluate(EvaluateConfig(**made, states=states, oppu=FEW, split=SPLIT, workers=ONE, out=told.path("report")))
    return replace(told, predictions=pd.read_parquet(home / "report" / "predictions.parquet"))


@pytest.fixture(scope="module")
def what_if(world: World) -> dict:
    config = WhatIfConfig(
        **world.artifacts("users", "embeddings", "base", "bank"), out=world.path("what-if"), fusion=FUSION, split=SPLIT,
        workers=ONE, anchors=(1, 3), k=(1, 2), temperature=(0.1,), rank=(1, 4), history=(1, ITEMS),
    )  # fmt: skip
    assert simulate_what_if(config) == config.out
    return world.report("what-if")


@pytest.fixture(scope="module")
def drift(world: World) -> dict:
    config = DriftConfig(
        **world.artifacts("users", "base", "bank"), out=world.path("drift"), fusion=FUSION, split=SPLIT, workers=ONE,
        weeks=(0, 40), rebuild=(0,), embed=EmbedUsersConfig(actors=1, max_items=ITEMS),
    )  # fmt: skip
    assert simulate_drift(config) == config.out
    return world.report("drift")


def _population(world: World, name: str, store: Path) -> SimulatePopulationConfig:
    return SimulatePopulationConfig(
        world=WORLD, users=40, embeddings="encoded", max_items=ITEMS, part_users=20, workers=2, store=str(store),
        fusion=FUSION, bank=world.path("bank"), report=world.path("report"), evaluated=world.path("embeddings"),
        out=world.path(name),
    )  # fmt: skip


@pytest.fixture(scope="module")
def store(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the population in it, and nothing before."""
    store = tmp_path_factory.mktemp("store") / "new.db"
    simulate_population(_population(world, "population", store))
    return store


def test_what_is_not_varied_is_answered_as_the_evaluation_answered_it(world: World, what_if: dict) -> None:
    assert what_if["users"] == world.predictions["user_id"].nunique() == 8
    assert what_if["score_without"] == pytest.approx(world.score("non_personalised"))
    rows = {(row["sweep"], row["value"]): row["score"] for row in what_if["rows"]}
    for same in (("anchors", 3), ("k", 2), ("temperature", 0.1), ("rank", 4), ("history", ITEMS)):
        assert rows[same] == pytest.approx(world.score("mta_fusion")), same
    assert rows["k", 1] == pytest.approx(world.score("nearest_anchor"))
    said = world.predictions.set_index(["user_id", "query_id"]).groupby("method")["prediction"]
    assert said.get_group("mta_fusion").tolist() != said.get_group("non_personalised").tolist()


def test_in_the_first_week_nothing_is_stale(world: World, drift: dict) -> None:
    score = {(row["week"], row["line"]): row["score"] for row in drift["rows"]}
    assert set(score) == {(week, line) for week in (0, 40) for line in (BARE, STALE, FRESH)} | {(0, REBUILT)}
    assert score[0, BARE] == pytest.approx(world.score("non_personalised"))
    assert score[0, STALE] == score[0, FRESH] == pytest.approx(world.score("mta_fusion"))
    # built as the first one was, of the same histories
    assert open_artifact(f"{world.path('drift')}.weeks/0/bank", kind="bank").settings["train"]["steps"] == 12
    assert score[0, REBUILT] == score[0, FRESH]
    # after as many weeks other questions are asked, and the same users ask them
    assert drift["queries"] == len(world.predictions.drop_duplicates(["user_id", "query_id"]))


def _anchors_of(database: Database, tenant: str, number: int) -> set[str]:
    route = UserStore(database).read(UserId(tenant=tenant, id=user_name(WORLD.seed, number))).route
    assert route is not None
    return {anchor.tenant for anchor in route.anchors}


def test_a_banks_anchors_in_a_new_store_are_users_of_the_service(world: World, store: Path) -> None:
    report = world.report("population")
    of_users = world.predictions[world.predictions["method"] == "mta_fusion"].groupby("user_id")["score"].mean()
    assert report["quality"]["evaluated"] == pytest.approx(of_users.mean())
    assert sum(band["population_users"] for band in report["quality"]["bands"]) == 40
    with closing(open_database(DatabaseConfig(url=str(store)))) as database:
        banks = Banks(database)
        bank = banks.get(str(banks.state().active_version)).bank
        assert {anchor.tenant for anchor in bank.anchors} == {DEFAULT_TENANT}
        assert _anchors_of(database, "simulated", 39) == {DEFAULT_TENANT}
        assert banks.retire(bank.anchors[0])  # the service knows whom it must let go


def test_a_store_that_serves_the_bank_already_keeps_its_names_and_who_is_out_of_service(
    world: World, tmp_path: Path
) -> None:
    store = tmp_path / "served.db"
    fingerprint = open_base(world.path("base")).fingerprint
    with closing(open_database(DatabaseConfig(url=str(store)))) as database:
        served = describe(world.path("bank"), base_fingerprint=fingerprint, tenant="acme", version="first")
        Banks(database).publish(served)
        assert Banks(database).retire(served.anchors[1])
    simulate_population(_population(world, "population-of-acme", store))
    with closing(open_database(DatabaseConfig(url=str(store)))) as database:
        users = UserStore(database)
        routes = [users.read(UserId(tenant="simulated", id=user_name(WORLD.seed, n))).route for n in range(40)]
    assert {anchor for route in routes if route for anchor in route.anchors} == {served.anchors[0], served.anchors[2]}
    assert {route.bank_version for route in routes if route} == {"first"}
    told = world.report("population-of-acme")["anchors"]
    assert (told["count"], told["retired"], len(told["users"])) == (2, 1, 2)


def test_a_report_that_says_nothing_of_this_population_is_refused_before_anybody_is_made(
    world: World, drift: dict, tmp_path: Path
) -> None:
    config = _population(world, "never", tmp_path / "never.db")
    for changes, complaint in (
        ({"max_items": 9}, "max_items 4 and the population with 9"),
        ({"method": "mta_fussion"}, "no method"),
        ({"world": replace(WORLD, task="product_rating")}, "task movie_tagging"),
        ({"evaluated": f"{world.path('drift')}.weeks/40/embeddings"}, "other embeddings"),
    ):
        with pytest.raises(ValueError, match=complaint):
            simulate_population(replace(config, **changes))
    assert not (tmp_path / "never.db").exists() and not (world.home / "never").exists()


def test_all_of_it_stands_on_one_page(world: World, store: Path, what_if: dict, drift: dict) -> None:
    parts = ("population", "what-if", "drift")
    join_reports(JoinReportsConfig(of=tuple(world.path(name) for name in parts), out=world.path("joined")))
    told = json.loads((world.home / "joined" / "report.json").read_text())
    assert [one["simulation"] for one in told["reports"]] == list(parts)
    page = (world.home / "joined" / "report.html").read_text()
    assert page.count("<svg") >= 8 and "Tastes that change" in page and "Bytes per user" in page


def test_whoever_taught_is_not_tested(world: World) -> None:
    other = SplitConfig(max_few_shot=6, max_rest=2, seed=1)
    with pytest.raises(ValueError, match="may have taught it"):
        simulate_what_if(
            WhatIfConfig(
                **world.artifacts("users", "embeddings", "base", "bank"), out=world.path("no"), split=other, workers=ONE
            )
        )
    with pytest.raises(ValueError, match="may have taught it"):
        simulate_drift(DriftConfig(**world.artifacts("users", "base", "bank"), out=world.path("no"), split=other))
