"""Does the simulation tell the truth? A live service under three loads, against what was predicted of them."""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from ray import serve

from mta_ray.benchmarks.marked_users import TASTES, make_bank, make_base, random_adapter, stack_of, tiny_llama
from mta_ray.cluster import ClusterConfig, connect
from mta_ray.model.backbone import EMBEDDED
from mta_ray.model.settings import EngineConfig
from mta_ray.personalize.base_model import open_base
from mta_ray.population.capacity.arrivals import Arrival, TrafficConfig, draw_users, poisson_arrivals
from mta_ray.population.capacity.calibrate import CalibrationConfig, calibrate
from mta_ray.population.capacity.closed_loops import Pace, at_most
from mta_ray.population.capacity.measure_engine import MeasureConfig, measure_engine
from mta_ray.population.capacity.meter import Meter, ask
from mta_ray.population.capacity.service_model import Outcome, PodConfig, saturation_per_s, simulate_pod
from mta_ray.population.capacity.service_times import ServiceTimes
from mta_ray.serving.args import ServingArgs
from mta_ray.serving.database import open_database
from mta_ray.serving.identity import UserId
from mta_ray.serving.local import free_port, serving_environment, start
from mta_ray.serving.user_store import UserStore

log = logging.getLogger(__name__)
PERCENTILES = (50, 99)
CLOCKS = ("ttft_ms", "total_ms")
TIMEOUT_S = 180.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidateConfig:
    """A small service on this machine, and its loads."""

    base: str = "tiny"
    """`tiny` (two random layers) or `default` (the embedded base model)."""
    loads: tuple[float, ...] = (0.3, 0.6, 0.8)
    """Shares of what the simulation says the service can do."""
    seconds: float = 45.0
    """Of each load."""
    users: int = 24
    """Who ask; a share of them has a stack."""
    max_requests: int = 16
    """Rows of the engine, and slots of stacks."""
    max_waiting: int = 32
    """Requests that wait for a row."""
    prompt_words: int = 16
    """Of every prompt."""
    answer_tokens_max: int = 64
    """Longer answers are cut to this."""
    disturbed_cpus: float = 0.3
    """A load beside which other programs took more CPUs than this is tried again."""
    tries: int = 3
    """Of each load; the least disturbed one counts."""
    repeats: int = 2
    """Runs of each load, with the same arrivals: what they differ by beyond their predictions, none could know."""
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    """How clients are measured who wait for their answers."""
    seed: int = 0
    """Of arrivals."""

    def __post_init__(self) -> None:
        if self.base not in ("tiny", "default"):
            raise ValueError(f"base is {self.base!r}; the service that is validated is of `tiny` or `default`")
        if not self.loads or not all(0 < share < 10 for share in self.loads):
            raise ValueError(f"loads are {self.loads}, wanted at least one, each more than 0 and less than 10")
        if min(self.tries, self.repeats) < 1 or not 0 <= self.disturbed_cpus < math.inf:
            raise ValueError(
                f"tries is {self.tries}, repeats {self.repeats} and disturbed_cpus {self.disturbed_cpus}, wanted at "
                "least 1, 1 and 0, and finite"
            )
        if (
            not 5 <= self.seconds < math.inf
            or min(self.users, self.max_requests, self.prompt_words, self.answer_tokens_max) < 1
        ):
            raise ValueError("seconds is at least 5; users, max_requests, prompt_words, answer_tokens_max at least 1")


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a load."""

    others: float
    """CPUs that other programs took beside it."""
    paces: tuple[float, float]
    """How many times as long all work took as at the calibration, before the run and after it."""
    answers: list[dict[str, Any]]
    """What the client was told, in the order of the arrivals."""

    @property
    def pace(self) -> float:
        """Of the run itself, as far as that is known."""
        return math.sqrt(self.paces[0] * self.paces[1])


def validate_live(config: ValidateConfig, traffic: TrafficConfig, to: Path) -> tuple[ServiceTimes, dict[str, Any]]:
    """Measure, calibrate, predict, then load the service and compare; the times, and the comparison.

    `to`: a Parquet file of all requests of the runs that count, measured and predicted.
    """
    # 1. the engine by itself, while nothing else runs
    engine = measure_engine(
        config.base, MeasureConfig(max_requests=config.max_requests, stack_slots=config.max_requests)
    )
    pod = PodConfig(
        replicas=1,
        max_requests=config.max_requests,
        max_waiting=config.max_waiting,
        stack_slots=config.max_requests,
        cores=os.cpu_count(),
    )
    with (
        tempfile.TemporaryDirectory(prefix="mta-validate-") as name,
        serving_environment(),
        connect(ClusterConfig(cpus=3)),
    ):
        try:
            # 2. a service, and one request at a time
            url, users = _serve(config, traffic, Path(name))
            body = {
                "model": "mta",
                "prompt": " ".join(["robot"] * config.prompt_words),
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            often = draw_users(
                traffic.zipf, len(users), config.calibration.requests, np.random.default_rng(config.seed)
            )
            requests = [{"body": {**body, "user": users[user]}} for user in often]  # as those of the loads
            times, loops, facts = calibrate(
                url, requests, engine.fit.step, pod, config.calibration, stack_load_ms=engine.stack_load_ms
            )
            source = f"a service of base {config.base} on {os.cpu_count()} CPUs, {times.source}"
            times = replace(times, source=source, base=config.base, device=engine.device)

            # 3. loads that were not looked at before
            can_per_s = saturation_per_s(pod, times, replace(traffic, prompt_tokens=float(facts["prompt_tokens"])))
            meter, loads, rows = Meter(), [], []
            pace = Pace(meter, url, requests, config.calibration.answer_tokens, times, pod, loops)
            before = pace.now()
            for number, share in enumerate(config.loads):
                per_s = share * can_per_s / before
                drawn = _arrivals(config, traffic, per_s, facts["prompt_tokens"], config.seed + number)
                asked = [_request(body, users, arrival) for arrival in drawn]
                runs: list[Run] = []
                for _ in range(config.repeats):
                    run, before = _least_disturbed(config, meter, pace, before, url, asked)
                    runs.append(run)
                told, of_load = _predicted(drawn, runs, pod, times)
                loads.append({"share": share, "per_s": per_s} | told)
                rows += [{"share": share} | row for row in of_load]
                log.info("load %.0f%% compared", share * 100)
        finally:
            serve.shutdown()
    pq.write_table(pa.Table.from_pylist(rows), to)
    return times, {
        "can_per_s": can_per_s,
        "loads": loads,
        "calibration": facts,
        "engine": {"fit": asdict(engine.fit), "samples": [asdict(sample) for sample in engine.samples]},
        "stack_bytes": engine.stack_bytes,
        "bank_bytes": engine.bank_bytes,
        "cpus": os.cpu_count(),
        "config": asdict(config),
    }


def validate_run(
    requests: str | Path, pod: PodConfig, times: ServiceTimes, *, prompt_tokens: int, stack_share: float = 0.0
) -> list[dict[str, Any]]:
    """The answers of a finished `mta simulate load` (its requests.parquet), replayed: one comparison for each phase."""
    columns = ["at_s", "phase", "kind", "status", "first_status", "ttft_ms", "total_ms", "is_stream", "retried"]
    columns += ["user", "tokens", "most_tokens", "prompt_tokens"]
    table = pq.read_table(requests)
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise ValueError(f"{requests} lacks the columns {', '.join(missing)}; is it of `mta simulate load`?")
    rows = [row for row in table.select(columns).to_pylist() if row["kind"] == "ask"]
    if not any(row["tokens"] for row in rows):
        raise ValueError(f"{requests} holds no answered question")
    rows.sort(key=lambda row: row["at_s"])
    rng = np.random.default_rng(0)
    has_stack = {user: bool(rng.random() < stack_share) for user in sorted({row["user"] for row in rows})}
    # A second try is a request of its own, which nobody predicts: what was refused at first counts as refused.
    rows = [row | {"status": row["first_status"]} if row["retried"] else row for row in rows]
    rows = [row | {"ttft_ms": row["total_ms"]} if row["ttft_ms"] is None else row for row in rows]
    arrivals = [
        Arrival(
            row["at_s"],
            row["user"],
            row["prompt_tokens"] or prompt_tokens,
            max(1, row["tokens"] or row["most_tokens"]),
            row["is_stream"],
            has_stack[row["user"]],
        )
        for row in rows
    ]
    ended = {id(outcome.arrival): outcome for outcome in simulate_pod(arrivals, pod, times).outcomes}
    told = []
    for phase in dict.fromkeys(row["phase"] for row in rows):
        at = [n for n, row in enumerate(rows) if row["phase"] == phase]
        told.append({"phase": phase} | compare([ended[id(arrivals[n])] for n in at], [rows[n] for n in at]))
    return told


def compare(predicted: Sequence[Outcome], measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Percentiles of both, and predicted over measured; refused requests are counted apart."""
    said = [outcome for outcome in predicted if outcome.status == 200]
    heard = [answer for answer in measured if answer["status"] == 200]
    clocks: dict[str, Any] = {}
    for clock in CLOCKS:
        for p in PERCENTILES:
            one = float(np.percentile([getattr(o, clock) for o in said], p)) if said else 0.0
            other = float(np.percentile([answer[clock] for answer in heard], p)) if heard else 0.0
            clocks[f"{clock}_p{p}"] = {
                "predicted": one,
                "measured": other,
                "ratio": one / other if said and heard else None,
            }
    return {
        "requests": len(measured),
        "refused": {
            "predicted": sum(outcome.status == 503 for outcome in predicted),
            "measured": sum(answer["status"] == 503 for answer in measured),
        },
        "failed": sum(answer["status"] not in (200, 503) for answer in measured),
        "clocks": clocks,
    }


def _least_disturbed(
    config: ValidateConfig, meter: Meter, pace: Pace, before: float, url: str, requests: Sequence[Mapping[str, Any]]
) -> tuple[Run, float]:
    """The try of the load beside which other programs did least, and the machine's pace after the last try.

    `before`: its pace now.
    """
    tried: list[Run] = []
    for _ in range(config.tries):
        with meter.watch() as seen:
            told = ask(url, requests, clients=0)
        after = pace.now()
        tried.append(Run(seen.others_cpus(told["life_cpu_ms"]), (before, after), told["requests"]))
        before = after
        if tried[-1].others <= config.disturbed_cpus:
            break
    return min(tried, key=lambda run: run.others), before


def _predicted(
    drawn: Sequence[Arrival], runs: Sequence[Run], pod: PodConfig, times: ServiceTimes
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The runs of one load beside what is predicted of each: percentiles, and every request."""
    # As the arrivals, what else the machine did is not the service's doing: the prediction is told it.
    said = [
        simulate_pod(drawn, replace(pod, others=at_most(run.others, pod)), times.at_pace(run.pace)).outcomes
        for run in runs
    ]
    each = [compare(outcomes, run.answers)["clocks"] for outcomes, run in zip(said, runs, strict=True)]
    told = {"others_cpus": [run.others for run in runs], "paces": [run.paces for run in runs]}
    told |= compare([o for outcomes in said for o in outcomes], [answer for run in runs for answer in run.answers])
    told |= {"each_run": {clock: [run[clock] for run in each] for clock in each[0]}}
    rows = [
        {"run": n} | row
        for n, (outcomes, run) in enumerate(zip(said, runs, strict=True))
        for row in _rows(drawn, outcomes, run)
    ]
    return told, rows


def _rows(drawn: Sequence[Arrival], outcomes: Sequence[Outcome], run: Run) -> list[dict[str, Any]]:
    """Each request with what was measured of it and what was predicted."""
    of = {id(outcome.arrival): outcome for outcome in outcomes}
    return [
        asdict(arrival)
        | {name: answer.get(name) for name in ("status", "tokens")}
        | {clock: answer[clock] if answer["status"] else None for clock in CLOCKS}
        | {f"predicted_{name}": getattr(of[id(arrival)], name) for name in ("status", *CLOCKS)}
        | {"pace": run.pace, "others_cpus": run.others}
        for arrival, answer in zip(drawn, run.answers, strict=True)
    ]


def _arrivals(
    config: ValidateConfig, traffic: TrafficConfig, per_s: float, prompt_tokens: int, seed: int
) -> list[Arrival]:
    drawn = poisson_arrivals(traffic, per_s=per_s, seconds=config.seconds, users=config.users, seed=seed)
    stacked = round(config.users * traffic.stack_share)
    return [
        Arrival(
            a.at_s,
            a.user,
            prompt_tokens,
            min(a.answer_tokens, config.answer_tokens_max),
            a.is_stream,
            a.user < stacked,
        )
        for a in drawn
    ]


def _request(body: Mapping[str, Any], users: Sequence[str], arrival: Arrival) -> dict[str, Any]:
    asked = {**body, "user": users[arrival.user], "max_tokens": arrival.answer_tokens}
    if not arrival.is_stream:
        asked = {name: value for name, value in asked.items() if name not in ("stream", "stream_options")}
    return {"at_s": arrival.at_s, "body": asked}


def _serve(config: ValidateConfig, traffic: TrafficConfig, folder: Path) -> tuple[str, list[str]]:
    """The service's URL, and users with a history, the first of them with a stack."""
    source = EMBEDDED if config.base == "default" else tiny_llama(folder / "model")
    base = open_base(make_base(folder / "base", source))
    bank = make_bank(folder / "bank", source, seed=0)
    args = ServingArgs(
        base=str(base.path),
        bank=str(folder / "bank"),
        store=str(folder / "users.db"),
        engine=EngineConfig(max_requests=config.max_requests, max_waiting=config.max_waiting),
        cpus_per_replica=0.5,
        stack_slots=config.max_requests,
    )
    port = free_port("127.0.0.1")
    start(args, "127.0.0.1", port)
    url = f"http://127.0.0.1:{port}"
    names = [f"user-{number}" for number in range(config.users)]
    tastes = list(TASTES.values())
    generator = torch.Generator().manual_seed(0)
    backbone = base.load()
    with (
        httpx.Client(base_url=url, timeout=TIMEOUT_S, trust_env=False) as http,
        closing(open_database(args.database)) as database,
    ):
        store = UserStore(database)
        for number, name in enumerate(names):
            history = {"items": [f"{tastes[number % len(tastes)]} {number}"]}
            view = http.put(f"/v1/users/{name}/history", json=history).raise_for_status().json()
            if number < round(config.users * traffic.stack_share):
                own = random_adapter(backbone, rank=args.stack.rank, generator=generator)
                store.put_stack(UserId(tenant=args.tenant, id=name), stack_of(own, view, backbone))
    log.info("a service of %s at %s, %d anchors, %d users", config.base, url, len(bank), len(names))
    return url, names
