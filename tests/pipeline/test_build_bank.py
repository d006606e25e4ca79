"""Stages on a real local Ray: a bank interrupted between its adapters goes on and equals the undisturbed one."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel

from mta_ray.artifacts import copy_artifact, open_artifact
from mta_ray.benchmarks.small_world import WORLD
from mta_ray.cli import message_of
from mta_ray.errors import root_cause
from mta_ray.lora.bank import load_bank
from mta_ray.model.backbone import RoutedModel
from mta_ray.personalize.base_model import open_base, tokenised
from mta_ray.personalize.lanes import Job
from mta_ray.personalize.merge_then_adapt import BANK, stack_users
from mta_ray.personalize.train_config import TrainConfig
from mta_ray.personalize.training import train_pack
from mta_ray.pipeline.actors import ActorConfig
from mta_ray.pipeline.adapt_users import AdaptUsersConfig, adapt_users, packs_of, read_states
from mta_ray.pipeline.bank.files import AdapterFiles
from mta_ray.pipeline.build_bank import BuildBankConfig, build_bank
from mta_ray.pipeline.embed_users import EmbedUsersConfig, embed_users, read_embeddings
from mta_ray.pipeline.group import GroupConfig
from mta_ray.pipeline.prepare_users import read_users
from mta_ray.pipeline.split import SplitConfig, split_users
from mta_ray.pipeline.train_base import TrainBaseConfig, train_base
from mta_ray.population.people import simulate_user
from mta_ray.population.synthesize import SimulateUsersConfig, simulate_users


def _bank_config(home: Path, out: str) -> BuildBankConfig:
    return BuildBankConfig(
        users=str(home / "users"),
        embeddings=str(home / "embeddings"),
        base=str(home / "base"),
        out=str(home / out),
        anchors=2,
        adapters_per_pack=1,
        checkpoint_every_s=1e-3,
        train=TrainConfig(rank=2, alpha=4.0, steps=2, examples_per_step=2, learning_rate=1e-2),
        group=GroupConfig(cpus_per_worker=1),
    )


def difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative, over the whole tensor: Adam makes steps of full size out of single gradients that are near zero."""
    return float((got - wanted).norm() / wanted.norm())


def test_simulated_users_by_ray_data_equal_the_pure_function(taught):
    found = {user.id: user for user in read_users(taught / "users")}
    assert found == {(u := simulate_user(WORLD, n)).id: u for n in range(30)}
    assert list(found) == [simulate_user(WORLD, n).id for n in range(30)]
    assert open_artifact(taught / "users", kind="users").files == ("users-000000.parquet",)  # nothing random in it


def test_embeddings_cover_every_user_in_order(taught):
    table = read_embeddings(taught / "embeddings")
    assert table.user_ids == sorted(user.id for user in read_users(taught / "users"))
    assert table.means.shape == (30, 384)
    (file,) = open_artifact(taught / "embeddings", kind="embeddings").files
    assert file == "embeddings-0.parquet"
    written = pq.read_table(taught / "embeddings" / file)["user_id"].to_pylist()
    assert written == [user.id for user in read_users(taught / "users")]  # not in the order in which batches end
    assert table.queries == [2] * 30


@pytest.fixture(scope="module")
def spared(taught) -> Path:
    """What lies beside a bank whose run was stopped when all adapters were there and the bank was not."""

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(taught)  # paths from where the command was given; the workers stand elsewhere
        patch.setattr("mta_ray.pipeline.build_bank.save_bank", stop)
        with pytest.raises(KeyboardInterrupt):
            build_bank(_bank_config(Path("."), "whole"))
    assert not (taught / "whole").exists()
    return Path(shutil.copytree(taught / "whole.adapters", taught / "spared"))


@pytest.fixture(scope="module")
def whole(taught, spared) -> str:
    """The bank that comes of it when it is run again."""
    return build_bank(_bank_config(taught, "whole"))


def test_a_bank_is_one_adapter_for_each_anchor_trained_on_the_anchors_own_items(taught, whole):
    assert whole == str(taught / "whole")
    assert not (taught / "whole.adapters").exists()

    config = _bank_config(taught, "whole")
    bank, base = load_bank(whole), open_base(taught / "base")
    table = read_embeddings(taught / "embeddings")
    split = split_users(table.user_ids, table.items, table.queries, config.split)
    assert set(bank.anchor_ids) <= {table.user_ids[row] for row in split.teachers}
    users = {user.id: user for user in read_users(taught / "users")}
    routed = RoutedModel(base.load(), base.targets)
    for anchor, user_id in enumerate(bank.anchor_ids):  # alone, in plain torch
        job = Job(id=user_id, examples=tokenised(routed.backbone, base.wording.history(users[user_id])))
        alone = train_pack(routed, [job], config.train).adapters[0]
        for module, factors in alone.factors.items():
            assert difference(bank.adapter(anchor).factors[module].up, factors.up) < 0.01


def test_a_run_that_finds_a_finished_adapter_damaged_trains_that_one_alone(taught, whole, spared, caplog):
    (kept,) = Path(shutil.copytree(spared, taught / "damaged.adapters")).iterdir()
    found = sorted(path.name for path in kept.iterdir())
    assert found == ["00000", "00001", "histories"]  # and no checkpoint of what is finished
    open_artifact(kept / "00000", kind="adapter")  # whole, and readable by itself
    file = kept / "00001" / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with caplog.at_level(logging.INFO):
        build_bank(_bank_config(taught, "damaged"))
    assert "1 of 2 adapters are there already" in caplog.text
    one, other = load_bank(whole), load_bank(taught / "damaged")
    assert one.anchor_ids == other.anchor_ids
    for module in one.up:
        torch.testing.assert_close(one.up[module], other.up[module])
        assert one.up[module].any()


def test_a_forced_bank_that_was_stopped_keeps_what_is_finished_and_once_done_begins_anew(taught, whole, spared):
    config = replace(_bank_config(taught, "forced"), force=True)
    shutil.copytree(whole, config.out)
    shutil.copytree(spared, f"{config.out}.adapters")  # what the plain command finished is not for this one
    first = _files_of_a_stopped_run(config)
    (kept,) = spared.iterdir()
    plain = AdapterFiles(root=str(spared), key=open_artifact(kept / "00000", kind="adapter").settings["key"])
    for number in range(2):
        first.publish(number, *plain.read(number))
    assert _files_of_a_stopped_run(config) == first and first.finished(2) == {0, 1}

    before = (Path(config.out) / "manifest.json").stat().st_ino
    build_bank(config)  # all are finished
    assert (Path(config.out) / "manifest.json").stat().st_ino != before
    assert load_bank(config.out).anchor_ids == load_bank(whole).anchor_ids
    assert not Path(first.folder).exists()
    assert _files_of_a_stopped_run(config).key != first.key


def _files_of_a_stopped_run(config: BuildBankConfig) -> AdapterFiles:
    """Where a run that is stopped before it trains anything would have put its adapters."""
    seen: list[AdapterFiles] = []

    def stop(_: object, files: AdapterFiles, *__: object) -> None:
        seen.append(files)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("mta_ray.pipeline.build_bank._train_missing", stop)
        build_bank(config)
    return seen[0]


def test_what_is_no_bank_is_not_replaced_and_nothing_is_trained_before_that_is_said(taught):
    (taught / "mine").mkdir()
    (taught / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="mine"):
        build_bank(_bank_config(taught, "mine"))
    assert (taught / "mine" / "notes.txt").read_text() == "mine"
    assert not (taught / "mine.adapters").exists()


def test_artifacts_that_do_not_belong_together_are_refused(taught, whole, tmp_path):
    others = simulate_users(SimulateUsersConfig(world=replace(WORLD, seed=3), users=30, out=str(tmp_path / "users")))
    reads = {"users": others, "embeddings": str(taught / "embeddings")}
    with pytest.raises(ValueError, match="embeddings of other users"):
        train_base(TrainBaseConfig(**reads, mode="none", out=str(tmp_path / "base")))
    with pytest.raises(ValueError, match="embeddings of other users"):
        build_bank(replace(_bank_config(taught, "none"), users=others))
    with pytest.raises(ValueError, match="embeddings of other users"):
        adapt_users(AdaptUsersConfig(**reads, base=str(taught / "base"), bank=whole))


def test_states_hold_a_route_and_a_stack_for_each_tested_user(taught, whole):
    split, stacks = (
        SplitConfig(max_few_shot=3, max_rest=1),
        TrainConfig(rank=1, alpha=2.0, steps=2, examples_per_step=2, learning_rate=1e-2),
    )
    out = adapt_users(
        AdaptUsersConfig(
            users=str(taught / "users"),
            embeddings=str(taught / "embeddings"),
            base=str(taught / "base"),
            bank=whole,
            out=str(taught / "states"),
            stack=stacks,
            split=split,
        )
    )
    table = read_embeddings(taught / "embeddings")
    tested = {table.user_ids[r] for r in split_users(table.user_ids, table.items, table.queries, split).tested}
    states = read_states(out, tested)
    assert set(states) == tested
    base = open_base(taught / "base")
    routed, anchors = base.load_routed(whole)
    users = {user.id: user for user in read_users(taught / "users")}
    for state in states.values():
        # the route by hand: softmax over the cosines of the two anchors
        mean = table.means[table.user_ids.index(state.user_id)] - anchors.center
        cosines = anchors.embeddings[list(state.route.slots)] @ (mean / np.linalg.norm(mean))
        weights = np.exp(cosines / 0.1) / np.exp(cosines / 0.1).sum()
        assert state.route.weights == pytest.approx(tuple(weights), abs=1e-4)
        assert cosines[0] >= cosines[1]
        # the stack: trained alone, above that route
        examples = tokenised(routed.backbone, base.wording.history(users[state.user_id]))
        alone = stack_users(routed, [(state.user_id, examples, {BANK: state.route})], stacks).adapters[0]
        for module, factors in alone.factors.items():
            assert difference(state.stack.factors[module].up, factors.up) < 0.01
        assert sum(state.route.weights) == pytest.approx(1, abs=1e-5)
        assert state.stack.rank == 1
        assert any(f.up.any() for f in state.stack.factors.values())
        # 12 modules of 384 × 384, rank 1, 2 bytes a number; 2 anchors at 4 bytes each; names and shapes.
        factors = 12 * 2 * 384 * 2
        assert factors + 8 < state.bytes < 1.2 * factors


@pytest.mark.parametrize(("users", "sizes"), [(30, [7, 8, 7, 8]), (16, [8, 8]), (1, [1]), (17, [4, 4, 4, 5]), (0, [])])
def test_packs_are_even_and_every_actor_has_as_many(users, sizes):
    people = [simulate_user(WORLD, number) for number in range(users)]
    packs = packs_of(people, [user.id for user in people], ActorConfig(actors=2, users_per_pack=8))
    assert [len(pack) for pack in packs] == sizes
    lengths = [len(user.history) for pack in packs for user in pack]
    assert lengths == sorted(len(user.history) for user in people)
    assert packs_of(people, [], ActorConfig()) == []


def test_a_bank_of_another_base_is_refused(taught, whole):
    other = taught / "other-base"
    config = TrainBaseConfig(users=str(taught / "users"), embeddings=str(taught / "embeddings"), mode="none")
    train_base(replace(config, dtype="bfloat16", out=str(other)))
    with pytest.raises(ValueError, match="was made with base model"):
        open_base(other).load_routed(whole)
    with pytest.raises(ValueError, match="is not the one that"):
        replace(open_base(other), fingerprint="0" * 64).load()


def test_a_task_adapter_is_merged_into_the_base_that_later_stages_load(taught):
    reads = {"users": str(taught / "users"), "embeddings": str(taught / "embeddings")}
    train = TrainConfig(rank=2, alpha=4.0, steps=2, examples_per_step=2, learning_rate=1e-2)
    config = TrainBaseConfig(**reads, mode="adapter", train=train, rag_share=0.0, out=str(taught / "adapted"))
    base = open_base(train_base(config))
    plain, adapted = open_base(taught / "base").load().model, base.load().model
    peft = PeftModel.from_pretrained(plain, taught / "adapted" / "adapter").merge_and_unload()
    for (name, weight), wanted in zip(adapted.state_dict().items(), peft.state_dict().values(), strict=True):
        torch.testing.assert_close(weight, wanted, msg=name)
    assert base.fingerprint != open_base(taught / "base").fingerprint


def test_tested_users_never_teach_and_the_line_is_the_same_in_any_order():
    ids, items, queries = [f"u{n}" for n in range(200)], [n % 40 for n in range(200)], [1] * 200
    config = SplitConfig(test_share=0.3, max_few_shot=20, max_rest=10)
    split = split_users(ids, items, queries, config)
    assert not set(split.teachers) & set(split.tested)
    assert all(items[row] > 10 for row in split.teachers)
    assert sum(0 < items[row] <= 10 for row in split.tested) == 20
    turned = split_users(ids[::-1], items[::-1], queries, config)
    assert {ids[r] for r in split.tested} == {ids[::-1][r] for r in turned.tested}


def test_users_in_a_store_are_read_where_they_lie(taught, s3, tmp_path):
    """In a process of its own, whose Ray knows the way to the store; nothing is fetched to the cache."""
    copy_artifact(str(taught / "users"), f"{s3}/users", kind="users")
    code = (
        "import sys; from mta_ray.cluster import ClusterConfig, connect; "
        "from mta_ray.pipeline.bank.histories import collect_histories, open_histories, read_history\n"
        "with connect(ClusterConfig(cpus=1)):\n"
        "    collect_histories(sys.argv[1], sys.argv[3:], sys.argv[2], inputs={})\n"
        "    try: collect_histories(sys.argv[1], ['nobody'], sys.argv[2] + '-not', inputs={})\n"
        "    except ValueError as error: print(error, file=sys.stderr)\n"
        "print([read_history(open_histories(sys.argv[2]), n).id for n in range(2)])"
    )
    ids = sorted(user.id for user in read_users(taught / "users"))[5:7]
    args = [sys.executable, "-c", code, f"{s3}/users", str(tmp_path / "histories"), *ids]
    done = subprocess.run(args, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(ids), done.stderr
    assert not any(Path(os.environ["MTA_CACHE"]).glob("*"))
    assert "1 of 1 anchors are not among the users" in done.stderr


def test_another_model_in_the_same_folder_is_another_base(taught, tiny_model, tmp_path):
    """Nothing is trained, so that nothing but the model tells the two apart."""
    config = TrainBaseConfig(
        users=str(taught / "users"), embeddings=str(taught / "embeddings"), mode="none",
        base_model=str(tmp_path / "model"), out=str(tmp_path / "base"),
    )  # fmt: skip
    seen = []
    for seed in (0, 0, 1):
        backbone = tiny_model(seed)
        backbone.model.save_pretrained(tmp_path / "model")
        backbone.tokenizer.save_pretrained(tmp_path / "model")
        train_base(config)
        base = open_base(config.out)
        base.load()  # it is the one that lies there
        seen.append((base.hash, (tmp_path / "base" / "manifest.json").stat().st_ino))
    assert seen[0] == seen[1] and seen[0][0] != seen[2][0]


def test_a_split_that_may_test_who_has_taught_is_refused(taught, whole):
    other = SplitConfig(seed=7)
    config = AdaptUsersConfig(
        users=str(taught / "users"), embeddings=str(taught / "embeddings"), base=str(taught / "base"), bank=whole,
        split=other, out=str(taught / "other"),
    )  # fmt: skip
    with pytest.raises(ValueError, match="the bank was made with split.seed 0, not 7"):
        adapt_users(config)


def test_an_encoder_that_is_none_is_told_as_it_was_raised(taught, tmp_path):
    config = EmbedUsersConfig(users=str(taught / "users"), encoder=str(tmp_path), out=str(tmp_path / "embeddings"))
    with pytest.raises(Exception) as error:
        embed_users(config)
    cause = root_cause(error.value)
    assert isinstance(cause, ValueError) and "no sentence encoder could be loaded from" in str(cause)
    assert "Traceback" not in message_of(cause)
