"""Which Ray cluster a stage runs on: the job's own, the one that was named, or a small one for this run alone."""

from __future__ import annotations

import logging
import os
import signal
import sys
import sysconfig
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.data

import mta_ray

log = logging.getLogger(__name__)

JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets it for the entry point of a submitted job, and nowhere else."""
OBJECT_STORE_MIB_MIN = 75
"""Ray refuses less."""
NO_DASHBOARD_PORT = 9
"""Where nobody answers. A cluster without a dashboard still says that it has one, by default on port 8265. Another
cluster's may listen there, and Ray Train, which asks it whether its controller lives, would take our training down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """Where to run. A submitted job always runs on the cluster that it was submitted to."""

    address: str | None = None
    """An existing cluster, as `host:6379`, or `auto` for the one on this machine; none: start one for this run."""
    cpus: int | None = None
    """CPUs of the cluster that is started here; none: all of the machine."""
    gpus: int | None = None
    """GPUs of the cluster that is started here; none: all of the machine."""
    object_store_mib: int = 300
    """Shared memory for the objects of the cluster that is started here."""
    show_worker_output: bool = False
    """Whether what the workers print comes to this terminal too; it lies in Ray's log folder anyway."""

    def __post_init__(self) -> None:
        if self.object_store_mib < OBJECT_STORE_MIB_MIN:
            raise ValueError(
                f"object_store_mib is {self.object_store_mib}, wanted at least {OBJECT_STORE_MIB_MIN}; leave it at 300"
            )
        for name, count, least in (("cpus", self.cpus, 1), ("gpus", self.gpus, 0)):
            if count is not None and count < least:
                raise ValueError(f"{name} is {count}, wanted at least {least}; leave it out for all of the machine")
        if self.address == "" or (self.address or "").startswith(("http://", "https://")):
            raise ValueError(
                f"address is {self.address!r}, wanted host:port of the head node (usually port 6379), or auto; "
                "an http address takes jobs: use it as `ray job submit --address`"
            )


@contextmanager
def connect(config: ClusterConfig) -> Iterator[None]:
    """Be connected to Ray within the block; a cluster that was started for it ends with it.

    A running cluster is joined only inside its own job or by `config.address`: neither RAY_ADDRESS in the shell nor a
    cluster that happens to run on this machine is enough. Where Ray is already connected, that connection is used.
    A cluster started here asks for a token, and one that is joined is given it: Ray sees to both. (RAY_AUTH_MODE set
    here would come too late: Ray reads it when it is imported.)
    """
    if ray.is_initialized():
        yield
        return

    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": config.show_worker_output}
    if JOB_VARIABLE in os.environ:
        options |= {"address": os.environ.get("RAY_ADDRESS", "auto"), "log_to_driver": True}
    elif config.address is not None:
        options |= {"address": config.address, "runtime_env": {"py_modules": [str(Path(mta_ray.__file__).parent)]}}
    else:
        _prepare_environment()
        options |= {
            "address": "local",
            "num_cpus": config.cpus,
            "num_gpus": config.gpus,
            "object_store_memory": config.object_store_mib * 2**20,
            "include_dashboard": False,
            "dashboard_port": NO_DASHBOARD_PORT,
        }

    with _sigterm_kept():
        _init(options)
    _quiet_ray_data()
    ending: AbstractContextManager[None] = nullcontext()
    try:
        yield
    except (KeyboardInterrupt, SystemExit):  # stopped in the middle of its tasks
        ending = _nothing_on_stderr()
        raise
    finally:
        with ending:
            ray.shutdown()


def fixed_cpus(config: ClusterConfig) -> float | None:
    """CPUs of the cluster that was started for this run, and cannot grow; None in any other. Connected already."""
    if JOB_VARIABLE in os.environ or config.address is not None:
        return None
    return float(ray.cluster_resources().get("CPU", 0.0))


def room_for(config: ClusterConfig, wanted: int, *, cpus: float | int, gpus: float | int) -> int:
    """How many of `wanted` processes or groups, with so many CPUs and GPUs each, have room at once on the cluster of
    this run alone; all of them on one that may grow. Raises ValueError where not one has: Ray would wait for ever."""
    if fixed_cpus(config) is None:
        return wanted
    here = ray.cluster_resources()
    fits = wanted
    for name, each in (("CPU", cpus), ("GPU", gpus)):
        fits = min(fits, int(here.get(name, 0) / each)) if each else fits
    if fits < 1:
        raise ValueError(
            f"{cpus:g} CPUs and {gpus:g} GPUs are wanted at once, this machine's cluster has {here.get('CPU', 0):g} "
            f"and {here.get('GPU', 0):g}; ask for less (workers, and CPUs and GPUs of each), or give a larger cluster "
            "(cluster.address)"
        )
    if fits < wanted:
        log.info("%d of %d processes have room on this machine", fits, wanted)
    return fits


@contextmanager
def _nothing_on_stderr() -> Iterator[None]:
    """Ray's core, in C++, complains of every task that a shutdown drops; whoever pressed Ctrl-C knows."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Whoever handles SIGTERM goes on handling it: Ray's own handler ends the process with a trace of C++."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _init(options: dict[str, Any]) -> None:
    try:
        ray.init(**options)
    except Exception as error:
        ray.shutdown()  # what of a local cluster has started already
        if options["address"] == "local" and "timed out" in str(error):
            raise TimeoutError(
                "Ray did not start on this machine in its time; run the same command again when the machine is less "
                "busy, or with fewer --cluster.cpus"
            ) from error
        if options["address"] == "local" or not isinstance(error, (ConnectionError, RuntimeError)):
            raise
        reason = " ".join(str(error).split())
        raise ConnectionError(
            f"no Ray cluster answers at {options['address']}: {reason}; start one with `ray start --head`, "
            "or leave the address out to run on this machine"
        ) from error
    cpus, gpus = (ray.cluster_resources().get(kind, 0) for kind in ("CPU", "GPU"))
    log.info("ray %s: %.0f CPUs, %.0f GPUs", options["address"], cpus, gpus)


def _quiet_ray_data() -> None:
    """Progress is shown by us, and an error in a stage's own function comes back as it was raised, to be told once.

    Ray Data would print its plan, bars and tracebacks too; they go on lying in its log file.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True
    for handler in logging.getLogger("ray.data").handlers:
        is_rays = type(handler).__module__.startswith("ray.")  # others' may stand there too
        if is_rays and isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.CRITICAL + 1)


def _prepare_environment() -> None:
    """What the processes of a cluster started here inherit."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

    # A checkout that is not installed and not the current folder: workers would not find the package.
    root = str(Path(mta_ray.__file__).parent.parent)
    if root != sysconfig.get_path("purelib"):
        _put_first("PYTHONPATH", root)

    # Programs that pip put beside Python (ninja, which DeepSpeed calls), where the environment is not activated.
    _put_first("PATH", str(Path(sys.executable).parent))


def _put_first(variable: str, folder: str) -> None:
    folders = [entry for entry in os.environ.get(variable, "").split(os.pathsep) if entry and entry != folder]
    os.environ[variable] = os.pathsep.join([folder, *folders])
