"""Groups on a real cluster without a dashboard: what was set apart for them is free when they are gone."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import psutil
import ray
import torch

from mta_ray.lora.bank import load_bank
from mta_ray.personalize.train_config import TrainConfig
from mta_ray.pipeline.build_bank import BuildBankConfig, build_bank
from mta_ray.pipeline.group import GroupConfig

FREE_S = 90.0
"""Ray Train looks for devices for a minute before it hears that it need not."""


def _config(home: Path, out: str, *, groups: int, cpus: int, steps: int) -> BuildBankConfig:
    return BuildBankConfig(
        users=str(home / "users"),
        embeddings=str(home / "embeddings"),
        base=str(home / "base"),
        out=str(home / out),
        anchors=2,
        adapters_per_pack=1,
        groups=groups,
        checkpoint_every_s=0.5,
        train=TrainConfig(rank=2, alpha=4.0, steps=steps, examples_per_step=2, learning_rate=1e-3),
        group=GroupConfig(cpus_per_worker=cpus),
    )


def _free_cpus() -> float:
    deadline_s = time.monotonic() + FREE_S
    while (free := ray.available_resources().get("CPU", 0)) < 2 and time.monotonic() < deadline_s:
        time.sleep(0.5)
    return free


def test_a_group_that_never_had_devices_holds_none_in_the_end(taught: Path) -> None:
    build_bank(_config(taught, "two-groups", groups=2, cpus=2, steps=2))
    assert len(load_bank(taught / "two-groups")) == 2
    assert _free_cpus() == 2


def test_a_group_whose_controller_is_killed_starts_again_in_the_same_place(taught: Path) -> None:
    """One CPU is all there is for it: it could not start if the dead one's were still set apart."""
    whole = load_bank(build_bank(_config(taught, "undisturbed", groups=1, cpus=2, steps=40)))
    killed: list[int] = []

    def kill() -> None:
        kept = taught / "disturbed.adapters"
        while not list(kept.glob("*checkpoint*")) and not list(kept.glob("0000?")):
            time.sleep(0.05)
        for process in psutil.Process().children(recursive=True):
            if "TrainController" in process.name() or "TrainController" in " ".join(process.cmdline()):
                os.kill(process.pid, signal.SIGKILL)
                killed.append(process.pid)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    bank = load_bank(build_bank(_config(taught, "disturbed", groups=1, cpus=2, steps=40)))
    killer.join(timeout=5)
    assert killed
    for module, up in whole.up.items():
        torch.testing.assert_close(bank.up[module], up, rtol=1e-4, atol=1e-6)
    assert _free_cpus() == 2
