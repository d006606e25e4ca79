"""Curves of a bank's training, for TensorBoard or MLflow: each adapter's loss by its own step, and the whole's rates.

Who trains only hands points over; a thread writes them, and what it cannot write is counted and told at the end.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from mta_ray.pipeline.bank.snapshot import Snapshot
from mta_ray.pipeline.bank.table import mean_loss

log = logging.getLogger(__name__)

PACKAGES = {"none": (), "tensorboard": ("tensorboardX",), "mlflow": ("mlflow", "alembic")}
"""What each kind imports; alembic is MLflow's for databases."""
EXPERIMENT = "mta bank"
"""The MLflow experiment of all banks' runs."""
POINTS_MAX = 100_000
"""So many points may wait for a slow server; more are dropped."""
BATCH_MAX = 1000
"""Points that MLflow takes in one call."""
CLOSE_S = 30.0
"""The end waits so long for the last points."""
HTTP_RETRIES = "2"
"""MLflow's own 7 keep a server that does not answer secret for minutes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackingConfig:
    """Where the curves of the training go."""

    kind: Literal["none", "tensorboard", "mlflow"] = "none"
    """Whose format they have; mlflow needs the extra mta-ray[mlflow]."""
    uri: str = ""
    """TensorBoard: a folder. MLflow: a tracking URI such as http://host:5000 or sqlite:////absolute/mlflow.db."""

    def __post_init__(self) -> None:
        if self.kind == "tensorboard" and (not self.uri or "://" in self.uri):
            raise ValueError(
                f"tracking.uri is {self.uri!r}, wanted a folder for TensorBoard; give --tracking.uri FOLDER"
            )
        if self.kind == "mlflow" and not re.match(r"databricks|sqlite:////|(?!sqlite|file)[a-z+0-9]+://", self.uri):
            raise ValueError(
                f"tracking.uri is {_bare(self.uri)!r}, wanted MLflow's tracking URI; give --tracking.uri "
                "http://HOST:5000 or sqlite:////ABSOLUTE/mlflow.db (MLflow keeps no plain folders any more)"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One value of one curve."""

    curve: str
    step: int
    value: float
    at_s: float
    """Since the epoch."""


def check_tracking(config: TrackingConfig) -> TrackingConfig:
    """The config with its folder as an absolute path, at the start of a stage; raises where the package is missing."""
    missing = [package for package in PACKAGES[config.kind] if importlib.util.find_spec(package) is None]
    if missing:
        wanted = "mta-ray[mlflow]" if config.kind == "mlflow" else missing[0]
        raise ValueError(
            f"tracking.kind is {config.kind!r}, and the Python package {missing[0]} is not installed; "
            f"pip install '{wanted}', or leave --tracking.kind at none"
        )
    return (
        replace(config, uri=str(Path(config.uri).expanduser().absolute())) if config.kind == "tensorboard" else config
    )


def open_tracker(config: TrackingConfig, run: str) -> Tracker | None:
    """Who takes the points, in the process that holds the ledger; none where nothing is tracked.

    `run` names the training: a training that goes on goes on in the same TensorBoard folder or MLflow run. Raises where
    the folder cannot be written or the server does not answer.
    """
    config = check_tracking(config)
    if config.kind == "tensorboard":
        return Tracker(*_tensorboard(config.uri, run))
    if config.kind == "mlflow":
        return Tracker(*_mlflow(config.uri, run))
    return None


class Tracker:
    """Takes points at once, and writes them in a thread of its own. `close` it."""

    def __init__(self, write: Callable[[list[Point]], None], end: Callable[[], None]) -> None:
        self._write, self._end = write, end
        self._points: queue.Queue[Point | None] = queue.Queue(POINTS_MAX)
        self._lost = 0
        self._error = ""
        self._thread = threading.Thread(target=self._run, name="write curves", daemon=True)
        self._thread.start()

    def stepped(self, steps: dict[int, int], losses: dict[int, float]) -> None:
        """The loss of each adapter in nats, at the step of its own that it has reached."""
        for adapter in steps.keys() & losses.keys():
            self._add(f"loss/adapter-{adapter:05d}", steps[adapter], losses[adapter])

    def observe(self, snapshot: Snapshot) -> None:
        """Tokens per second, adapters done and the mean loss (nats), by the steps of all adapters together."""
        self._add("bank/tokens_per_s", snapshot.steps, snapshot.tokens_per_s)
        self._add("bank/adapters_done", snapshot.steps, float(snapshot.adapters_done))
        loss = mean_loss(snapshot)
        if loss is not None:
            self._add("bank/loss", snapshot.steps, loss)

    def close(self) -> str:
        """Write what waits. Tells what could not be written and why; empty where all was."""
        with suppress(queue.Full):
            self._points.put(None, timeout=CLOSE_S)
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            self._error = self._error or f"not done within {CLOSE_S:.0f} s"
            self._lost += self._points.qsize()
        return f"tracking: {self._lost:,} points were not written: {self._error}" if self._error else ""

    def _add(self, curve: str, step: int, value: float) -> None:
        try:
            self._points.put_nowait(Point(curve=curve, step=step, value=value, at_s=time.time()))
        except queue.Full:
            self._failed(1, f"more than {POINTS_MAX:,} wait")

    def _run(self) -> None:
        is_last = False
        while not is_last:
            # 1. what waits, up to a batch
            batch = [self._points.get()]
            while len(batch) < BATCH_MAX and batch[-1] is not None:
                try:
                    batch.append(self._points.get_nowait())
                except queue.Empty:
                    break
            is_last = batch[-1] is None

            # 2. out with it; the training goes on without those that nobody takes
            points = [point for point in batch if point is not None]
            try:
                if points:
                    self._write(points)
                if is_last:
                    self._end()
            except Exception as error:
                self._failed(len(points), _bare(str(error)) or repr(error))

    def _failed(self, points: int, why: str) -> None:
        if not self._error:
            log.warning("tracking: points could not be written, the training goes on: %s", why)
        self._lost += points
        self._error = why


def _tensorboard(folder: str, run: str) -> tuple[Callable[[list[Point]], None], Callable[[], None]]:
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(Path(folder) / run))

    def write(points: list[Point]) -> None:
        for point in points:
            writer.add_scalar(point.curve, point.value, point.step, walltime=point.at_s)
        writer.flush()

    return write, writer.close


def _mlflow(uri: str, run: str) -> tuple[Callable[[list[Point]], None], Callable[[], None]]:
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", HTTP_RETRIES)
    from mlflow.entities import Metric
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    try:
        client = MlflowClient(tracking_uri=uri)
        known = client.get_experiment_by_name(EXPERIMENT)
        experiment = known.experiment_id if known else client.create_experiment(EXPERIMENT)
        runs = client.search_runs([experiment], filter_string=f"tags.mta_run = '{run}'", max_results=1)
        if runs:
            id = runs[0].info.run_id
            client.update_run(id, status="RUNNING")
        else:
            id = client.create_run(experiment, run_name=run, tags={"mta_run": run}).info.run_id
    except MlflowException as error:
        raise ConnectionError(f"MLflow does not take the curves: {_bare(str(error))}") from error

    def write(points: list[Point]) -> None:
        metrics = [Metric(point.curve, point.value, int(point.at_s * 1000), point.step) for point in points]
        client.log_batch(id, metrics=metrics)

    return write, lambda: client.set_terminated(id)


def _bare(text: str) -> str:
    """On one line, and without the name and password that an address may hold."""
    return re.sub(r"//[^/@\s]*@", "//", " ".join(text.split()))
