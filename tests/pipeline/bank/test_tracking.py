"""Curves of a bank's training, read back with TensorBoard's own reader and MLflow's own client."""

from __future__ import annotations

import math
import sys
import threading
import time
from pathlib import Path

import pytest

from mta_ray.pipeline.bank import tracking
from mta_ray.pipeline.bank.ledger import Ledger
from mta_ray.pipeline.bank.tracking import EXPERIMENT, Point, Tracker, TrackingConfig, check_tracking, open_tracker


def trained(tracker: Tracker, first: int = 0) -> None:
    """Two adapters make three steps each, the second from its fourth on."""
    now_s = 0.0
    ledger = Ledger(total=2, already_done=0, clock=lambda: now_s)
    ledger.group_started(0, workers=1, devices=1, lanes=2)
    ledger.adapter_started(0, 0, budget=3, done=first)
    ledger.adapter_started(0, 1, budget=9, done=first + 3)
    for n in range(first + 1, first + 4):
        now_s += 2
        steps, losses = {0: n, 1: n + 3}, {0: 3.0 / n, 1: 0.5 if n < 3 else math.nan}
        ledger.stepped(0, steps, losses, tokens=100, seconds=2.0)
        tracker.stepped(steps, losses)
        tracker.observe(ledger.snapshot())
    ledger.adapter_finished(0, 0)
    tracker.observe(ledger.snapshot())


def test_tensorboard_reads_the_curves(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = open_tracker(TrackingConfig(kind="tensorboard", uri=str(tmp_path / "curves")), "abc")
    assert tracker is not None
    before_s = time.time()
    trained(tracker)
    assert tracker.close() == ""

    events = EventAccumulator(str(tmp_path / "curves" / "abc"))
    events.Reload()
    told = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert told["loss/adapter-00000"] == [(1, 3.0), (2, 1.5), (3, 1.0)]
    assert told["loss/adapter-00001"][:2] == [(4, 0.5), (5, 0.5)]
    step, value = told["loss/adapter-00001"][2]
    assert step == 6 and math.isnan(value)
    assert told["bank/tokens_per_s"][:3] == [(5, 50.0), (7, 50.0), (9, 50.0)]
    assert told["bank/adapters_done"] == [(5, 0.0), (7, 0.0), (9, 0.0), (9, 1.0)]
    assert told["bank/loss"][:2] == [(5, 1.75), (7, 1.0)]
    assert abs(events.Scalars("bank/loss")[0].wall_time - before_s) < 60


def test_mlflow_reads_the_curves_and_a_training_that_goes_on_goes_on_in_its_run(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    config = check_tracking(TrackingConfig(kind="mlflow", uri=uri))
    client = MlflowClient(tracking_uri=uri)
    for first in (0, 3):
        tracker = open_tracker(config, "abc")
        assert tracker is not None
        trained(tracker, first)
        assert tracker.close() == ""
        experiment = client.get_experiment_by_name(EXPERIMENT)
        [run] = client.search_runs([experiment.experiment_id])
        assert run.info.status == "FINISHED" and run.info.run_name == "abc"

    def told(curve: str) -> list[tuple[int, float]]:
        return sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, curve))

    assert told("loss/adapter-00000") == [(n, 3.0 / n) for n in range(1, 7)]
    assert told("loss/adapter-00001")[:2] == [(4, 0.5), (5, 0.5)]
    assert told("bank/adapters_done")[:4] == [(5, 0.0), (7, 0.0), (9, 0.0), (9, 1.0)]
    assert told("bank/tokens_per_s")[0] == (5, 50.0)


def test_nothing_is_tracked_unless_asked_for() -> None:
    assert open_tracker(TrackingConfig(), "abc") is None


@pytest.mark.parametrize(
    ("kind", "uri", "package"),
    [
        ("mlflow", "http://host:5000", "mlflow"),
        ("mlflow", "sqlite:////a.db", "alembic"),
        ("tensorboard", "curves", "tensorboardX"),
    ],
)
def test_a_missing_package_is_told_at_the_start(
    monkeypatch: pytest.MonkeyPatch, kind: str, uri: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not there
    with pytest.raises(ValueError, match=f"the Python package {package} is not installed; pip install"):
        check_tracking(TrackingConfig(kind=kind, uri=uri))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "uri"),
    [
        ("tensorboard", ""),
        ("tensorboard", "s3://bucket/curves"),
        ("mlflow", ""),
        ("mlflow", "mlruns"),
        ("mlflow", "file:///mlruns"),
        ("mlflow", "sqlite:///relative.db"),
    ],
)
def test_a_wrong_setting_is_told(kind: str, uri: str) -> None:
    with pytest.raises(ValueError, match=r"tracking\.uri is '"):
        TrackingConfig(kind=kind, uri=uri)  # type: ignore[arg-type]


def test_the_folder_is_found_from_everywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert check_tracking(TrackingConfig(kind="tensorboard", uri="curves")).uri == str(tmp_path / "curves")
    uri = "postgresql://host/mlflow"
    assert check_tracking(TrackingConfig(kind="mlflow", uri=uri)).uri == uri


def test_a_server_that_does_not_answer_is_told_at_the_start_without_the_password() -> None:
    with pytest.raises(ConnectionError, match="MLflow does not take the curves") as told:
        open_tracker(TrackingConfig(kind="mlflow", uri="http://ann:secret@127.0.0.1:9"), "abc")
    assert "secret" not in str(told.value)


def test_what_cannot_be_written_stops_nothing_and_is_told_at_the_end() -> None:
    written: list[Point] = []

    def write(points: list[Point]) -> None:
        for point in points:
            if point.step == 2:
                raise OSError("no room\nat http://ann:secret@host")
            written.append(point)

    tracker = Tracker(write, lambda: None)
    for step in (1, 2, 3):
        tracker.stepped({0: step}, {0: 1.0})
        time.sleep(0.2)
    assert tracker.close() == "tracking: 1 points were not written: no room at http://host"
    assert [point.step for point in written] == [1, 3]


def test_a_slow_server_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "CLOSE_S", 0.2)
    monkeypatch.setattr(tracking, "POINTS_MAX", 10)
    go_on = threading.Event()
    tracker = Tracker(lambda points: go_on.wait(30) and None, lambda: None)
    started_s = time.monotonic()
    for step in range(50):
        tracker.stepped({0: step}, {0: 1.0})
    told = tracker.close()
    assert time.monotonic() - started_s < 5
    assert told.startswith("tracking: ") and "were not written: more than 10 wait" in told
    go_on.set()
