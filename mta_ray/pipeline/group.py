"""A training group: W workers of one TorchTrainer with a DeepSpeed engine. What they train comes from the caller."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchTrainer
from torch import nn

from mta_ray.personalize.training import Engine, TrainConfig
from mta_ray.pipeline.deepspeed_engine import DeepSpeedEngine


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

    def __post_init__(self) -> None:
        if self.workers < 1 or self.cpus_per_worker < 0 or self.gpus_per_worker < 0:
            raise ValueError(f"got {self}; wanted at least one worker and no negative number")
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"zero_stage must be 0, 1, 2 or 3, got {self.zero_stage}")

    @property
    def device(self) -> str:
        return "cuda" if self.gpus_per_worker else "cpu"


def cpus_per_worker(config: GroupConfig, groups: int) -> int:
    """CPUs for each worker of `groups` groups on the connected cluster."""
    return config.cpus_per_worker or max(1, int(ray.cluster_resources().get("CPU", 1)) // (groups * config.workers))


def start_group(
    loop: Callable[[dict[str, Any]], None], settings: dict[str, Any], config: GroupConfig, cpus: int
) -> ray.ObjectRef:
    """Run `loop(settings)` on the group's workers, as a task to wait for. Results are what the loop publishes.

    Waiting raises a failed worker's error, inside Ray Train's TrainingFailedError. The task's processes are told which
    cluster is theirs: without an address Ray's State API takes the latest one that was started on the machine, and Ray
    Train, which asks it whether its controller lives, would take the group down.
    """
    here = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    # max_calls: the task's process ends with it, and takes Ray Train's controller along, which would stay otherwise.
    task = ray.remote(num_cpus=0, max_retries=0, max_calls=1, runtime_env={"env_vars": here})
    return task(_run_group).remote(loop, settings, config, cpus)


def _run_group(
    loop: Callable[[dict[str, Any]], None], settings: dict[str, Any], config: GroupConfig, cpus: int
) -> None:
    resources: dict[str, float] = {"CPU": cpus}
    if config.gpus_per_worker:
        resources["GPU"] = config.gpus_per_worker
    with tempfile.TemporaryDirectory(prefix="mta-train-") as storage:
        trainer = TorchTrainer(
            loop,
            train_loop_config=settings | {"cpus": cpus},
            scaling_config=ray.train.ScalingConfig(
                num_workers=config.workers, use_gpu=bool(config.gpus_per_worker), resources_per_worker=resources
            ),
            run_config=ray.train.RunConfig(name="group", storage_path=storage),
            torch_config=ray.train.torch.TorchConfig(backend="nccl" if config.gpus_per_worker else "gloo"),
        )
        trainer.fit()


def engine_factory(
    model: nn.Module, train: TrainConfig, group: GroupConfig, *, per_slot: bool
) -> Callable[[list[nn.Parameter]], Engine]:
    """What `train_pack` and `train_whole` call to get their engine inside a group's worker."""

    def make(trainable: list[nn.Parameter]) -> Engine:
        return DeepSpeedEngine(
            model,
            trainable,
            zero_stage=group.zero_stage,
            weight_decay=train.weight_decay,
            max_grad_norm=train.max_grad_norm,
            per_slot=per_slot,
            offload=group.offload,
        )

    return make


def is_first_worker() -> bool:
    """Whether this worker writes what the group gives."""
    return ray.train.get_context().get_world_rank() == 0


def start_worker(cpus: int) -> None:
    """First line of a loop: threads as many as CPUs, and no warnings meant for library authors."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(max(1, cpus))
