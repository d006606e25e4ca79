"""`mta simulate capacity`: measured, planned, reported; and what a finished load test is compared with."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mta_ray.artifacts import open_artifact, publish
from mta_ray.population.capacity.arrivals import TrafficConfig
from mta_ray.population.capacity.fleet import DemandConfig, FleetConfig, SampleConfig
from mta_ray.population.capacity.measure_engine import MeasureConfig, measure_engine
from mta_ray.population.capacity.report import caveats, sections, tables
from mta_ray.population.capacity.service_model import PodConfig
from mta_ray.population.capacity.service_times import ProcessTime, ServiceTimes, StepTime, read_times, write_times
from mta_ray.population.capacity.simulate import SimulateCapacityConfig, simulate_capacity
from mta_ray.population.capacity.validate import ValidateConfig, compare, validate_run
from mta_ray.population.joined import JoinReportsConfig, join_reports

TIMES = ServiceTimes(step=StepTime(fixed_ms=5.0, row_ms=0.5, prompt_token_ms=0.05), source="a test")
SAMPLE = SampleConfig(requests=100, curve_points=3, precision=0.1)


def config(tmp_path: Path, **more) -> SimulateCapacityConfig:  # noqa: ANN003
    write_times(tmp_path / "times.json", TIMES, {})
    return SimulateCapacityConfig(
        service_times=str(tmp_path / "times.json"), sample=SAMPLE, out=str(tmp_path / "out"), **more
    )


def test_a_plan_is_published_and_rests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = config(tmp_path, demand=DemandConfig(users=(1e9, 1e4)))
    path = simulate_capacity(asked)
    artifact = open_artifact(path, kind="capacity")
    report = json.loads((artifact.path / "report.json").read_text())
    assert report["simulation"] == "capacity"
    assert [plan["users"] for plan in report["plans"]] == [1e4, 1e9]
    assert report["plans"][1]["replicas"] > report["plans"][0]["replicas"] == 2
    page = (artifact.path / "report.html").read_text()
    assert page.count("<svg") == 2 and "1 billion" in page and "a test" in page
    assert read_times(artifact.path / "service_times.json") == TIMES
    assert "1 billion" in capsys.readouterr().out

    simulate_capacity(asked)
    assert capsys.readouterr().out == ""  # it was current


def test_the_engine_is_measured(tmp_path: Path) -> None:
    """Real steps of a tiny model: longer prompts and more rows take longer, and the line says so."""
    measuring = MeasureConfig(
        max_requests=8, rows=(0, 1, 8), prompts=(1, 2), prompt_tokens=(8, 120), repeats=3, anchors=4, stack_slots=8
    )
    engine = measure_engine("tiny", measuring)
    took = {(s.rows, s.prompts, s.prompt_tokens): s.ms for s in engine.samples}
    assert {(1, 0, 0), (0, 1, 8), (1, 2, 240)} <= took.keys()
    assert (8, 1, 8) not in took  # there is no row for it
    assert took[0, 1, 120] > took[0, 1, 8]
    step = engine.fit.step
    assert step.fixed_ms > 0 and step.prompt_token_ms > 0
    assert engine.stack_load_ms > 0 and engine.stack_bytes > 0 and engine.bank_bytes > 0


def test_the_report_is_made_of_its_figures_alone(tmp_path: Path) -> None:
    each = [{"predicted": 1.0, "measured": 2.0}, {"predicted": 3.0, "measured": 4.0}]
    validation = {
        "can_per_s": 10.0,
        "loads": [
            {"share": 0.5, "per_s": 5.0, "others_cpus": [0.1, 0.2], "paces": [[1.0, 1.25], [1.25, 1.5]]}
            | compare([], [{"status": 200, "ttft_ms": 1.0, "total_ms": 2.0}, {"status": 503}])
            | {"each_run": dict.fromkeys(("ttft_ms_p50", "ttft_ms_p99", "total_ms_p50", "total_ms_p99"), each)}
        ],
        "calibration": {"one_at_a_time": [{"tokens": 4, "simulated_total_ms": 9.0, "total_ms_p50": 8.0}]},
        "engine": {"fit": {"samples": 9, "error_p50": 0.01, "error_p95": 0.05}},
        "config": {"base": "tiny"},
        "cpus": 2,
    }
    path = simulate_capacity(config(tmp_path, demand=DemandConfig(users=(1e4,))))
    report = json.loads((Path(path) / "report.json").read_text())
    assert len(sections(report)) == 3 and len(tables(report)) == 1
    report = json.loads(json.dumps(report | {"validation": validation}))
    assert [section.title for section in sections(report)][-1] == "Predicted against measured"
    notes = " ".join(sections(report)[-1].notes)
    assert f"50%: {', '.join(['1 / 2 and 3 / 4'] * 4)}." in notes
    assert "took 0.1, 0.2 CPUs" in notes and "took 1.00 and 1.25, 1.25 and 1.50 times" in notes
    assert len(tables(report)) == 2


def test_a_report_of_another_version_is_told_by_its_path(tmp_path: Path) -> None:
    path = simulate_capacity(config(tmp_path, demand=DemandConfig(users=(1e4,))))
    report = json.loads((Path(path) / "report.json").read_text())
    del report["curve"]
    with publish(tmp_path / "old", kind="capacity", settings={}, inputs={}) as draft:
        (draft.path / "report.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match=r"old holds a report .* \(KeyError\('curve'\)\); run `mta simulate capacity`"):
        join_reports(JoinReportsConfig(of=(path, str(tmp_path / "old")), out=str(tmp_path / "joined")))
    assert not (tmp_path / "joined").exists()


MEASURED = ProcessTime(request_ms=1.0)
ALL = replace(TIMES, proxy=MEASURED, ingress=MEASURED, replica=MEASURED, base="default", device="NVIDIA H200")


@pytest.mark.parametrize(
    ("changes", "gpus", "told"),
    [
        ({}, 1.0, ()),
        ({"device": "cpu"}, 0.0, ()),
        ({"device": "cpu"}, 1.0, ("No plan for GPUs", "of a CPU.")),
        ({"base": "tiny"}, 1.0, ("No plan for GPUs", "of the tiny model.")),
        ({"device": "cpu", "base": "tiny"}, 0.5, ("No plan for GPUs", "of a CPU and the tiny model.")),
        ({"device": ""}, 1.0, ("No plan for GPUs", "does not name.")),
        ({"source": "placeholder"}, 1.0, ("No plan for GPUs", "placeholders")),
        ({"proxy": ProcessTime(), "replica": ProcessTime()}, 1.0, ("Not measured", "proxy, replica (all but")),
    ],
)
def test_times_that_are_not_of_the_fleet_are_told(changes: dict, gpus: float, told: tuple[str, ...]) -> None:
    fleet = FleetConfig(gpus_per_replica=gpus)
    said = caveats({"times": asdict(replace(ALL, **changes)), "fleet": asdict(fleet), "too_long_share": 0.001})
    assert len(said) == bool(told) and all(words in said[0] for words in told)


def test_requests_that_are_too_long_are_told() -> None:
    report = {"times": asdict(ALL), "fleet": asdict(FleetConfig()), "too_long_share": 0.025}
    assert caveats(report) == [
        "2.5% of the requests are longer than the 512 tokens that a replica takes: the service refuses them, the plan "
        "serves them."
    ]


def test_two_plans_on_one_page_can_be_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    traffic = TrafficConfig(prompt_tokens=4.0, answer_tokens=2.0, lengths="fixed")
    asked = config(tmp_path, demand=DemandConfig(users=(1e4,)), traffic=traffic)
    pod = PodConfig(replicas=1, max_requests=2)
    for name, gpus in (("halves", 0.5), ("[wholes]", 1.0)):
        fleet = FleetConfig(name=f"fleet of {name}", gpus_per_replica=gpus, price_per_gpu_hour=3.25, pod=pod)
        simulate_capacity(replace(asked, fleet=fleet, out=str(tmp_path / name)))
        printed = capsys.readouterr().out
        assert f"fleet of {name}; service times: a test" in printed
        assert "No plan for GPUs" in printed and "Not measured" in printed
    join_reports(JoinReportsConfig(of=(f"{tmp_path}/halves", f"{tmp_path}/[wholes]"), out=str(tmp_path / "joined")))
    page = (tmp_path / "joined" / "report.html").read_text()
    for words in (
        "Users, replicas, cost (halves)", "Users, replicas, cost ([wholes])", "fleet of halves", "fleet of [wholes]",
        "GPUs a replica: 0.5, 2 of them on each", "GPUs a replica: 1; 3.25 for a GPU", "No plan for GPUs",
        "the ingress was not measured", "What limits it here: these 85%",
    ):  # fmt: skip
        assert words in page, words


def test_times_must_come_from_somewhere(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no service times"):
        SimulateCapacityConfig()
    with pytest.raises(ValueError, match="both"):
        SimulateCapacityConfig(service_times="x", measure="tiny")
    with pytest.raises(ValueError, match="there is no file"):
        simulate_capacity(SimulateCapacityConfig(service_times=str(tmp_path / "none"), out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("cpus", [math.inf, math.nan, -1.0])
def test_a_disturbance_without_end_is_refused(cpus: float) -> None:
    with pytest.raises(ValueError, match="disturbed_cpus"):
        ValidateConfig(disturbed_cpus=cpus)


def rows(*answers: dict) -> pa.Table:
    usual = {"kind": "ask", "status": 200, "tokens": 3, "is_stream": True, "retried": False, "verdict": "ok"}
    usual |= {"first_status": 200, "user": 7, "most_tokens": 9, "prompt_tokens": 20}
    return pa.Table.from_pylist([usual | answer for answer in answers])


def test_a_finished_load_test_is_replayed_phase_by_phase(tmp_path: Path) -> None:
    """Requests far apart take what their steps take: known here without the model."""
    first_ms, step_ms = 5 + 20 * 0.05, 5.5
    answer = {"ttft_ms": first_ms, "total_ms": first_ms + 2 * step_ms}
    table = rows(
        {"at_s": 0.0, "phase": "calm"} | answer,
        {"at_s": 1.0, "phase": "calm"} | answer,
        {"at_s": 2.0, "phase": "crowd", "ttft_ms": 2 * first_ms, "total_ms": 2 * (first_ms + 2 * step_ms)},
        {"at_s": 3.5, "phase": "crowd", "retried": True, "first_status": 503, "ttft_ms": 9e9, "total_ms": 9e9},
        {"at_s": 4.5, "phase": "crowd", "status": 0, "first_status": 0, "tokens": 0, "ttft_ms": None, "total_ms": 9e9},
        {"at_s": 5.5, "phase": "crowd", "is_stream": False, "ttft_ms": None, "total_ms": 2 * (first_ms + 2 * step_ms)},
        {"at_s": 2.7, "phase": "crowd", "kind": "history", "tokens": 0, "ttft_ms": 0.0, "total_ms": 1.0},
    )
    pq.write_table(table, tmp_path / "requests.parquet")
    calm, crowd = validate_run(tmp_path / "requests.parquet", PodConfig(), TIMES, prompt_tokens=20)
    assert (calm["phase"], calm["requests"]) == ("calm", 2)
    assert calm["clocks"]["ttft_ms_p50"]["ratio"] == pytest.approx(1.0)
    assert calm["clocks"]["total_ms_p99"]["ratio"] == pytest.approx(1.0)
    assert (crowd["phase"], crowd["requests"]) == ("crowd", 4)
    assert (crowd["refused"], crowd["failed"]) == ({"predicted": 0, "measured": 1}, 1)
    assert crowd["clocks"]["total_ms_p99"]["measured"] == pytest.approx(2 * (first_ms + 2 * step_ms))


def test_another_table_is_no_load_test(tmp_path: Path) -> None:
    pq.write_table(pa.table({"at_s": [1.0]}), tmp_path / "requests.parquet")
    with pytest.raises(ValueError, match="lacks the columns phase"):
        validate_run(tmp_path / "requests.parquet", PodConfig(), TIMES, prompt_tokens=20)
