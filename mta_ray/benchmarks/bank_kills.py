"""Processes of one bank's training are killed again and again: is a finished adapter lost, or trained once more?

    python -m mta_ray.benchmarks.bank_kills --json FILE

One command, `mta build-bank`, with two groups on a cluster of its own. A killer takes (`kill -9`), while both groups
train, a worker, a group's task, its controller, or the command itself, which is then given again. The bank that comes
of it is compared with one that was left in peace.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from mta_ray.artifacts import MANIFEST
from mta_ray.benchmarks.command import settings_from_words, show
from mta_ray.benchmarks.session import members
from mta_ray.benchmarks.small_world import USERS_PER_ANCHOR, make_world
from mta_ray.lora.bank import Bank, load_bank

log = logging.getLogger(__name__)
GROUPS = 2
LOOK_S = 0.25
GONE_S = 60.0
"""A cluster whose driver was killed is gone long before."""
WORKER = "worker"
TITLES: Mapping[str, str] = {WORKER: "ray::RayTrainWorker", "task": "ray::_run_group", "controller": "ray::TrainContro"}
"""What a process of a group is to the first characters of its title."""
DRIVER = "command"
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Ray's own, which train nothing and notice only a minute or two later that their node has gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BankKillConfig:
    """The job, and how often one of its processes is killed."""

    kills: int = 20
    anchors: int = 16
    lanes: int = 2
    """Adapters that each of the two groups trains at once."""
    steps: int = 400
    examples_per_step: int = 2
    learning_rate: float = 1e-4
    """Small: once an adapter knows its few examples by heart its gradients are rounding, which AdamW makes steps of."""
    checkpoint_every_s: float = 3.0
    wait_s: float = 3.0
    """At most so long a killer waits once both groups train."""
    limit_s: float = 2400.0
    """After so long the job is given up."""
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """One blow."""

    at_s: float
    """Since the command was first given."""
    what: str
    finished: int
    """Adapters that were finished by then."""


@dataclass(slots=True)
class Ledger:
    """Finished adapters as they were first seen, and what has become of them since."""

    first: dict[int, tuple[int, int, str]] = field(default_factory=dict)
    """Adapter to inode, time and hash of its manifest."""
    lost: set[int] = field(default_factory=set)
    retrained: set[int] = field(default_factory=set)

    def look(self, found: Mapping[int, tuple[int, int, str]], kept: Mapping[int, int]) -> None:
        """Finished adapters and checkpoints (adapter to its manifest's time, ns) as they lie there now."""
        self.lost |= self.first.keys() - found.keys()
        for number, mark in found.items():
            if self.first.setdefault(number, mark) != mark:
                self.retrained.add(number)
        # A checkpoint that is younger than the finished adapter: somebody trains it again.
        self.retrained |= {n for n, at_ns in kept.items() if n in self.first and at_ns > self.first[n][1]}


def kill_benchmark(config: BankKillConfig, world: Path) -> dict[str, Any]:
    """What became of the adapters, and how far the bank is from an undisturbed one; `world` is `make_world`'s."""
    with tempfile.TemporaryDirectory(prefix="mta-bank-kills-") as name:
        home = Path(name)

        # 1. undisturbed
        start_s = time.monotonic()
        with (home / "whole.log").open("w") as told:
            subprocess.run(_command(config, world, home / "whole"), check=True, stdout=told, stderr=told, cwd=home)
        undisturbed_s = time.monotonic() - start_s
        log.info("undisturbed: %.0f s", undisturbed_s)

        # 2. the same with deaths
        job = _Job(config, world, home)
        job.run()

        # 3. what came of it
        whole, killed = load_bank(str(home / "whole")), load_bank(str(home / "killed"))
        return {
            "lost_after_kills": len(job.ledger.lost),
            "retrained_after_kills": len(job.ledger.retrained),
            "kills": len(job.kills),
            "kills_difference": bank_difference(killed, whole),
            "bank_kills": {
                "adapters": len(whole),
                "by_kind": dict(Counter(kill.what for kill in job.kills)),
                "each_kill": [asdict(kill) for kill in job.kills],
                "undisturbed_s": undisturbed_s,
                "killed_s": job.seconds,
                "commands": job.commands,
                "exit_codes": job.exit_codes,
                "config": asdict(config),
            },
        }


def bank_difference(one: Bank, other: Bank) -> float:
    """The largest ‖a − b‖ / ‖b‖ of any adapter's module and side. Raises ValueError for other anchors."""
    if one.anchor_ids != other.anchor_ids:
        raise ValueError(f"the banks have other anchors: {len(one.anchor_ids)} and {len(other.anchor_ids)} of them")
    return max(
        float((got[anchor] - wanted[anchor]).norm() / wanted[anchor].norm())
        for ours, theirs in ((one.up, other.up), (one.down, other.down))
        for got, wanted in ((ours[module], theirs[module]) for module in theirs)
        for anchor in range(len(other))
    )


def do_all_train(since_s: Sequence[float], kept_at_s: Sequence[float], *, lanes: int, unfinished: int) -> bool:
    """Whether there are as many groups as have work, and each has kept a checkpoint since the youngest one was born.

    `since_s` has the birth of each group's worker. More adapters than the other groups have lanes were kept since then.
    """
    if len(since_s) < min(GROUPS, max(1, -(-unfinished // lanes))):
        return False
    fresh = sum(at_s > max(since_s) for at_s in kept_at_s)
    return fresh > lanes * (len(since_s) - 1)


class _Job:
    """The command under fire, given again whenever it was killed itself."""

    def __init__(self, config: BankKillConfig, world: Path, home: Path) -> None:
        self.config = config
        self.world = world
        self.home = home
        self.folder = home / "killed.adapters"
        self.ledger = Ledger()
        self.kills: list[Kill] = []
        self.commands = 0
        self.exit_codes: list[int] = []
        self.seconds = 0.0
        self._draw = random.Random(config.seed)

    def run(self) -> None:
        start_s = time.monotonic()
        while not self._run_once(start_s):
            log.info("the command was killed; it is given again")
        self.seconds = time.monotonic() - start_s

    def _run_once(self, start_s: float) -> bool:
        """Whether the command came to its end by itself. Raises RuntimeError where that is a failure."""
        self.commands += 1
        with (self.home / "killed.log").open("a") as told:
            driver = subprocess.Popen(
                _command(self.config, self.world, self.home / "killed"),
                stdout=told,
                stderr=told,
                cwd=self.home,
                start_new_session=True,
            )
        try:
            return self._watch(driver, start_s)
        finally:
            _end(driver)

    def _watch(self, driver: subprocess.Popen[bytes], start_s: float) -> bool:
        strike_at_s: float | None = None
        last_kill_s = time.time()
        while driver.poll() is None:
            time.sleep(LOOK_S)
            if time.monotonic() - start_s > self.config.limit_s:
                raise RuntimeError(f"the job has not ended in {self.config.limit_s:.0f} s: {self._last_lines()}")
            kept_at_s = self._look()
            if len(self.kills) >= self.config.kills:
                continue
            victims = _victims(driver.pid)
            since_s = [max(at_s, last_kill_s) for at_s in victims.starts_s]
            unfinished = self.config.anchors - len(self.ledger.first)
            if not do_all_train(since_s, kept_at_s, lanes=self.config.lanes, unfinished=unfinished):
                strike_at_s = None
                continue
            if strike_at_s is None:
                strike_at_s = time.monotonic() + self._draw.uniform(0, self.config.wait_s)
            if time.monotonic() < strike_at_s:
                continue
            what = self._draw.choice(sorted(victims.pids))
            if not _strike(self._draw.choice(victims.pids[what])):
                continue
            strike_at_s, last_kill_s = None, time.time()
            self.kills.append(Kill(at_s=time.monotonic() - start_s, what=what, finished=len(self.ledger.first)))
            log.info("%.0f s: killed a %s (%d)", self.kills[-1].at_s, what, len(self.kills))
            if what == DRIVER:
                driver.wait()
                _until_gone(driver.pid)
                return False
        self.exit_codes.append(driver.returncode)
        if driver.returncode:
            raise RuntimeError(f"the command ended with {driver.returncode}: {self._last_lines()}")
        return True

    def _look(self) -> list[float]:
        """Tell the ledger what lies there; when each adapter on its way was kept last, in seconds."""
        found: dict[int, tuple[int, int, str]] = {}
        kept: dict[int, int] = {}
        for path in sorted(self.folder.glob(f"*/[0-9]*/{MANIFEST}")):
            with suppress(FileNotFoundError, json.JSONDecodeError):
                state = path.stat()
                number, _, is_checkpoint = path.parent.name.partition(".")
                if is_checkpoint == "checkpoint":
                    kept[int(number)] = state.st_mtime_ns
                elif not is_checkpoint:
                    found[int(number)] = (state.st_ino, state.st_mtime_ns, json.loads(path.read_text())["hash"])
        if not (self.home / "killed" / MANIFEST).exists():  # once the bank is there its adapters' folder goes
            self.ledger.look(found, kept)
        return [at_ns / 1e9 for number, at_ns in kept.items() if number not in found]

    def _last_lines(self) -> str:
        return (self.home / "killed.log").read_text()[-1000:]


@dataclass(frozen=True, slots=True)
class _Victims:
    pids: dict[str, list[int]]
    """By what they are; the command itself is among them."""
    starts_s: list[float]
    """When each worker was born, since the epoch."""


def _victims(driver: int) -> _Victims:
    pids = {DRIVER: [driver]}
    starts_s = []
    for process in _session(driver):
        title = _title(process)
        for what, start in TITLES.items():
            if title.startswith(start):
                pids.setdefault(what, []).append(process.pid)
                if what == WORKER:
                    starts_s.append(process.create_time())
    return _Victims(pids, starts_s)


def _session(driver: int) -> list[psutil.Process]:
    """The processes of the command's cluster."""
    return [process for process in members(driver) if process.pid != driver]


def _title(process: psutil.Process) -> str:
    """Empty where it has just gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def _strike(pid: int) -> bool:
    """Whether it was there."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _until_gone(driver: int) -> None:
    """Wait until the cluster of a command that was killed has gone after it. Raises RuntimeError where it does not."""
    until_s = time.monotonic() + GONE_S
    while left := [process for process in _session(driver) if not _title(process).startswith(AGENTS)]:
        if time.monotonic() > until_s:
            raise RuntimeError(f"{len(left)} processes outlived the command that was killed by {GONE_S:.0f} s: {left}")
        time.sleep(LOOK_S)


def _end(driver: subprocess.Popen[bytes]) -> None:
    """What an exception leaves running goes."""
    if driver.poll() is None:
        driver.kill()
        driver.wait()
        _until_gone(driver.pid)


def _command(config: BankKillConfig, world: Path, out: Path) -> list[str]:
    settings = {
        "users": world / "users",
        "embeddings": world / "embeddings",
        "base": world / "base",
        "out": out,
        "anchors": config.anchors,
        "min-items": 4,
        "adapters-per-pack": config.lanes,
        "groups": GROUPS,
        "checkpoint-every-s": config.checkpoint_every_s,
        "max-failures": 50,
        "train.steps": config.steps,
        "train.examples-per-step": config.examples_per_step,
        "train.learning-rate": config.learning_rate,
        "split.test-share": 0.1,
        "group.cpus-per-worker": 1,
        "cluster.cpus": 2,
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "mta_ray.cli", "build-bank", *words]


def main() -> int:
    """Print and write what became of the adapters; 1 where one was lost or trained again."""
    config, file = settings_from_words(BankKillConfig, __doc__)
    with tempfile.TemporaryDirectory(prefix="mta-world-") as world:
        make_world(Path(world), users=USERS_PER_ANCHOR * config.anchors)
        figures = kill_benchmark(config, Path(world))
    show(figures, file)
    return 1 if figures["lost_after_kills"] or figures["retrained_after_kills"] else 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    log.setLevel(logging.INFO)
    sys.exit(main())
