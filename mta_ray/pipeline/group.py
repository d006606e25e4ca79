"""A training group: W workers of one TorchTrainer. What they train comes from the caller.

Ray Train's own processes import this file too: what only a worker needs (models, engines) lies elsewhere.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypeVar

import psutil
import ray
import ray.train
import torch
from ray.train.torch import TorchTrainer
from ray.train.torch.config import _TorchBackend
from ray.util.placement_group import PlacementGroup, remove_placement_group

log = logging.getLogger(__name__)
STORAGE = "mta-train-"
"""Begins the name of a group's temporary folder; its process's id comes next."""
ValueT = TypeVar("ValueT")


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupConfig:
    """The workers of one training group."""

    workers: int = 1
    """Workers (W) that share one pack by DeepSpeed ZeRO."""
    cpus_per_worker: int = 0
    """CPUs of each worker, all of which torch uses; 0: the cluster's, shared out over groups and workers."""
    gpus_per_worker: int = 0
    """GPUs of each worker."""
    zero_stage: int = 1
    """DeepSpeed ZeRO: 0 none, 1 shards optimiser state, 2 gradients too, 3 the frozen base too."""
    offload: bool = False
    """Optimiser state (with stage 3 also the base) in host memory."""
    accelerators: tuple[str, ...] = ()
    """Kinds of GPU as Ray names them (`A100`, `H100`); group n takes the n-th, and so round. None: any."""
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Of a group's workers over nodes, as Ray's placement groups name it."""
    gradient_checkpointing: bool = False
    """Keep no activations inside the model's blocks and compute them anew in the backward pass: less memory, more
    time, the same results."""
    compile: bool = False
    """torch.compile for the model's blocks: a slower start, the same results up to rounding. On CPUs no step became
    faster; GPUs are not measured yet. Not with zero_stage 3."""

    def __post_init__(self) -> None:
        if self.workers < 1 or self.cpus_per_worker < 0 or self.gpus_per_worker < 0:
            raise ValueError(f"got {self}; wanted at least one worker and no negative number")
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"zero_stage must be 0, 1, 2 or 3, got {self.zero_stage}")
        if self.zero_stage == 3 and self.compile:
            raise ValueError("compile cannot see the weights that zero_stage 3 gathers: use zero_stage 0, 1 or 2")

    @property
    def device(self) -> str:
        return "cuda" if self.gpus_per_worker else "cpu"

    @property
    def least_cpus(self) -> int:
        """Of all workers together, without which the group cannot start."""
        return self.workers * max(1, self.cpus_per_worker)

    @property
    def gpus(self) -> int:
        """Of all workers together."""
        return self.workers * self.gpus_per_worker


def cpus_per_worker(config: GroupConfig, groups: int) -> int:
    """CPUs for each worker of `groups` groups on the connected cluster."""
    if config.cpus_per_worker:
        return config.cpus_per_worker
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    sizes = [int(node.get("CPU", 0)) for node in nodes if node.get("GPU", 0) >= config.gpus_per_worker]
    wanted = groups * config.workers
    cpus = max(1, sum(sizes) // wanted)
    while cpus > 1 and sum(size // cpus for size in sizes) < wanted:  # a worker's CPUs are on one node
        cpus -= 1
    return cpus


def start_group(
    loop: Callable[[dict[str, Any]], None], settings: dict[str, Any], config: GroupConfig, cpus: int, number: int = 0
) -> ray.ObjectRef:
    """Run `loop(settings)`, a module's function, on the workers of group `number`, as a task to wait for. Results are
    what it publishes.

    Waiting raises a failed worker's error, inside Ray Train's TrainingFailedError. The task's processes are told which
    cluster is theirs: without an address Ray's State API takes the latest one that was started on the machine, and Ray
    Train, which asks it whether its controller lives, would take the group down.
    """
    here = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    # max_calls: the task's process ends with it, and takes Ray Train's controller along, which would stay otherwise.
    task = ray.remote(num_cpus=0, max_retries=0, max_calls=1, runtime_env={"env_vars": here})
    return task(_run_group).remote(_Loop(loop.__module__, loop.__name__), [ray.put(settings)], config, cpus, number)


def sweep_devices() -> int:
    """Free what groups of this job had set apart, or were still waiting for, and whose controller has died; how many
    placement groups of this job's actors are left.

    Ray keeps a placement group until both its creator and its job have ended: one that waits would take the next room
    there is, for nobody. Ray Train leaves that to a process which asks the dashboard, and a cluster of one machine has
    none. Nor has Ray a public way to ask who made a placement group: where a later version has not this one either,
    nothing is swept, and one is told.
    """
    try:
        ours = _placement_groups_of_actors()
    except (AttributeError, ImportError) as error:
        _say_once(f"Ray hides what killed controllers leave behind ({error}): it is freed when the command ends")
        return 0
    for name, is_left_behind in ours.items():
        if is_left_behind:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(name)))
    return len(ours)


def _placement_groups_of_actors() -> dict[bytes, bool]:
    """Those of this job that an actor has made and nobody has removed; whether that actor is dead."""
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData

    job, nobody = ray.get_runtime_context().get_job_id(), ray.ActorID.nil().binary()
    told = ray._private.state.state._connect_and_get_accessor().get_placement_group_table()
    rows = [PlacementGroupTableData.FromString(row) for row in told]
    return {
        row.placement_group_id: row.creator_actor_dead
        for row in rows
        if row.creator_job_id.hex() == job
        and row.creator_actor_id != nobody
        and row.state != PlacementGroupTableData.REMOVED
    }


_say_once = cache(log.warning)


@dataclass(frozen=True, slots=True)
class _Loop:
    """A loop that is imported where it runs: on its way there it passes through processes that do nothing with it."""

    module: str
    name: str

    def __call__(self, sent: dict[str, Any]) -> None:
        loop = getattr(import_module(self.module), self.name)
        loop(ray.get(sent["settings"]) | {"cpus": sent["cpus"]})


def _run_group(loop: _Loop, settings: list[ray.ObjectRef], config: GroupConfig, cpus: int, number: int) -> None:
    resources: dict[str, float] = {"CPU": cpus}
    if config.gpus_per_worker:
        resources["GPU"] = config.gpus_per_worker
    _remove_storage_of_the_dead()
    with tempfile.TemporaryDirectory(prefix=f"{STORAGE}{os.getpid()}-") as storage:
        trainer = _Trainer(
            loop,
            train_loop_config={"settings": settings[0], "cpus": cpus},
            scaling_config=ray.train.ScalingConfig(
                num_workers=config.workers,
                use_gpu=bool(config.gpus_per_worker),
                resources_per_worker=resources,
                placement_strategy=config.placement,
                accelerator_type=config.accelerators[number % len(config.accelerators)]
                if config.accelerators
                else None,
            ),
            run_config=ray.train.RunConfig(
                name="group",
                storage_path=storage,
                # A group that dies is started again by whoever started it, who gives its work to others meanwhile.
                failure_config=ray.train.FailureConfig(max_failures=0, max_preemption_failures=0),
            ),
            torch_config=_Listening(backend="nccl" if config.gpus_per_worker else "gloo"),
        )
        trainer.fit()


class _Trainer(TorchTrainer):
    def _create_default_callbacks(self) -> list[Any]:
        """Without the process that frees what a killed controller had set apart: it asks the dashboard every second,
        for ever then, and a cluster of one machine has none. `sweep_devices` does its work."""
        callbacks: list[Any] = super()._create_default_callbacks()
        return [one for one in callbacks if type(one).__name__ != "PlacementGroupCleanerCallback"]


def _remove_storage_of_the_dead() -> None:
    """What Ray Train had to write for groups whose process was killed: a few small files each."""
    for path in Path(tempfile.gettempdir()).glob(f"{STORAGE}*-*"):
        pid = path.name.removeprefix(STORAGE).split("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


_asked_to_stop = threading.Event()


def is_asked_to_stop() -> bool:
    """Whether this worker's process has been sent SIGTERM: the loop keeps what it has, and ends."""
    return _asked_to_stop.is_set()


def _listen_for_sigterm() -> None:
    # Ray Train runs the loop in a thread, and only the main thread may say what a signal does.
    signal.signal(signal.SIGTERM, lambda *_: _asked_to_stop.set())


class _ListeningBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        super().on_start(worker_group, backend_config)
        worker_group.execute(_listen_for_sigterm)


class _Listening(ray.train.torch.TorchConfig):
    """Torch's process group, in workers that a SIGTERM asks to stop, where Ray's own would end at once."""

    @property
    def backend_cls(self) -> type:
        return _ListeningBackend


def broadcast_object(value: ValueT) -> ValueT:
    """The first worker's value, on every worker of the group."""
    if torch.distributed.get_world_size() == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def gather_objects(value: ValueT) -> list[ValueT]:
    """Every worker's value, on every worker of the group, in the order of their ranks."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def is_first_worker() -> bool:
    """Whether this worker writes what the group gives."""
    return ray.train.get_context().get_world_rank() == 0


def start_worker(cpus: int) -> None:
    """First line of a loop: threads as many as CPUs, and no warnings meant for library authors."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(max(1, cpus))
