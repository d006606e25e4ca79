"""What a running service's processes use while somebody asks it: CPU times thread by thread, and the asking itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import ray
from ray import serve

from mta_ray.serving.local import APP_NAME

PROCESSES = {"proxy": "SERVE_PROXY_ACTOR", "ingress": "#Ingress#", "replica": "#Model#"}
"""Process -> what the name of its actor contains."""
IDLE_S = 4.0
"""How long processes are watched that have nothing to do: health checks and the like are no request's."""
WARM = 3
"""Requests of each process of clients before it is measured."""
KINDS = ("python", "native", "engine")


@dataclass(frozen=True, slots=True)
class Usage:
    """CPU milliseconds of one process so far."""

    python: float
    """Threads that hold the interpreter, without the engine's."""
    native: float
    engine: float

    def since(self, before: Usage) -> Usage:
        return Usage(*(getattr(self, kind) - getattr(before, kind) for kind in KINDS))

    def scaled(self, factor: float) -> Usage:
        return Usage(*(getattr(self, kind) * factor for kind in KINDS))

    @property
    def total(self) -> float:
        return self.python + self.native + self.engine


@dataclass(slots=True)
class Seen:
    """What happened while somebody watched."""

    seconds: float = 0.0
    used: dict[str, Usage] = field(default_factory=dict)
    machine_ms: float = 0.0
    """CPU time of everything on the machine."""
    steps: int = 0
    """Of the engine."""
    tokens: int = 0

    def others_cpus(self, client_ms: float) -> float:
        """CPUs that were busy with something else than the service and its clients."""
        ours_ms = client_ms + sum(usage.total for usage in self.used.values())
        return max(0.0, (self.machine_ms - ours_ms) / self.seconds / 1e3)


class Meter:
    """Reads the CPU times of the service's processes, thread by thread."""

    def __init__(self) -> None:
        self._model = serve.get_deployment_handle("Model", APP_NAME)
        self._actors: dict[str, Any] = {}
        for actor in ray.util.list_named_actors(all_namespaces=True):
            for process, part in PROCESSES.items():
                if part in actor["name"]:
                    self._actors[process] = ray.get_actor(actor["name"], namespace=actor["namespace"])
        missing = PROCESSES.keys() - self._actors.keys()
        if missing:
            raise RuntimeError(f"no process of the service is a {' or a '.join(sorted(missing))}; does it run here?")

    @contextmanager
    def watch(self) -> Iterator[Seen]:
        """What happens within the block; filled in at its end."""
        seen = Seen()
        stats, before, machine_ms = self._model.engine_stats.remote().result(), self._read(), _machine_ms()
        began_s = time.perf_counter()
        yield seen
        seen.seconds = time.perf_counter() - began_s
        seen.machine_ms = _machine_ms() - machine_ms
        seen.used = {name: usage.since(before[name]) for name, usage in self._read().items()}
        after = self._model.engine_stats.remote().result()
        seen.steps, seen.tokens = after.steps - stats.steps, after.tokens - stats.tokens

    def idle(self) -> Seen:
        """What processes do that have nothing to do."""
        with self.watch() as seen:
            time.sleep(IDLE_S)
        return seen

    def _read(self) -> dict[str, Usage]:
        told = {}
        for process, actor in self._actors.items():
            pid, python, engine = ray.get(actor.__ray_call__.remote(_threads_of))  # some begin when there is work
            used = dict.fromkeys(KINDS, 0.0)
            for thread in Path(f"/proc/{pid}/task").iterdir():
                kind = "engine" if int(thread.name) in engine else "python" if int(thread.name) in python else "native"
                used[kind] += int((thread / "schedstat").read_text().split()[0]) / 1e6
            told[process] = Usage(**used)
        return told


def _machine_ms() -> float:
    times = psutil.cpu_times()
    return (sum(times[:8]) - times.idle - times.iowait) * 1e3  # the rest are guests, which count as users too


def _threads_of(_: object) -> tuple[int, set[int], set[int]]:
    """Runs in the process that is asked: its id, its Python threads, and which of them is an engine."""
    threads = [thread for thread in threading.enumerate() if thread.native_id is not None]
    python = {int(thread.native_id or 0) for thread in threads}
    return os.getpid(), python, {int(thread.native_id or 0) for thread in threads if thread.name == "engine"}


def ask(url: str, requests: Sequence[Mapping[str, Any]], *, clients: int) -> dict[str, Any]:
    """What a process of clients was told: so many who ask again when they are answered, or (0) each at its `at_s`."""
    plan = json.dumps({"url": url, "requests": list(requests), "clients": clients, "warm": WARM})
    command = [sys.executable, "-m", "mta_ray.population.capacity.open_loop"]
    done = subprocess.run(command, input=plan, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the client ended with code {done.returncode}: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout))


def answered(told: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What became of the requests of `ask`; a RuntimeError if one of them failed."""
    answers: list[dict[str, Any]] = told["requests"]
    bad = [answer for answer in answers if answer["status"] != 200]
    if bad:
        raise RuntimeError(f"{len(bad)} of {len(answers)} requests of a calibration failed, the first: {bad[0]}")
    return answers
