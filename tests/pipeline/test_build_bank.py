"""Stages on a real local Ray: a bank interrupted between its packs goes on and equals the undisturbed one; errors."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mta_ray.artifacts import open_artifact
from mta_ray.lora.bank import load_bank
from mta_ray.personalize.base_model import open_base
from mta_ray.personalize.training import TrainConfig
from mta_ray.pipeline.adapt_users import ActorConfig, AdaptUsersConfig, adapt_users, packs_of, read_states
from mta_ray.pipeline.build_bank import BuildBankConfig, build_bank
from mta_ray.pipeline.embed_users import EmbedUsersConfig, embed_users, read_embeddings
from mta_ray.pipeline.group import GroupConfig
from mta_ray.pipeline.prepare_users import read_users
from mta_ray.pipeline.split import SplitConfig, split_users
from mta_ray.pipeline.train_base import TrainBaseConfig, train_base
from mta_ray.population.people import WorldConfig, simulate_user
from mta_ray.population.synthesize import SimulateUsersConfig, simulate_users

WORLD = WorldConfig(seed=2, queries=2, max_items=15)


@pytest.fixture(scope="module")
def taught(ray_local, tmp_path_factory) -> Path:
    """A folder with users, embeddings and an untaught base."""
    home = tmp_path_factory.mktemp("run")
    simulate_users(SimulateUsersConfig(world=WORLD, users=30, out=str(home / "users")))
    embed_users(EmbedUsersConfig(users=str(home / "users"), out=str(home / "embeddings"), actors=1))
    reads = {"users": str(home / "users"), "embeddings": str(home / "embeddings")}
    train_base(TrainBaseConfig(**reads, mode="none", out=str(home / "base")))
    return home


def _bank_config(home: Path, out: str) -> BuildBankConfig:
    return BuildBankConfig(
        users=str(home / "users"),
        embeddings=str(home / "embeddings"),
        base=str(home / "base"),
        out=str(home / out),
        anchors=2,
        adapters_per_pack=1,
        train=TrainConfig(rank=2, alpha=4.0, steps=2, examples_per_step=2, learning_rate=1e-2),
        group=GroupConfig(cpus_per_worker=1),
    )


def test_simulated_users_by_ray_data_equal_the_pure_function(taught):
    found = {user.id: user for user in read_users(taught / "users")}
    assert found == {(u := simulate_user(WORLD, n)).id: u for n in range(30)}


def test_embeddings_cover_every_user_in_order(taught):
    table = read_embeddings(taught / "embeddings")
    assert table.user_ids == sorted(user.id for user in read_users(taught / "users"))
    assert table.means.shape == (30, 384)
    assert table.queries == [2] * 30


def test_an_interrupted_bank_goes_on_and_equals_the_undisturbed_one(taught, caplog, monkeypatch):
    monkeypatch.chdir(taught)  # paths from where the command was given; the workers stand elsewhere
    whole = build_bank(_bank_config(Path("."), "whole"))
    assert whole == str(taught / "whole")

    # Something that is no bank stands where the bank should go: all packs are trained, then publishing is refused.
    config = _bank_config(taught, "stopped")
    (taught / "stopped").mkdir()
    (taught / "stopped" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="stopped"):
        build_bank(config)
    packs = sorted((taught / "stopped.packs").iterdir())
    assert len(packs) == 2
    assert (taught / "stopped" / "notes.txt").read_text() == "mine"

    # One pack is lost; the rerun trains that one alone.
    shutil.rmtree(taught / "stopped")
    open_artifact(packs[0], kind="pack")  # whole, and readable by itself
    shutil.rmtree(packs[1])
    with caplog.at_level(logging.INFO):
        build_bank(config)
    assert "1 of 2 packs are there already" in caplog.text
    one, other = load_bank(whole), load_bank(taught / "stopped")
    assert one.anchor_ids == other.anchor_ids
    for module in one.up:
        torch.testing.assert_close(one.up[module], other.up[module])
        assert one.up[module].any()


def test_states_hold_a_route_and_a_stack_for_each_tested_user(taught):
    bank = build_bank(_bank_config(taught, "whole"))  # rests where the test before has built it
    split = SplitConfig(max_few_shot=3, max_rest=1)
    out = adapt_users(
        AdaptUsersConfig(
            users=str(taught / "users"),
            embeddings=str(taught / "embeddings"),
            base=str(taught / "base"),
            bank=str(bank),
            out=str(taught / "states"),
            stack=TrainConfig(rank=1, alpha=2.0, steps=2, examples_per_step=2),
            split=split,
        )
    )
    table = read_embeddings(taught / "embeddings")
    tested = {table.user_ids[r] for r in split_users(table.user_ids, table.items, table.queries, split).tested}
    states = read_states(out, tested)
    assert set(states) == tested
    for state in states.values():
        assert sum(state.route.weights) == pytest.approx(1, abs=1e-5)
        assert state.stack.rank == 1
        assert any(f.up.any() for f in state.stack.factors.values())
        # 12 modules of 384 × 384, rank 1, 2 bytes a number; 2 anchors at 4 bytes each.
        assert state.bytes == 12 * 2 * 384 * 2 + 8


@pytest.mark.parametrize(("users", "sizes"), [(30, [7, 8, 7, 8]), (16, [8, 8]), (1, [1]), (17, [4, 4, 4, 5]), (0, [])])
def test_packs_are_even_and_every_actor_has_as_many(users, sizes):
    people = [simulate_user(WORLD, number) for number in range(users)]
    packs = packs_of(people, [user.id for user in people], ActorConfig(actors=2, users_per_pack=8))
    assert [len(pack) for pack in packs] == sizes
    lengths = [len(user.history) for pack in packs for user in pack]
    assert lengths == sorted(len(user.history) for user in people)
    assert packs_of(people, [], ActorConfig()) == []


def test_a_bank_of_another_base_is_refused(taught):
    bank = build_bank(_bank_config(taught, "whole"))
    other = taught / "other-base"
    config = TrainBaseConfig(users=str(taught / "users"), embeddings=str(taught / "embeddings"), mode="none")
    train_base(replace(config, dtype="bfloat16", out=str(other)))
    with pytest.raises(ValueError, match="was made with base model"):
        open_base(other).load_routed(bank)


def test_tested_users_never_teach_and_the_line_is_the_same_in_any_order():
    ids, items, queries = [f"u{n}" for n in range(200)], [n % 40 for n in range(200)], [1] * 200
    config = SplitConfig(test_share=0.3, max_few_shot=20, max_rest=10)
    split = split_users(ids, items, queries, config)
    assert not set(split.teachers) & set(split.tested)
    assert all(items[row] > 10 for row in split.teachers)
    assert sum(0 < items[row] <= 10 for row in split.tested) == 20
    turned = split_users(ids[::-1], items[::-1], queries, config)
    assert {ids[r] for r in split.tested} == {ids[::-1][r] for r in turned.tested}
