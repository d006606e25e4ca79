"""What a group's worker makes of a model: blocks that run as the group wants it, and a DeepSpeed engine around it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from mta_ray.model.four_bit import is_four_bit
from mta_ray.model.training_mode import prepare_for_training
from mta_ray.personalize.train_config import TrainConfig
from mta_ray.pipeline.deepspeed_engine import DeepSpeedEngine, DeepSpeedSlotEngine
from mta_ray.pipeline.group import GroupConfig


def prepare_blocks(model: PreTrainedModel, group: GroupConfig) -> None:
    """Let the model's blocks run as the group wants it: once, before the first engine takes the model."""
    prepare_for_training(
        model,
        gradient_checkpointing=group.gradient_checkpointing,
        compile=group.compile,
        is_sharded=group.zero_stage == 3,
    )


def whole_engine(
    model: nn.Module, train: TrainConfig, group: GroupConfig
) -> Callable[[list[nn.Parameter]], DeepSpeedEngine]:
    """What `train_whole` calls to get its engine inside a group's worker."""
    return partial(DeepSpeedEngine, model, **_engine_settings(model, train, group))


def slot_engine(
    model: nn.Module, train: TrainConfig, group: GroupConfig
) -> Callable[[list[nn.Parameter]], DeepSpeedSlotEngine]:
    """What `train_pack` and `train_lanes` call to get their engine inside a group's worker."""
    return partial(DeepSpeedSlotEngine, model, **_engine_settings(model, train, group))


def _engine_settings(model: nn.Module, train: TrainConfig, group: GroupConfig) -> dict[str, Any]:
    """Raises ValueError for a model in 4 bits with zero_stage 3."""
    if group.zero_stage == 3 and any(is_four_bit(module) for module in model.modules()):
        raise ValueError("zero_stage 3 cannot share out weights of 4 bits: use zero_stage 0, 1 or 2")
    return {
        "zero_stage": group.zero_stage,
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "offload": group.offload,
    }
