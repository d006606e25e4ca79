"""What a running service spends on a request: CPU times of its processes while one client asks, and a few at once.

These wait for each answer before they ask again. Nothing comes from the loads that are predicted, whose arrivals wait
for nobody.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from ray import serve
from scipy.optimize import nnls

from mta_ray.population.capacity.arrivals import Arrival
from mta_ray.population.capacity.service_model import PodConfig, simulate_pod
from mta_ray.population.capacity.service_times import COEFFICIENTS, ProcessTime, ServiceTimes, StepTime
from mta_ray.serving.local import APP_NAME

PROCESSES = {"proxy": "SERVE_PROXY_ACTOR", "ingress": "#Ingress#", "replica": "#Model#"}
"""Process -> what the name of its actor contains."""
IDLE_S = 4.0
"""How long processes are watched that have nothing to do: health checks and the like are no request's."""
WARM = 3
"""Requests of each process of clients before it is measured."""
ALONE = 40
"""Simulated requests of each length."""
OTHERS_MAX = 0.8
"""Share of the machine's CPUs that other programs are taken to have at most."""
KINDS = ("python", "native", "engine")
TURNS = (1, 2, 4, 8)
"""What `turns` may be."""
TRIED = (0.6, 2.5)
"""Within what work is taken to be longer than CPU times say, or shorter."""
FACTORS_TRIED = 4
"""So many steps of the secant method."""
AT_ONCE = 8
"""Simulated requests of each client who asks again, of at least FEW_AT_ONCE in all."""
FEW_AT_ONCE = 60
ROUND = 8
"""For every so many clients at once, as many requests again."""
APART_S = 5.0
"""Between two requests of a simulated client that asks one at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationConfig:
    """How one request at a time is measured."""

    answer_tokens: tuple[int, ...] = (4, 16, 40)
    """Lengths of answers: what grows with them is a token's, the rest a request's."""
    requests: int = 60
    """Of each length."""
    clients: tuple[int, ...] = (2, 4, 8, 16, 32)
    """Who ask at once, each again when it is answered: of each number it is seen how much longer work takes beside so
    much other work, and of the last, as many as keep every row busy, what a request costs."""

    def __post_init__(self) -> None:
        if len(set(self.answer_tokens)) < 2 or min(self.answer_tokens) < 1 or self.requests < 5:
            raise ValueError("wanted at least two different answer_tokens, and 5 requests")
        if not self.clients or not all(a < b for a, b in pairwise((1, *self.clients))):
            raise ValueError(f"clients is {self.clients}, wanted at least one number, ascending from 2")


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


def closed_loop(body: Mapping[str, Any], users: Sequence[str], config: CalibrationConfig) -> list[dict[str, Any]]:
    """What clients ask who wait for their answers."""
    return [{"body": {**body, "user": users[n % len(users)]}} for n in range(config.requests)]


def calibrate(
    url: str,
    body: Mapping[str, Any],
    users: Sequence[str],
    step: StepTime,
    pod: PodConfig,
    config: CalibrationConfig,
    *,
    stack_load_ms: float = 0.0,
) -> tuple[ServiceTimes, dict[str, Any]]:
    """Service times, and the facts behind them. `body`: a streamed completion's, without max_tokens."""
    # 1. CPU times at each length of answer, of one client alone, and of a few at once
    meter = Meter()
    requests = closed_loop(body, users, config)
    ask(url, _of_length(requests, max(config.answer_tokens)), clients=config.clients[-1])
    idle = meter.idle()
    runs: dict[int, list[dict[str, Any]]] = {clients: [] for clients in (1, *config.clients)}
    for clients, each in runs.items():
        for tokens in config.answer_tokens:
            with meter.watch() as seen:
                told = ask(url, _of_length(_enough(requests, clients), tokens), clients=clients)
            each.append(_run_of(told, seen, idle, step) | {"clients": clients})
    alone, some, crowd = runs[1], [runs[clients] for clients in config.clients], runs[config.clients[-1]]

    # 2. what is a request's, and what a token's
    scale = float(np.mean([run["engine_over_step"] for run in crowd]))
    times = ServiceTimes(
        step=replace(step, **{name: getattr(step, name) * scale for name in COEFFICIENTS}),
        proxy=_process_time(alone, crowd, "proxy"),
        ingress=_process_time(alone, crowd, "ingress"),
        replica=_process_time(alone, crowd, "replica"),
        client=_process_time(alone, crowd, "client"),
        stack_load_ms=stack_load_ms,
        source=f"one client alone, and {' and '.join(map(str, config.clients))} at once",
    )

    # 3. what one client alone waits for besides: between tokens, and before the first one
    # As any load is predicted: beside what else the machine did meanwhile.
    others = float(np.mean([run["others_cpus"] for run in alone]))
    pod = replace(pod, others=min(others, OTHERS_MAX * (pod.cores or 1)))
    tried = [_with_rest(replace(times, turns=turns), pod, alone) for turns in TURNS]

    # 4. how much longer work takes than CPU times say while several are at it
    tried = [_with_longer(one, pod, some) for one in tried]
    times = min(tried, key=lambda one: _late(one, pod, some))
    for run, (ttft_ms, total_ms) in zip(alone, _alone(times, pod, alone), strict=True):
        run |= {"simulated_ttft_ms": ttft_ms, "simulated_total_ms": total_ms}
    prompt_tokens = round(float(np.mean([run["prompt_tokens"] for run in alone])))
    at_once = [run for runs in some for run in runs]
    for run in at_once:
        run |= {f"simulated_{clock}": _at_once(times, pod, run, clock) for clock in ("ttft_ms", "total_ms")}
    return times, {
        "one_at_a_time": alone,
        "at_once": at_once,
        "engine_over_step": scale,
        "prompt_tokens": prompt_tokens,
    }


class Pace:
    """How fast the machine is now: one of a calibration's closed loops again, beside what it was then.

    Where others share the machine, the same work takes half as long again a minute later. A prediction takes service
    times as given; this gives those of the day, and nothing of the load that is predicted.
    """

    def __init__(
        self,
        meter: Meter,
        url: str,
        requests: Sequence[Mapping[str, Any]],
        times: ServiceTimes,
        pod: PodConfig,
        known: Sequence[Mapping[str, Any]],
    ) -> None:
        """`known`: the calibration's runs `at_once`, the middle one of which is done again. `requests`: its own."""
        self._meter, self._url, self._times, self._pod = meter, url, times, pod
        self._known = known[len(known) // 2]
        self._requests = _of_length(_enough(requests, self._known["clients"]), round(self._known["tokens"]))

    def now(self) -> float:
        """How many times as long all work takes as when the times were measured; other programs count apart."""
        with self._meter.watch() as seen:
            told = ask(self._url, self._requests, clients=self._known["clients"])
        total_ms = float(np.median([answer["total_ms"] for answer in _answered(told)]))
        now = {**self._known, "total_ms_p50": total_ms, "others_cpus": seen.others_cpus(told["life_cpu_ms"])}
        return pace_of(self._times, self._pod, self._known, now)


def pace_of(times: ServiceTimes, pod: PodConfig, known: Mapping[str, Any], now: Mapping[str, Any]) -> float:
    """The pace of a closed loop: its median answer over the simulated one, and that over the calibration's own."""
    then = known["total_ms_p50"] / known["simulated_total_ms"]
    return float(now["total_ms_p50"] / _at_once(times, pod, now, "total_ms") / then)


def _answered(told: Mapping[str, Any]) -> list[dict[str, Any]]:
    answers: list[dict[str, Any]] = told["requests"]
    bad = [answer for answer in answers if answer["status"] != 200]
    if bad:
        raise RuntimeError(f"{len(bad)} of {len(answers)} requests of a calibration failed, the first: {bad[0]}")
    return answers


def _enough(requests: Sequence[Mapping[str, Any]], clients: int) -> list[Mapping[str, Any]]:
    return list(requests) * (1 + clients // ROUND)


def _of_length(requests: Sequence[Mapping[str, Any]], tokens: int) -> list[dict[str, Any]]:
    return [{**request, "body": {**request["body"], "max_tokens": tokens}} for request in requests]


def _run_of(told: Mapping[str, Any], seen: Seen, idle: Seen, step: StepTime) -> dict[str, Any]:
    """One length of answer: CPU milliseconds of each process a request, and the client's clock."""
    answers = _answered(told)
    count = len(answers) + WARM
    run: dict[str, Any] = {
        "tokens": float(np.mean([answer["tokens"] for answer in answers])),
        "prompt_tokens": float(np.mean([answer["prompt_tokens"] for answer in answers])),
        "ttft_ms_p50": float(np.median([answer["ttft_ms"] for answer in answers])),
        "total_ms_p50": float(np.median([answer["total_ms"] for answer in answers])),
        "others_cpus": seen.others_cpus(told["life_cpu_ms"]),
        "client": {
            "python": told["python_ms"] / len(answers),
            "native": max(0.0, told["cpu_ms"] - told["python_ms"]) / len(answers),
        },
    }
    for name, usage in seen.used.items():
        rest = idle.used[name].scaled(seen.seconds / idle.seconds)
        run[name] = {kind: max(0.0, getattr(usage, kind) - getattr(rest, kind)) / count for kind in KINDS}
    expected_ms = (
        step.of(0, count, count * run["prompt_tokens"])
        + step.fixed_ms * (seen.steps - 1)
        + step.row_ms * (seen.tokens - count)
    )
    return run | {"engine_over_step": run["replica"]["engine"] * count / expected_ms, "rows": seen.tokens / seen.steps}


def _process_time(alone: Sequence[Mapping[str, Any]], crowd: Sequence[Mapping[str, Any]], name: str) -> ProcessTime:
    """A request's and a token's share with many at once; what a token costs more alone is the waking up."""
    fitted = {}
    for kind in ("python", "native"):
        for runs in (alone, crowd):
            x = np.array([(1.0, run["tokens"]) for run in runs])
            request, token = nnls(x, np.array([run[name][kind] for run in runs]))[0]
            fitted[kind, runs is alone] = float(request), float(token)
    return ProcessTime(
        request_ms=fitted["python", False][0],
        token_ms=fitted["python", False][1],
        native_request_ms=fitted["native", False][0],
        native_token_ms=fitted["native", False][1],
        wake_ms=max(0.0, fitted["python", True][1] - fitted["python", False][1]),
        native_wake_ms=max(0.0, fitted["native", True][1] - fitted["native", False][1]),
    )


def _with_rest(times: ServiceTimes, pod: PodConfig, measured: Sequence[Mapping[str, Any]]) -> ServiceTimes:
    """`pause_ms`, and `away_ms` or `after_share`, so that a client alone waits as long as was measured."""
    first, last = measured[0], measured[-1]
    tokens = last["tokens"] - first["tokens"]

    def per_token_ms(short_ms: float, long_ms: float) -> float:
        return (long_ms - short_ms) / tokens

    wanted_ms = per_token_ms(first["total_ms_p50"], last["total_ms_p50"])
    said = _alone(times, pod, measured)
    times = replace(times, pause_ms=max(0.0, wanted_ms - per_token_ms(said[0][1], said[-1][1])))

    def missing_ms(tried: ServiceTimes) -> float:
        said = _alone(tried, pod, measured)
        late = [run["ttft_ms_p50"] - ttft for run, (ttft, _) in zip(measured, said, strict=True)]
        return float(np.mean(late))

    missing = missing_ms(times)
    if missing >= 0:
        return replace(times, away_ms=missing)
    low, high = 0.0, 1.0
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (middle, high) if missing_ms(replace(times, after_share=middle)) < 0 else (low, middle)
    return replace(times, after_share=high)


def _late(times: ServiceTimes, pod: PodConfig, measured: Sequence[Sequence[Mapping[str, Any]]]) -> float:
    """How far the simulated first tokens of clients who ask at once are from the measured ones."""
    return sum(
        abs(math.log(_at_once(times, pod, run, "ttft_ms") / run["ttft_ms_p50"])) for runs in measured for run in runs
    )


def _with_longer(times: ServiceTimes, pod: PodConfig, measured: Sequence[Sequence[Mapping[str, Any]]]) -> ServiceTimes:
    """`longer`, so that whole answers take what was measured of each number of clients at once, fewest first.

    Threads that share caches and cores get in each other's way; near saturation a tenth of that doubles the waiting.
    """
    known: tuple[tuple[float, float], ...] = ()
    for runs in measured:
        clients, factor, slope = float(runs[0]["clients"]), known[-1][1] if known else 1.0, 1.0
        before: tuple[float, float] | None = None
        for _ in range(FACTORS_TRIED):
            tried = replace(times, longer=(*known, (clients, factor)))
            late = float(
                np.mean([math.log(run["total_ms_p50"] / _at_once(tried, pod, run, "total_ms")) for run in runs])
            )
            if before is not None and abs(math.log(factor) - before[0]) > 1e-3:
                slope = min(3.0, max(0.3, (before[1] - late) / (math.log(factor) - before[0])))
            before = math.log(factor), late
            factor = min(TRIED[1], max(TRIED[0], factor * math.exp(late / slope)))
        known = (*known, (clients, factor))
    return replace(times, longer=known)


def _at_once(times: ServiceTimes, pod: PodConfig, run: Mapping[str, Any], clock: str) -> float:
    """The median with as many clients who ask again when they are answered."""
    count = max(FEW_AT_ONCE, run["clients"] * AT_ONCE)
    asked = [Arrival(0.0, n, round(run["prompt_tokens"]), round(run["tokens"])) for n in range(count)]
    pod = replace(pod, others=min(run["others_cpus"], OTHERS_MAX * (pod.cores or 1)))
    outcomes = simulate_pod(asked[: run["clients"]], pod, times, then=asked[run["clients"] :]).outcomes
    return float(np.median([getattr(outcome, clock) for outcome in outcomes[run["clients"] :]]))


def _alone(times: ServiceTimes, pod: PodConfig, measured: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Medians of (time to first token, total) of requests of each length with nobody beside them, milliseconds."""
    lengths = [round(run["tokens"]) for run in measured]
    prompt_tokens = round(measured[0]["prompt_tokens"])
    arrivals = [Arrival(n * APART_S, n, prompt_tokens, lengths[n % len(lengths)]) for n in range(ALONE * len(lengths))]
    outcomes = simulate_pod(arrivals, pod, times).outcomes
    said = []
    for length in lengths:
        these = [outcome for outcome in outcomes if outcome.tokens == length]
        clocks = ([o.ttft_ms for o in these], [o.total_ms for o in these])
        said.append((float(np.median(clocks[0])), float(np.median(clocks[1]))))
    return said
