"""A whole benchmark on real Ray with a tiny base model: its answers against merged weights, its rests, its bytes."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mta_ray.comparison.answerer import Answerer
from mta_ray.comparison.cells import Cell
from mta_ray.comparison.datasets import read_tested
from mta_ray.comparison.materials import MaterialsConfig
from mta_ray.comparison.pooled import PooledJob, pooled_examples
from mta_ray.comparison.recipes import MethodSettings, recipes
from mta_ray.comparison.results import METHODS
from mta_ray.comparison.run import BenchmarkConfig, benchmark
from mta_ray.lamp.tasks import task_named
from mta_ray.lamp.users import User
from mta_ray.lora.adapter import Adapter, Factors, load_peft
from mta_ray.lora.bank import load_bank
from mta_ray.lora.fusion import fuse
from mta_ray.lora.fusion_config import FusionConfig
from mta_ray.model.backbone import RoutedModel, merge
from mta_ray.model.generate import answer
from mta_ray.personalize.base_model import open_base, tokenised
from mta_ray.personalize.coefficients import CoefficientConfig
from mta_ray.personalize.merge_then_adapt import encode, stack_users
from mta_ray.personalize.searched_weights import SearchConfig
from mta_ray.personalize.train_config import TrainConfig
from mta_ray.pipeline.actors import ActorConfig
from mta_ray.pipeline.build_bank import BuildBankConfig
from mta_ray.pipeline.embed_users import EmbedUsersConfig, item_texts
from mta_ray.pipeline.prepare_users import read_users
from mta_ray.pipeline.split import SplitConfig
from mta_ray.pipeline.train_base import TrainBaseConfig
from mta_ray.population.people import WorldConfig
from mta_ray.similarity.embedding import Encoder

FEW = TrainConfig(rank=1, alpha=2.0, steps=2, examples_per_step=2, learning_rate=1e-1)


@pytest.fixture(scope="module")
def config(tmp_path_factory, ray_local, tiny_model) -> BenchmarkConfig:
    """All methods on five simulated users; a random base model of two layers."""
    folder = tmp_path_factory.mktemp("benchmark")
    backbone = tiny_model()
    backbone.model.save_pretrained(folder / "model")
    backbone.tokenizer.save_pretrained(folder / "model")
    materials = MaterialsConfig(
        world=WorldConfig(queries=2, max_items=14),
        users=24,
        split=SplitConfig(max_few_shot=4, max_rest=1),
        embed=EmbedUsersConfig(actors=1),
        base=TrainBaseConfig(base_model=str(folder / "model"), mode="none"),
        bank=BuildBankConfig(anchors=3, adapters_per_pack=3, train=replace(FEW, rank=2)),
    )
    settings = MethodSettings(
        fusion=FusionConfig(k=2, temperature=0.1), stack=FEW, oppu=FEW, pooled=FEW,
        search=SearchConfig(generations=1, candidates=2), coefficients=CoefficientConfig(train=FEW),
        learned_route=CoefficientConfig(per="anchor", train=FEW),
    )  # fmt: skip
    config = BenchmarkConfig(
        out=str(folder / "out"),
        workers=ActorConfig(actors=1),
        materials=materials,
        methods=tuple(METHODS),
        settings=settings,
        seeds=(3,),
        budgets=("0", "3", "all"),
    )
    assert benchmark(config) == config.out
    return config


def test_every_method_has_answered_every_question_at_its_budgets(config) -> None:
    results = pd.read_parquet(Path(config.out, "results.parquet"))
    questions = len(results.drop_duplicates(["user_id", "query_id"]))
    cells = results.groupby(["method", "rag", "budget"]).size()
    assert set(cells) == {questions} and questions >= 8
    assert set(results["method"]) == set(METHODS)
    with_rag = {method for method, rag, _ in cells.index if rag}
    assert with_rag == set(METHODS) - {"non_personalised", "majority_label", "nearest_item", "oracle"}
    assert {method for method, _, budget in cells.index if budget == "3"} == set(config.budget_methods)

    # without an item nobody is anybody: what is trained for a user is the base model
    said = results.set_index(["method", "rag", "budget", "user_id", "query_id"])["prediction"]
    bare = said["non_personalised", False, "all"].tolist()
    assert said["oppu", False, "0"].tolist() == said["rag", True, "0"].tolist() == bare
    assert said["mta", False, "0"].tolist() == said["mta_fusion", False, "0"].tolist()

    costs = pd.read_parquet(Path(config.out, "costs.parquet"))
    costs = costs[costs["group"] == "all"].set_index(["method", "rag", "budget"])
    assert len(costs) == len(cells)
    kept = costs["bytes_per_user"]
    assert kept["mta", False, "0"] == 4 * 3  # every anchor alike, no stack
    assert (
        kept["mta_fusion", False, "all"] == 4 * 2 < kept["mta_coefficients", False, "all"] < kept["mta", False, "all"]
    )
    # two bytes a number, and the names of the factors; items as they are
    base = open_base(f"{config.out}/materials/simulated_movie_tagging/base").load()
    layers = [layer.base for layer in RoutedModel(base).layers.values()]
    numbers = sum(layer.in_features + layer.out_features for layer in layers)
    for method, ranks in (("oppu", 1), ("stack_only", 1), ("as_released", 2 + 1)):
        assert 2 * numbers * ranks < kept[method, False, "all"] < 2.6 * numbers * ranks + 20_000
    # who looks for anchors has encoded the items
    tested = read_tested(f"{config.out}/materials/simulated_movie_tagging/tested")
    items = np.mean([min(24, len(user.history)) for user in tested.users])
    assert tested.max_items == 24 and tested.encode_s > 0
    assert costs["seconds_per_user"]["mta_fusion", False, "all"] > items * tested.encode_s
    assert (costs.loc["mta", "bank_device_seconds"] > 0).all() and (costs.loc["oppu", "bank_device_seconds"] == 0).all()


@pytest.mark.parametrize("budget", ["3", "all"])
def test_mta_answers_as_a_model_with_fusion_and_stack_merged_into_its_weights(config, budget) -> None:
    """From users' items to answers by another way: one user at a time, weights of the softmax written out."""
    home = Path(config.out, "materials", "simulated_movie_tagging")
    base, bank = open_base(home / "base"), load_bank(home / "bank-seed-3")
    results = pd.read_parquet(Path(config.out, "results.parquet")).set_index(["method", "rag", "budget"]).sort_index()
    rows = results.loc["mta", False, budget]
    encoder = Encoder()
    for user in read_users(home / "users"):
        own = rows[rows["user_id"] == user.id]
        if not len(own):
            continue
        known = replace(user, history=user.history[-3:] if budget == "3" else user.history)
        assert own["history_items"].unique().tolist() == [len(known.history)]

        # 1. the two nearest anchors
        vector = encode(encoder.embed_users([item_texts(known, 24, 64)]), bank.center)[0]
        cosines = bank.embeddings @ vector
        nearest = np.argsort(-cosines)[:2]
        weights = np.exp(cosines[nearest] / 0.1) / np.exp(cosines[nearest] / 0.1).sum()
        weights = weights.astype(np.float16)  # two bytes each are counted
        fused = fuse([bank.adapter(int(anchor)) for anchor in nearest], weights.tolist())

        # 2. the stack over them
        backbone = base.load()
        merge(backbone.model, fused)
        examples = tokenised(backbone, base.wording.history(known))
        trained = stack_users(RoutedModel(backbone), [(user.id, examples, None)], replace(FEW, seed=3)).adapters[0]
        stack = _rounded(trained)

        # 3. answers
        whole = base.load()
        merge(whole.model, fuse([fused, stack], [1.0, 1.0]))
        prompts = [example.prompt for example in base.wording.queries(user)]
        said = answer(RoutedModel(whole), prompts, max_new_tokens=base.wording.task.max_new_tokens)
        assert dict(zip([query.id for query in user.queries], said, strict=True)) == dict(
            zip(own["query_id"], own["prediction"], strict=True)
        )


def test_every_rival_answers_as_a_model_with_its_adapter_merged_into_the_weights(config) -> None:
    """By another way than mta above; what a rival is made of is written out here."""
    home = Path(config.out, "materials", "simulated_movie_tagging")
    base, bank = open_base(home / "base"), load_bank(home / "bank-seed-3")
    anchors = [bank.adapter(anchor) for anchor in range(3)]
    pooled = load_peft(home / "pooled-all-seed-3" / "adapter")
    results = pd.read_parquet(Path(config.out, "results.parquet"))
    results = results[(results["budget"] == "all") & ~results["rag"]].set_index(["user_id", "method"]).sort_index()
    encoder, drawn = Encoder(), []

    def said_by(adapter: Adapter | None, user: User) -> list[str]:
        backbone = base.load()
        if adapter is not None:
            merge(backbone.model, adapter)
        prompts = [example.prompt for example in base.wording.queries(user)]
        return answer(RoutedModel(backbone), prompts, max_new_tokens=base.wording.task.max_new_tokens)

    for user in read_users(home / "users"):
        if user.id not in results.index:
            continue
        told = results.loc[user.id]
        said = {method: dict(zip(told.loc[[method], "query_id"], told.loc[[method], "prediction"], strict=True))
                for method in METHODS if method in told.index}  # fmt: skip
        said = {method: [answers[query.id] for query in user.queries] for method, answers in said.items()}
        order = np.argsort(-(bank.embeddings @ encode(encoder.embed_users([item_texts(user, 24, 64)]), bank.center)[0]))
        backbone = base.load()
        examples = tokenised(backbone, base.wording.history(user))
        trained = stack_users(RoutedModel(backbone), [(user.id, examples, None)], replace(FEW, seed=3)).adapters[0]
        own = _rounded(trained)

        assert said["non_personalised"] == said_by(None, user)
        assert said["all_users_lora"] == said_by(pooled, user) != said["non_personalised"]
        assert said["nearest_anchor"] == said_by(anchors[order[0]], user)
        assert said["uniform_mean"] == said_by(fuse(anchors, [1 / 3] * 3), user)
        assert said["oppu"] == said["stack_only"] == said_by(own, user) != said["non_personalised"]
        pairs = [said_by(fuse(pair, [0.5, 0.5]), user) for pair in combinations(anchors, 2)]
        assert said["random_anchors"] in pairs
        drawn.append(pairs.index(said["random_anchors"]))

        # controls, and what hangs on chance or is searched for
        counts = Counter(item.target for item in user.history)
        assert {counts[label] for label in said["majority_label"]} == {max(counts.values())}
        assert set(said["nearest_item"]) <= set(counts)
        assert said["oracle"] == [query.best for query in user.queries]
    assert len(set(drawn)) > 1, "each user has anchors of its own"
    flat = results["prediction"].groupby("method").agg(list)
    assert flat["nearest_item"] != flat["majority_label"] and flat["prime"] != flat["mta_fusion"]
    assert flat["as_released"] not in (flat["mta"], flat["mta_fusion"], flat["non_personalised"])


def _cell(config: BenchmarkConfig, method: str) -> Cell:
    """Of the method with the whole history, as the benchmark has made it."""
    home = Path(config.out, "materials", "simulated_movie_tagging")
    return Cell(
        dataset="simulated_movie_tagging", recipe=recipes(config.settings)[method], rag=False, budget="all", seed=3,
        whole=True, tested=f"{home}/tested", base=f"{home}/base", bank=f"{home}/bank-seed-3", users_per_pack=16,
        inputs=(),
    )  # fmt: skip


@pytest.mark.parametrize(("method", "shelves"), [("mta", ["stack"]), ("as_released", ["merged", "stack"])])
def test_answers_are_by_what_is_left_of_an_adapter_in_the_bytes_that_are_counted(config, method, shelves) -> None:
    answerer = Answerer(config.workers)
    said = {query: answer for _, query, _, answer in answerer.run(_cell(config, method)).rows}
    results = pd.read_parquet(Path(config.out, "results.parquet"))
    results = results[(results["budget"] == "all") & (results["method"] == method) & ~results["rag"]]
    assert said == dict(zip(results["query_id"], results["prediction"], strict=True))
    for layer in answerer.asker.routed.layers.values():
        for shelf in shelves:
            for factor in (layer.shelves[shelf].down, layer.shelves[shelf].up):
                assert factor.any() and factor.equal(factor.bfloat16().float())


@pytest.mark.parametrize(
    "method", ["oppu", "prime", "mta", "mta_coefficients", "mta_learned_route", "as_released", "nearest_anchor"]
)
def test_nobody_learns_from_the_answers_that_are_asked_for(config, method) -> None:
    """Routes and adapters are the same whatever the gold answers are."""
    cell, found = _cell(config, method), []
    answerer = Answerer(config.workers)
    answerer._load(cell)
    asked = answerer.asker.answers
    golds = sorted({str(query.target) for user in answerer.subjects.users for query in user.queries})
    assert len(golds) > 1

    def noted(users, routes=None, **others):
        layers = answerer.asker.routed.layers.values()
        own = [layer.shelves[shelf].up.clone() for layer in layers for shelf in routes if shelf != "bank"]
        found.append((routes, own))
        return asked(users, routes, **others)

    answerer.asker.answers = noted
    answerer.run(cell)
    answerer.subjects = replace(
        answerer.subjects,
        users=[
            replace(user, queries=tuple(replace(query, target=golds[0], best=golds[0]) for query in user.queries))
            for user in answerer.subjects.users
        ],
    )
    answerer.run(cell)
    (before, own), (after, own_after) = found
    assert own or "bank" in before
    assert all(one.equal(other) for one, other in zip(own, own_after, strict=True))
    for shelf, routes in before.items():
        for one, other in zip(routes, after[shelf], strict=True):
            assert one.slots == other.slots and one.weights == other.weights
            assert one.weights == tuple(np.array(one.weights, np.float16).tolist())  # two bytes each are counted
            for module, each in (one.coefficients or {}).items():
                assert each.equal(other.coefficients[module]) and each.equal(each.half().float())
                assert not (each == 1).all()


@pytest.mark.parametrize("budget", ["0", "3", "all"])
def test_one_lora_for_everybody_learns_from_items_within_the_budget(config, budget) -> None:
    home = Path(config.out, "materials", "simulated_movie_tagging")
    tested = read_tested(f"{home}/tested").users
    job = PooledJob(
        users=f"{home}/users", embeddings=f"{home}/embeddings", base=f"{home}/base", bank=f"{home}/bank-seed-3",
        tested=f"{home}/tested", out="", budget=budget, context_items=None, examples_per_bank_step=1, train=FEW,
        split=config.materials.split, cpus=1, device="cpu", devices=1,
    )  # fmt: skip
    examples = pooled_examples(job, open_base(home / "base").wording, 10_000)
    most = {"0": 0, "3": 3, "all": 1000}[budget]
    own = {(user.id, item.id) for user in tested for item in user.history[-most:]} if most else set()
    met = [(example.user_id, example.item_id) for example in examples]
    names = {user.id for user in tested}
    assert {one for one in met if one[0] in names} == own
    assert len(set(met)) == len(met) > len(own)


def test_a_question_that_stands_in_another_profile_stops_the_benchmark_before_anything_is_trained(
    config, tmp_path
) -> None:
    task, records = task_named("movie_tagging"), []
    for number in range(24):
        asked = f"film {(number + 1) % 24 * 20}"  # the next one's first
        items = [
            {"id": f"{number}-{n}", "description": f"film {number * 20 + n}", "tag": "comedy"}
            for n in range(8 + number % 2 * 8)
        ]
        question = task.question.format(content=asked, labels=", ".join(task.labels))
        query = [{"id": f"q{number}", "input": question, "gold": "comedy"}]
        records.append({"user_id": f"u{number}", "profile": items, "query": query})
    (tmp_path / "films.json").write_text(json.dumps(records))
    files = (f"films=movie_tagging:{tmp_path / 'films.json'}",)
    with pytest.raises(ValueError, match="of 5 questions [1-5] leak"):
        benchmark(replace(config, out=str(tmp_path / "out"), simulated=(), files=files))
    made = {path.name for path in (tmp_path / "out" / "materials" / "films").iterdir()}
    assert not {name for name in made if name.startswith(("base", "bank"))}


def test_only_missing_cells_are_made_again_and_the_results_are_the_same_to_the_byte(config) -> None:
    home = Path(config.out)
    before = hashlib.sha256((home / "results.parquet").read_bytes()).hexdigest()
    made = {path: path.stat().st_mtime_ns for path in home.rglob("*") if path.parent.name == "cells"}
    manifests = {path: path.stat().st_mtime_ns for path in home.rglob("manifest.json")}
    lost = sorted(path for path in made if path.suffix == ".json")[::4]  # as if stopped before they were written
    for path in (*lost, home / "results.parquet"):
        path.unlink()

    benchmark(config)
    assert hashlib.sha256((home / "results.parquet").read_bytes()).hexdigest() == before
    again = {path for path in made if path.stat().st_mtime_ns != made[path]}
    assert again == {path.with_suffix(ending) for path in lost for ending in (".json", ".parquet")}
    assert {path: path.stat().st_mtime_ns for path in manifests} == manifests


def test_a_report_can_be_made_anywhere_of_the_results_alone(config, tmp_path) -> None:
    for name in ("results.parquet", "costs.parquet", "facts.json"):
        (tmp_path / name).write_bytes(Path(config.out, name).read_bytes())
    benchmark(BenchmarkConfig(out=str(tmp_path), report_only=True))
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert (tmp_path / "report.json").read_bytes() == Path(config.out, "report.json").read_bytes()
    (tmp_path / "costs.parquet").write_bytes(Path(config.out, "results.parquet").read_bytes())
    with pytest.raises(ValueError, match="belongs to other results.parquet and costs.parquet"):
        benchmark(BenchmarkConfig(out=str(tmp_path), report_only=True))
    with pytest.raises(ValueError, match="no finished benchmark"):
        benchmark(BenchmarkConfig(out=str(tmp_path / "nothing"), report_only=True))


def _rounded(adapter: Adapter) -> Adapter:
    """To the two bytes a number that keeping it is counted with."""
    held = {
        module: Factors(down=factors.down.bfloat16().float(), up=factors.up.bfloat16().float())
        for module, factors in adapter.factors.items()
    }
    return Adapter(factors=held, scale=adapter.scale)
