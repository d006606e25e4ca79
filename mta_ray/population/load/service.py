"""A service of a run's own on this machine, and what can be seen of any while it is asked: replicas, its figures."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import ray
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from mta_ray.benchmarks.marked_users import make_bank, make_base, tiny_llama
from mta_ray.cluster import ClusterConfig, connect
from mta_ray.lora.fusion_config import FusionConfig
from mta_ray.model.backbone import EMBEDDED
from mta_ray.model.settings import EngineConfig
from mta_ray.serving.args import AutoscaleConfig, ServingArgs
from mta_ray.serving.local import APP_NAME, free_port, serving_environment, start

log = logging.getLogger(__name__)
SAMPLE_S = 1.0
METRICS_S = 5.0
"""Between two looks at the metrics page: Ray brings it up to date every few seconds, and it is long."""
PREFIX = "ray_mta_"
"""Of the names of the service's figures on a node's metrics page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnServiceConfig:
    """The service of a run that brings its own."""

    base: str = "tiny"
    """`tiny`, a random model of two layers, or `default`, the embedded base model; the bank is random too."""
    replicas: int = 1
    """The least."""
    cpus_per_replica: float = 0.5
    """CPUs that Ray sets aside for each."""
    max_requests: int = 16
    """Decoded together by one replica."""
    max_waiting: int = 32
    """That wait for a row of it."""
    stack_slots: int = 48
    """Users' stacks on one replica at once."""
    autoscale: AutoscaleConfig = field(
        default_factory=lambda: AutoscaleConfig(
            max_replicas=2, target_ongoing_requests=2.0, look_back_s=15.0, upscale_delay_s=5.0, downscale_delay_s=45.0
        )
    )
    """When a replica comes and goes; delays that a run of minutes shows."""
    seed: int = 0
    """Of the bank."""

    def __post_init__(self) -> None:
        if self.base not in ("tiny", "default"):
            raise ValueError(f"base is {self.base!r}, wanted tiny or default")


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnService:
    """Where it is and what it holds."""

    url: str
    base: str
    bank: str
    fusion: FusionConfig


@contextmanager
def own_service(config: OwnServiceConfig, cluster: ClusterConfig, folder: Path) -> Iterator[OwnService]:
    """The service until the end of the block, on the cluster that is connected or on one of its own."""
    source = EMBEDDED if config.base == "default" else tiny_llama(folder / "model")
    base = make_base(folder / "base", source)
    make_bank(folder / "bank", source, seed=config.seed)
    args = ServingArgs(
        base=str(base),
        bank=str(folder / "bank"),
        store=str(folder / "users.db"),
        engine=EngineConfig(max_requests=config.max_requests, max_waiting=config.max_waiting, max_tokens=256),
        stack_slots=config.stack_slots,
        replicas=config.replicas,
        cpus_per_replica=config.cpus_per_replica,
        autoscale=config.autoscale,
    )
    port = free_port("127.0.0.1")
    with serving_environment(), connect(cluster):
        try:
            start(args, "127.0.0.1", port)
            yield OwnService(url=f"http://127.0.0.1:{port}", base=args.base, bank=args.bank, fusion=args.fusion)
        finally:
            serve.shutdown()


@dataclass(slots=True, kw_only=True)
class Sample:
    """A second of the run."""

    at_s: float
    """After time 0 of the run."""
    running: int | None = None
    """Replicas of the model; none: not to be seen from here."""
    starting: int | None = None
    stopping: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    """The service's figures, summed over replicas; empty where there was no look."""


class Sampler:
    """Looks every second, in a thread, until it is closed."""

    def __init__(self, *, metrics_urls: tuple[str, ...], sees_replicas: bool) -> None:
        self.samples: list[tuple[float, Sample]] = []
        """With the monotonic time of each."""
        self._urls, self._sees_replicas = metrics_urls, sees_replicas
        self._counts: dict[tuple[str, str], float] = {}
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look_on, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """No more."""
        self._is_over.set()
        self._thread.join()

    def since(self, began_s: float) -> list[Sample]:
        """The samples on the clock of a run that began then."""
        for seen_s, sample in self.samples:
            sample.at_s = seen_s - began_s
        return [sample for _, sample in self.samples if sample.at_s >= 0]

    def _look_on(self) -> None:
        next_s = next_metrics_s = time.monotonic()
        with httpx.Client(timeout=METRICS_S, trust_env=False) as http:
            while not self._is_over.wait(max(0.0, next_s - time.monotonic())):
                now_s = time.monotonic()
                sample = Sample(at_s=0.0)
                if self._sees_replicas:
                    _count_replicas(sample)
                if now_s >= next_metrics_s:
                    sample.metrics = self._figures(http)
                    next_metrics_s += METRICS_S
                self.samples.append((now_s, sample))
                next_s += SAMPLE_S

    def _figures(self, http: httpx.Client) -> dict[str, float]:
        """Gauges of the replicas that are there; counters of those that were, too."""
        gauges: dict[str, float] = {}
        for url in self._urls:
            with suppress(httpx.HTTPError, ValueError):
                text = http.get(url).raise_for_status().text
                for kind, name, series, value in read_figures(text):
                    if kind == "counter":
                        self._counts[name, series] = value
                    else:
                        gauges[name] = gauges.get(name, 0.0) + value
        if not gauges and not self._counts:
            return {}
        for (name, _), value in self._counts.items():
            gauges[name] = gauges.get(name, 0.0) + value
        return gauges


def read_figures(text: str) -> Iterator[tuple[str, str, str, float]]:
    """Kind, name, labels and value of our counters and gauges on a metrics page."""
    # the page is Ray's, and long: what is not ours is not parsed
    ours = "".join(f"{line}\n" for line in text.splitlines() if PREFIX in line)
    for family in text_string_to_metric_families(ours):
        if family.type in ("counter", "gauge"):
            for sample in family.samples:
                name = sample.name.removeprefix(PREFIX).removesuffix("_total")
                yield family.type, name, repr(sorted(sample.labels.items())), sample.value


def metrics_pages() -> tuple[str, ...]:
    """The metrics pages of the nodes of the cluster that is connected."""
    nodes = [node for node in ray.nodes() if node["Alive"] and node.get("MetricsExportPort")]
    return tuple(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in nodes)


def _count_replicas(sample: Sample) -> None:
    states: Mapping[Any, int]
    try:
        states = serve.status().applications[APP_NAME].deployments["Model"].replica_states
    except (RayError, RayServeException, KeyError) as error:  # a gap in the picture, not the run's end
        log.debug("replicas were not seen: %s", type(error).__name__)
        return
    counts = {str(getattr(state, "value", state)): count for state, count in states.items()}
    sample.running = counts.get("RUNNING", 0)
    sample.starting = counts.get("STARTING", 0)
    sample.stopping = counts.get("STOPPING", 0)
