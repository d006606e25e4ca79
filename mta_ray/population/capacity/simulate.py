"""`mta simulate capacity`: measured service times and a fleet in; users, requests a second, GPUs, latency, cost out."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mta_ray.artifacts import file_sha256, is_current, jsonable, located, publish
from mta_ray.cluster import ClusterConfig
from mta_ray.console import table_console
from mta_ray.evaluation.sections import write_sections
from mta_ray.population.capacity.arrivals import TrafficConfig
from mta_ray.population.capacity.fleet import (
    DemandConfig,
    FleetConfig,
    Planner,
    SampleConfig,
    TargetConfig,
    check_lengths,
)
from mta_ray.population.capacity.measure_engine import MeasureConfig, measure_engine
from mta_ray.population.capacity.report import TITLE, sections, tables
from mta_ray.population.capacity.service_times import ProcessTime, ServiceTimes, read_times, write_times
from mta_ray.population.capacity.validate import ValidateConfig, validate_live, validate_run

log = logging.getLogger(__name__)
KIND = "capacity"
TIMES = "service_times.json"
LOADS = "validation.parquet"


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulateCapacityConfig:
    """A fleet, its users, and where the service times come from: a file, or what is measured now."""

    service_times: str | None = None
    """A service_times.json that this command has written; measured on the machines of the fleet it says most."""
    measure: str | None = None
    """Measure the engine now, on this machine: `tiny`, `default`, or a `base` artifact. Nothing around the engine
    is known then."""
    measuring: MeasureConfig = field(default_factory=MeasureConfig)
    """What of the engine is measured."""
    validate: bool = False
    """Start a small service here, predict three loads, and compare. Without other times, plan with these."""
    validation: ValidateConfig = field(default_factory=ValidateConfig)
    """That service and its loads."""
    requests: str | None = None
    """The requests.parquet of a `mta simulate load`: it is replayed with these times and this pod, and compared."""
    fleet: FleetConfig = field(default_factory=FleetConfig)
    """What there is to serve with."""
    traffic: TrafficConfig = field(default_factory=TrafficConfig)
    """What requests are like."""
    demand: DemandConfig = field(default_factory=DemandConfig)
    """How many users, and how much they ask."""
    target: TargetConfig = field(default_factory=TargetConfig)
    """What they are promised."""
    sample: SampleConfig = field(default_factory=SampleConfig)
    """How much is simulated."""
    out: str = "runs/capacity"
    """Folder of report.html, report.json and service_times.json; of a validation also all its requests."""
    force: bool = False
    """Do it again although the report is there; times that were measured are measured again."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Not used: only `validate` starts Ray, for its own small service on this machine."""

    def __post_init__(self) -> None:
        if self.service_times is not None and self.measure is not None:
            raise ValueError("service_times and measure are both given; times come from one of them")
        if self.service_times is None and self.measure is None and not self.validate:
            raise ValueError(
                "no service times: give --service-times FILE, or --measure default (engine alone), or --validate "
                "(a small service of its own)"
            )
        check_lengths(self.fleet.pod, self.traffic)


def simulate_capacity(config: SimulateCapacityConfig) -> str:
    """Publish the plan as a report, and print it."""
    config = located(config, "out")
    settings = {
        name: value
        for name, value in jsonable(config).items()
        if name not in ("out", "force", "cluster", "service_times", "requests")
    }
    inputs = {
        name: _hash_of(name, path)
        for name, path in (("service_times", config.service_times), ("requests", config.requests))
        if path is not None
    }
    if not config.force and is_current(config.out, kind=KIND, settings=settings, inputs=inputs):
        log.info("capacity: %s is current, nothing to do", config.out)
        return config.out

    with publish(config.out, kind=KIND, settings=settings, inputs=inputs) as draft:
        # 1. service times
        times, report = _times(config, draft.path)

        # 2. what one replica can take, and from it the fleet
        planner = Planner(
            config.fleet,
            replace(times, client=ProcessTime()),
            config.traffic,
            config.demand,
            config.target,
            config.sample,
        )
        limit_per_s = planner.limit_per_s()
        plans = [planner.plan(users, limit_per_s) for users in sorted(config.demand.users)]
        report |= {
            "times": asdict(times),
            "limit": asdict(planner.at(limit_per_s)),
            "can_per_s": planner.can_per_s,
            "too_long_share": planner.too_long_share,
            "expected_stack_hits": planner.expected_hits(limit_per_s),
            "plans": [asdict(plan) for plan in plans],
            "curve": [asdict(point) for point in planner.curve(limit_per_s)],
        }

        # 3. a live run that somebody else has made
        if config.requests is not None:
            report["replayed"] = validate_run(
                config.requests,
                config.fleet.pod,
                times,
                prompt_tokens=round(config.traffic.prompt_tokens),
                stack_share=config.traffic.stack_share,
            )

        # 4. report
        write_times(
            draft.path / TIMES, times, {"measured": report.get("engine"), "validated": report.get("validation")}
        )
        write_sections(draft.path, TITLE, sections(report), report)
        draft.facts.update(
            simulation="capacity", requests_per_s=limit_per_s, users=plans[-1].users, replicas=plans[-1].replicas
        )
    for table in tables(report):
        table_console().print(table)
    return config.out


def _hash_of(name: str, path: str) -> str:
    if not Path(path).is_file():
        raise ValueError(f"{name}: there is no file {path}; correct the path")
    return file_sha256(path)


def _device(name: str, measuring: MeasureConfig) -> str:
    return f"{measuring.threads} CPU thread{'s' if measuring.threads > 1 else ''}" if name == "cpu" else name


def _times(config: SimulateCapacityConfig, folder: Path) -> tuple[ServiceTimes, dict[str, Any]]:
    """The times, and the report so far; a validation's requests go into the folder."""
    report: dict[str, Any] = {"simulation": "capacity"}
    for name in ("fleet", "traffic", "demand", "target", "sample"):
        report[name] = asdict(getattr(config, name))
    times = None
    if config.service_times is not None:
        times = read_times(config.service_times)
    elif config.measure is not None:
        engine = measure_engine(config.measure, config.measuring)
        times = ServiceTimes(
            step=engine.fit.step,
            stack_load_ms=engine.stack_load_ms,
            source=f"the engine of base {config.measure} by itself, on {_device(engine.device, config.measuring)}",
            base=config.measure,
            device=engine.device,
        )
        report["engine"] = asdict(engine)
    if config.validate:
        live, report["validation"] = validate_live(config.validation, config.traffic, folder / LOADS)
        times = times or live
    assert times is not None
    return times, report
