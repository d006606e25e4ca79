"""Real processes, killed for real: nothing finished is trained again, and the bank is that of an undisturbed run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import fsspec
import psutil
import pytest
import torch
from free_cpus import free_cpus
from transformers import AutoModelForCausalLM, AutoTokenizer

from mta_ray.lora.bank import Bank, assemble, load_bank
from mta_ray.model.backbone import RoutedModel, embedded_path
from mta_ray.personalize.base_model import open_base, tokenised
from mta_ray.personalize.lanes import Job as TrainJob
from mta_ray.personalize.train_config import TrainConfig
from mta_ray.personalize.training import train_pack
from mta_ray.pipeline.build_bank import BuildBankConfig, build_bank, pick_anchors
from mta_ray.pipeline.embed_users import read_embeddings
from mta_ray.pipeline.group import GroupConfig
from mta_ray.pipeline.prepare_users import read_users
from mta_ray.pipeline.train_base import TrainBaseConfig, train_base

TRAIN = TrainConfig(rank=2, alpha=4.0, steps=70, examples_per_step=2, learning_rate=1e-3)
ANCHORS = 3
DEADLINE_S = 1200
"""For each thing that is waited for: Ray's processes give way to all others, and start slowly on a busy machine."""


def settings(home: Path, out: str) -> BuildBankConfig:
    return BuildBankConfig(
        users=str(home / "users"),
        embeddings=str(home / "embeddings"),
        base=str(home / "base"),
        out=out,
        anchors=ANCHORS,
        adapters_per_pack=2,
        checkpoint_every_s=0.5,
        train=TRAIN,
        group=GroupConfig(cpus_per_worker=1),
    )


@pytest.fixture(scope="module")
def undisturbed(taught: Path) -> Bank:
    """What each of these runs must come to, in plain torch and one process."""
    base, table = open_base(taught / "base"), read_embeddings(taught / "embeddings")
    center, vectors, anchors = pick_anchors(table, settings(taught, ""))
    ids = tuple(table.user_ids[row] for row in anchors)
    users = {user.id: user for user in read_users(taught / "users")}
    routed = RoutedModel(base.load(), base.targets)
    jobs = [TrainJob(id=id_, examples=tokenised(routed.backbone, base.wording.history(users[id_]))) for id_ in ids]
    return assemble(
        train_pack(routed, jobs, TRAIN).adapters,
        anchor_ids=ids,
        embeddings=vectors[anchors],
        center=center,
        base_fingerprint=base.fingerprint,
        encoder=table.encoder,
    )


def assert_equal(got: Bank, wanted: Bank) -> None:
    """To a twentieth: who shares a pack decides how sums are rounded, and many steps of Adam make that larger.

    That a stopped adapter goes on exactly is test_lanes.py's.
    """
    assert got.anchor_ids == wanted.anchor_ids
    for module in wanted.up:
        for one, other in ((got.up[module], wanted.up[module]), (got.down[module], wanted.down[module])):
            assert other.any() and (one - other).norm() <= 0.05 * other.norm()


def test_a_bank_in_an_object_store_survives_its_driver_and_its_workers(
    taught: Path, undisturbed: Bank, s3: str, tmp_path: Path
) -> None:
    with closing(Job(taught, f"{s3}/bank", tmp_path / "log")) as job:
        kill_and_compare(job, undisturbed)


def kill_and_compare(job: Job, undisturbed: Bank) -> None:
    # 1. the driver dies: nothing that looks like a bank is there, and what was on its way is
    job.start()
    job.wait_for(lambda: job.steps())
    job.kill()
    before = job.steps()
    assert before and not job.store.exists(f"{job.root}/manifest.json")

    # 2. the same command again; a worker is asked to go, and then one is killed
    job.start()
    job.wait_for(lambda: sum(job.steps().values()) > sum(before.values()))
    asked = job.worker()
    asked.send_signal(signal.SIGTERM)
    job.wait_for(lambda: not asked.is_running())
    reached = job.reached()
    job.wait_for(lambda: job.workers() and job.reached() > reached)
    assert "starts again" not in job.told()  # a group that was asked to go has not died
    job.worker().kill()
    job.wait_for_the_end()

    # 3. one bank, and what was finished when a worker died was written once
    assert "starts again" in job.told()
    assert_equal(load_bank(job.out), undisturbed)
    assert not job.store.exists(f"{job.root}.adapters")


class Job:
    """`mta build-bank` with a Ray cluster of its own, and what it leaves in the store."""

    def __init__(self, home: Path, out: str, log: Path) -> None:
        self.home, self.out, self.log = home, out, log
        self.store, self.root = fsspec.core.url_to_fs(out)
        self.written: dict[str, str] = {}
        """Finished adapter to when it was written."""

    def start(self) -> None:
        config = settings(self.home, self.out)
        args = ["--users", config.users, "--embeddings", config.embeddings, "--base", config.base, "--out", self.out]
        args += ["--anchors", str(ANCHORS), "--adapters-per-pack", "2", "--checkpoint-every-s", "0.5"]
        args += ["--group.cpus-per-worker", "1", "--cluster.cpus", "2", "--train.rank", "2", "--train.alpha", "4.0"]
        args += ["--train.steps", str(TRAIN.steps), "--train.examples-per-step", "2", "--train.learning-rate", "1e-3"]
        with open(self.log, "a") as log:
            command = [sys.executable, "-m", "mta_ray.cli", "build-bank", *args]
            self.process = subprocess.Popen(command, stderr=log, stdout=log, env=os.environ)

    def kill(self) -> None:
        """The driver, at once; its workers follow. (Ray's agents would stay for minutes.)"""
        cluster, workers = psutil.Process(self.process.pid).children(recursive=True), self.workers()
        self.process.kill()
        self.process.wait()
        assert not psutil.wait_procs(workers, timeout=300)[1]
        for process in cluster:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def close(self) -> None:
        """Whatever happened: nothing of it runs on."""
        if self.process.poll() is None:
            self.kill()

    def told(self) -> str:
        return self.log.read_text()

    def wait_for(self, happened: Callable[[], object]) -> None:
        deadline_s = time.monotonic() + DEADLINE_S
        while not happened():
            self.finished()
            assert self.process.poll() is None and time.monotonic() < deadline_s, self.told()
            time.sleep(0.2)

    def wait_for_the_end(self) -> None:
        deadline_s = time.monotonic() + DEADLINE_S
        while self.process.poll() is None and time.monotonic() < deadline_s:
            self.finished()
            time.sleep(0.2)
        assert self.process.returncode == 0, self.told()

    def steps(self) -> dict[str, int]:
        """Adapter to the steps of its checkpoint, as its manifest says."""
        return {
            name.removesuffix(".checkpoint"): facts["steps"]
            for name, (facts, _) in self._manifests().items()
            if name.endswith(".checkpoint")
        }

    def finished(self) -> dict[str, str]:
        found = {name: when for name, (_, when) in self._manifests().items() if name.isdigit()}
        self.written |= {name: when for name, when in found.items() if name not in self.written}
        assert all(self.written[name] == when for name, when in found.items()), "an adapter was trained twice"
        return found

    def reached(self) -> int:
        """Steps of all adapters that are kept."""
        return sum(self.steps().values()) + TRAIN.steps * len(self.finished())

    def worker(self) -> psutil.Process:
        return self.workers()[0]

    def workers(self) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if "ray::RayTrainWorker" in " ".join(_command(child))]

    def _manifests(self) -> dict[str, tuple[dict, str]]:
        self.store.invalidate_cache()
        found = {}
        for path in self.store.glob(f"{self.root}.adapters/*/*/manifest.json"):
            try:
                manifest = json.loads(self.store.cat_file(path))
            except FileNotFoundError:  # gone in this moment
                continue
            found[path.split("/")[-2]] = (manifest["facts"], manifest["created_at"])
        return found


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.fixture(scope="module")
def poisoned(taught: Path, undisturbed: Bank, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, int]:
    """A base model with poison beyond a position that a single anchor's examples reach; that anchor's number."""
    home = tmp_path_factory.mktemp("poisoned")
    base = open_base(taught / "base")
    backbone = base.load()
    users = {user.id: user for user in read_users(taught / "users")}
    lengths = [
        max(len(row.ids) for row in tokenised(backbone, base.wording.history(users[anchor])))
        for anchor in undisturbed.anchor_ids
    ]
    bad = lengths.index(max(lengths))
    reached = max(length for number, length in enumerate(lengths) if number != bad)
    assert reached < lengths[bad]
    model = AutoModelForCausalLM.from_pretrained(embedded_path(), is_decoder=True)
    model.load_state_dict(backbone.model.state_dict())
    with torch.no_grad():
        model.bert.embeddings.position_embeddings.weight[reached:] = float("nan")
    model.save_pretrained(home / "model")
    AutoTokenizer.from_pretrained(embedded_path()).save_pretrained(home / "model")
    reads = {"users": str(taught / "users"), "embeddings": str(taught / "embeddings")}
    config = TrainBaseConfig(**reads, base_model=str(home / "model"), mode="none", out=str(home / "base"))
    return train_base(config), bad


def test_neither_a_killed_controller_nor_an_adapter_that_is_not_finite_changes_the_others(
    taught: Path, undisturbed: Bank, poisoned: tuple[str, int], tmp_path: Path
) -> None:
    """Two CPUs are all there are, and each of two groups wants both: nobody could go on if the dead one's were still
    set apart, and who has none in the end must hold none."""
    base, bad = poisoned
    kept, killed = tmp_path / "bank.adapters", []

    def kill() -> None:
        while not list(kept.glob("*/*checkpoint*")) and not list(kept.glob("*/0000?")):
            time.sleep(0.05)
        for process in psutil.Process().children(recursive=True):
            if "TrainController" in " ".join(_command(process)):
                process.kill()
                killed.append(process.pid)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    config = replace(settings(taught, str(tmp_path / "bank")), base=base, groups=2)
    bank = load_bank(build_bank(replace(config, group=GroupConfig(cpus_per_worker=2))))
    killer.join(timeout=5)
    assert killed
    assert free_cpus() == 2

    others = [number for number in range(ANCHORS) if number != bad]
    assert bank.anchor_ids == tuple(undisturbed.anchor_ids[number] for number in others)
    assert list(bank.facts["failed"]) == [str(bad)] and "not finite" in bank.facts["failed"][str(bad)]
    for module in bank.up:
        for place, anchor in enumerate(others):
            for one, other in (
                (bank.up[module][place], undisturbed.up[module][anchor]),
                (bank.down[module][place], undisturbed.down[module][anchor]),
            ):
                assert other.any() and (one - other).norm() <= 0.05 * other.norm()
