"""`mta simulate load`: simulated people ask a live endpoint, every answer is checked, and a report says how it went."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import ray

import mta_ray
from mta_ray.artifacts import is_current, located, publish, read_manifest
from mta_ray.benchmarks.marked_users import TASTES
from mta_ray.cluster import ClusterConfig, connect
from mta_ray.evaluation.sections import write_sections
from mta_ray.lora.bank import load_bank
from mta_ray.lora.fusion_config import FusionConfig
from mta_ray.personalize.base_model import open_base
from mta_ray.population.load.afterwards import Afterwards, leave
from mta_ray.population.load.answers import AnswerBook, introduce
from mta_ray.population.load.figures import samples_table, summarise, to_table
from mta_ray.population.load.report import sections
from mta_ray.population.load.rows import Row, RunSettings, row_from
from mta_ray.population.load.service import OwnServiceConfig, Sample, Sampler, metrics_pages, own_service
from mta_ray.population.load.traffic import TrafficConfig, expected_sessions
from mta_ray.population.load.verdicts import judge, telling
from mta_ray.serving.args import ServingArgs

log = logging.getLogger(__name__)
KIND = "load"
PROMPTS = (
    "description: a lonely robot finds a friend tag:",
    "description: two old sweethearts meet again at sea, against all odds, and read the letters they never sent tag:",
    "description: a heist in paris goes wrong tag:",
)
FACTS = ("requests", "failed", "wrong", "wrong_user", "refused_twice", "questions", "answered", "judged")
TITLE = "Simulated load on a live endpoint"


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulateLoadConfig:
    """Which endpoint, and how much it is asked."""

    url: str | None = None
    """A running endpoint, such as http://127.0.0.1:8000; its users' names begin with `load-`, and go after the run."""
    serve: bool = False
    """Ask a small service of the run's own on this machine instead."""
    service: OwnServiceConfig = field(default_factory=OwnServiceConfig)
    """That service."""
    api_key_variable: str = "MTA_API_KEY"
    """Environment variable with the API key of `url`, if it asks for one; a setting would be written down."""
    base: str | None = None
    """The `base` artifact that `url` serves; with `bank`, answers are checked."""
    bank: str | None = None
    """The bank that `url` serves."""
    stack_rank: int = 1
    """Rank of users' stacks at `url`."""
    fusion: FusionConfig = field(default_factory=lambda: ServingArgs().fusion)
    """How `url` weighs anchors; by this and the bank it is known which ones a history leads to."""
    model_name: str = "mta"
    """What `url` calls its model."""
    marked: int = 96
    """Most frequent users, who have a history before the run and, where base and bank are known, a stack."""
    traffic: TrafficConfig = field(default_factory=TrafficConfig)
    """Who asks for what, and when."""
    timeout_s: float = 120.0
    """A request without its whole answer after so long has failed; a second try after a refusal begins anew."""
    failed_share: float = 0.0
    """Of the requests that may fail (a 503 is a refusal, no failure) in a run that is to count as good."""
    metrics_url: str | None = None
    """A page with the service's Prometheus figures; none: those of the cluster's nodes, where one is connected."""
    out: str = "runs/load"
    """Folder of the report."""
    force: bool = False
    """Run again although the report is there."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where to serve; with `url`, an address here shows the replicas of the cluster that serves."""

    def __post_init__(self) -> None:
        if (self.url is not None) == self.serve:
            raise ValueError("give either --url of a running endpoint, or --serve for one of the run's own")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url is {self.url!r}, wanted one such as http://127.0.0.1:8000")
        if self.url is not None and "@" in self.url:
            raise ValueError("url holds a name or password, and is written down; put a key into the api_key_variable")
        if self.metrics_url is not None and "@" in self.metrics_url:
            raise ValueError("metrics_url holds a name or password, and is written down; give one without")
        if (self.base is None) != (self.bank is None) or (self.serve and self.base is not None):
            raise ValueError("base and bank go together, and with --url; --serve has its own")
        if not 1 <= self.marked <= self.traffic.users:
            raise ValueError(f"marked is {self.marked}, wanted 1 to traffic.users, {self.traffic.users}")
        if not 0 <= self.failed_share <= 1:
            raise ValueError(f"failed_share is {self.failed_share}, wanted 0 to 1")
        if not 0 < self.timeout_s < math.inf or self.stack_rank < 1:
            raise ValueError(
                f"timeout_s must be above 0 and finite, stack_rank at least 1; got {self.timeout_s}, {self.stack_rank}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRun:
    """What was seen of a run."""

    rows: list[Row]
    samples: list[Sample]
    """Of the run; the figures at time 0 are those of the first."""
    locust: Mapping[str, int]
    """Requests and failures by locust's own count; a second try is a request of its own there."""
    book: AnswerBook | None
    """What had to be answered; none where the model is not known."""
    afterwards: Afterwards = field(default_factory=Afterwards)
    """What was there when all was over."""


def simulate_load(config: SimulateLoadConfig) -> str:
    """Run the load and publish report.html, report.json, requests.parquet and samples.parquet."""
    # 1. is there anything to do
    paths = ("out",) if config.base is None else ("out", "base", "bank")
    config = located(config, *paths)
    settings = {key: value for key, value in asdict(config).items() if key not in ("out", "force", "cluster")}
    inputs: dict[str, str] = {}
    if config.base is not None and config.bank is not None:
        inputs = {kind: read_manifest(getattr(config, kind), kind=kind).hash for kind in ("base", "bank")}
    if not config.force and is_current(config.out, kind=KIND, settings=settings, inputs=inputs):
        log.info("load: %s is current, nothing to do", config.out)
        return _if_right(config, read_manifest(config.out, kind=KIND).facts)
    if importlib.util.find_spec("locust") is None:
        raise ValueError("the load run needs locust, which is not installed: pip install 'mta-ray[load]'")

    with publish(config.out, kind=KIND, settings=settings, inputs=inputs) as draft:
        # 2. ask
        run = run_load(config)

        # 3. judge
        log.info("load: checking %d answers", sum(row.kind == "ask" for row in run.rows))
        verdicts = judge(run.rows, run.book)

        # 4. report
        table = to_table(run.rows, verdicts, config.traffic)
        pq.write_table(table, draft.path / "requests.parquet")
        pq.write_table(samples_table(run.samples), draft.path / "samples.parquet")
        report = summarise(table, run.samples, config.traffic, locust=run.locust, is_checked=run.book is not None)
        report["settings"] = settings
        report["telling"] = None if run.book is None else telling(run.rows, verdicts, run.book)
        report["afterwards"] = asdict(run.afterwards)
        told = {key: report["all"][key] for key in FACTS}
        told |= {"is_checked": run.book is not None, "untrue": run.afterwards.wrong}
        draft.facts.update(told)
        write_sections(draft.path, TITLE, sections(report), report)
    wrong = f"{told['wrong'] + told['wrong_user']} wrong ({told['wrong_user']} another user's)"
    log.info(
        "load: %d requests, %d failed, %d refused twice; %s; %s",
        told["requests"], told["failed"], told["refused_twice"],
        f"{told['judged']} answers judged, {wrong}" if told["is_checked"] else "no answer judged", config.out,
    )  # fmt: skip
    return _if_right(config, told)


def _if_right(config: SimulateLoadConfig, told: Mapping[str, Any]) -> str:
    """Its `out`; a run in which somebody was told something wrong, nobody anything, or too much failed, fails, however
    often it is asked for."""
    out = config.out
    if told["wrong"] or told["wrong_user"]:
        raise ValueError(
            f"{told['wrong'] + told['wrong_user']} of {told['requests']} requests were answered wrongly, "
            f"{told['wrong_user']} of them as another user; {out} has the report and every request"
        )
    if not told["answered"]:
        raise ValueError(
            f"none of {told['questions']} questions was answered: of {told['requests']} requests {told['failed']} "
            f"failed and {told['refused_twice']} were refused twice; {out} has the report and every request. See to "
            "the service, or ask more of it, then run again with --force"
        )
    if told["is_checked"] and not told["judged"]:
        raise ValueError(
            f"none of {told['answered']} answers could be judged; {out} has the report. Ask longer, or more users"
        )
    if told["failed"] > config.failed_share * told["requests"]:
        raise ValueError(
            f"{told['failed']} of {told['requests']} requests failed, which is more than failed_share "
            f"{config.failed_share:g}; {out} has the report and every request"
        )
    if told["untrue"]:
        raise ValueError(
            f"of {told['untrue']} users the service had said what was not so (not deleted, lost, no stack on its way, "
            f"or not removed after the run); {out} has the report"
        )
    return out


def run_load(config: SimulateLoadConfig) -> LoadRun:
    """Introduce the marked users, then let the schedule run against the endpoint."""
    with tempfile.TemporaryDirectory(prefix="mta-load-") as name, ExitStack() as open_now:
        # 1. the endpoint
        url, base, bank, rank, key = config.url, config.base, config.bank, config.stack_rank, None
        fusion = config.fusion
        if config.serve:
            own = open_now.enter_context(own_service(config.service, config.cluster, Path(name)))
            url, base, bank, rank, fusion = own.url, own.base, own.bank, 1, own.fusion
        else:
            key = os.environ.get(config.api_key_variable)
            if config.cluster.address is not None:
                open_now.enter_context(connect(config.cluster))
        assert url is not None
        url = url.rstrip("/").removesuffix("/v1")

        # 2. the users that are marked
        book = None
        if base is not None and bank is not None:
            opened = open_base(base)
            known = load_bank(bank, base_fingerprint=opened.fingerprint)
            book = AnswerBook(opened.load(), known, PROMPTS, tokens=config.traffic.most_tokens, fusion=fusion)
        settings = RunSettings(
            traffic=config.traffic,
            known=config.marked,
            url=url,
            api_key=key,
            model=config.model_name,
            prefix=f"load-{secrets.token_hex(4)}-",
            tastes=tuple(TASTES.values()),
            prompts=PROMPTS,
            timeout_s=config.timeout_s,
        )
        headers = {"authorization": f"Bearer {key}"} if key else {}
        http = open_now.enter_context(
            httpx.Client(base_url=url, headers=headers, timeout=config.timeout_s, trust_env=False)
        )
        rows: list[Row] = []
        afterwards = Afterwards()
        introduced: set[int] = set()
        open_now.callback(leave, http, settings.prefix, introduced, rows, afterwards)
        introduce(
            http, config.marked, prefix=settings.prefix, tastes=settings.tastes, book=book, seed=config.traffic.seed,
            rank=rank, tokens=config.traffic.least_tokens, introduced=introduced,
        )  # fmt: skip
        log.info("load: %d users are known at %s", config.marked, url)

        # 3. the load, and somebody who looks on
        pages = (config.metrics_url,) if config.metrics_url else metrics_pages() if ray.is_initialized() else ()
        sampler = Sampler(metrics_urls=pages, sees_replicas=ray.is_initialized())
        open_now.callback(sampler.close)
        began_s, locust = generate(settings, rows, Path(name) / "generator.log")
        sampler.close()
        return LoadRun(rows=rows, samples=sampler.since(began_s), locust=locust, book=book, afterwards=afterwards)


def generate(settings: RunSettings, rows: list[Row], log_file: Path) -> tuple[float, dict[str, int]]:
    """Run the generator in its process, its rows into `rows`; when its time 0 was, and locust's counts."""
    root = str(Path(mta_ray.__file__).parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    traffic = settings.traffic
    log.info("load: about %.0f sessions in %.0f s", expected_sessions(traffic, 0.0, traffic.seconds), traffic.seconds)
    began_s, locust = None, None
    with open(log_file, "w+") as told:
        process = subprocess.Popen(
            [sys.executable, "-m", "mta_ray.population.load.generator"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=told,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            with process.stdin:
                process.stdin.write(json.dumps(asdict(settings)))
            for line in process.stdout:
                said = json.loads(line)
                if "began_s" in said:
                    began_s = said["began_s"]
                elif "locust" in said:
                    locust = said["locust"]
                else:
                    rows.append(row_from(said))
            status = process.wait()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if status or began_s is None or locust is None:
            told.seek(0)
            raise RuntimeError(f"the load generator ended with {status}: {told.read()[-2000:]}")
    return began_s, locust
