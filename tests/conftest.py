"""What every test may ask for, and how the tests see the machine: one thread each, nothing told to anyone."""

from __future__ import annotations

import logging
import os
import secrets
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import pytest
from pytest import TestReport

if TYPE_CHECKING:
    from s3_server import S3Server

ROOT = Path(__file__).parent.parent

# Before torch and Ray are imported, and inherited by every process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# Ray's workers run at 15 otherwise, and starve beside whatever the other half of the test run does.
os.environ.update(RAY_worker_niceness="0")
# No node of these clusters is ever drained, and who watches for that is one more process for each training group.
os.environ.update(RAY_TRAIN_ENABLE_PREEMPTION_WATCHER="0")
os.environ.pop("RAY_ADDRESS", None)  # no test joins a cluster that it did not start
# Worker processes find the package, and programs that pip put beside Python, installed and activated or not.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


LONG_FILES = [
    "test_jobs",
    "test_killed_training",
    "test_build_bank",
    "test_crowd",
    "test_killed_replicas",
    "test_what_if",
    "test_simulations",
    "test_app",
    "test_bad_requests",
]
"""Where two run side by side, the long ones come first, so that neither waits for the other in the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole files, those of LONG_FILES before all others, else as they were found."""
    place = {name: n for n, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


class _TellsAtOnce:
    """What failed, when it does: a run that is ended from outside never comes to its summary."""

    def __init__(self, config: pytest.Config) -> None:
        self._plugins = config.pluginmanager

    def pytest_runtest_logreport(self, report: TestReport) -> None:
        terminal = self._plugins.get_plugin("terminalreporter")
        if report.failed and terminal is not None:
            why = getattr(getattr(report.longrepr, "reprcrash", None), "message", str(report.longrepr)[-200:])
            first = next(iter(why.splitlines()), "")[:200]
            terminal.write_line(f"\n{report.when} of {report.nodeid}, {report.duration:.0f} s: {first}")


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        config.pluginmanager.register(_TellsAtOnce(config))


@pytest.fixture(autouse=True)
def _our_log() -> None:
    """Our loggers speak, whatever libraries and other tests have made of them and of the root."""
    for name, logger in logging.root.manager.loggerDict.items():
        if name.split(".")[0] == "mta_ray" and isinstance(logger, logging.Logger):
            logger.disabled, logger.propagate = False, True
            logger.setLevel(logging.NOTSET)
    logging.getLogger("mta_ray").setLevel(logging.INFO)
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module", autouse=True)
def _gives_back_its_cpus() -> Iterator[None]:
    """A file whose actors stay would let the next one wait for its own for ever."""
    yield
    deadline_s = time.monotonic() + 90
    while (taken := _taken()) and time.monotonic() < deadline_s:
        time.sleep(0.2)
    assert not taken, taken


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, TestReport, TestReport]:
    """What took minutes to fail has probably waited: say, in the one line of the summary, for whom."""
    report = yield
    if report.failed and call.duration > 300 and (crash := getattr(report.longrepr, "reprcrash", None)):
        with suppress(Exception):  # the cluster may be what is broken
            crash.message = f"{_taken() or 'all CPUs are free'}; {crash.message}"
    return report


def _taken() -> str:
    """Of the CPUs of the cluster that this process is connected to; empty if all are free."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return ""
    free, whole = (of().get("CPU", 0) for of in (ray.available_resources, ray.cluster_resources))
    actors = [actor["ActorClassName"] for actor in ray._private.state.actors().values() if actor["State"] == "ALIVE"]
    return f"{whole - free:g} of {whole:g} CPUs are taken; there are {sorted(actors)}" if free < whole else ""


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A small Ray cluster on this machine, for this test run alone, that serves as the one of `mta serve` does."""
    from mta_ray.cluster import ClusterConfig, connect
    from mta_ray.serving.local import serving_environment

    with (
        # what a node tells of its metrics is two seconds old at most, not ten: some tests wait for it
        mock.patch.dict(os.environ, RAY_metrics_report_interval_ms="2000"),
        serving_environment(),
        connect(ClusterConfig(cpus=2, object_store_mib=150)),
    ):
        yield


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """An S3 server on a free port of this machine, as long as the test run."""
    from s3_server import S3Server

    server = S3Server()
    yield server
    server.stop()


@pytest.fixture
def s3(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty bucket of that server; this process and those it starts know the way there."""
    import fsspec

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_server.url)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # botocore's own tries are not what is looked at
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("MTA_CACHE", str(tmp_path / "cache"))
    bucket = f"bucket-{secrets.token_hex(4)}"
    fsspec.filesystem("s3").mkdir(bucket)
    yield f"s3://{bucket}"
    s3_server.watch(None)


@pytest.fixture(scope="session")
def tiny_model():  # noqa: ANN201
    """A function (seed) -> a random two-layer Llama of width 64 with the embedded model's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from mta_ray.model.backbone import Backbone, embedded_path, fingerprint

    def make(seed: int = 0) -> Backbone:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=30522,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            pad_token_id=0,
            bos_token_id=101,
            eos_token_id=102,
        )
        model = LlamaForCausalLM(config).eval()
        return Backbone(model, AutoTokenizer.from_pretrained(embedded_path()), "tiny", fingerprint(model))

    return make
