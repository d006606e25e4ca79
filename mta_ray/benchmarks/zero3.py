"""What ZeRO 3 leaves of the frozen base on each of two workers, and whether the losses are those of ZeRO 1.

    python -m mta_ray.benchmarks.zero3

Two processes over gloo train the same pack, without Ray; the base is a random Llama of 34 million parameters.
"""

from __future__ import annotations

import json
import os
import random
import socket
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from mta_ray.benchmarks.random_base import any_tokenizer
from mta_ray.model.backbone import Backbone, RoutedModel
from mta_ray.model.batches import Tokens
from mta_ray.personalize.lanes import Job
from mta_ray.personalize.train_config import TrainConfig
from mta_ray.personalize.training import train_pack
from mta_ray.pipeline.deepspeed_engine import DeepSpeedSlotEngine

STAGES = (1, 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Zero3Config:
    """The base model, and the pack that is trained over it."""

    hidden: int = 512
    layers: int = 8
    vocabulary: int = 8192
    workers: int = 2
    adapters: int = 4
    steps: int = 8
    seed: int = 0


def zero3_benchmark(config: Zero3Config) -> dict[str, Any]:
    """`zero3_held_share` of the worker that holds most, and `zero3_loss_difference` to ZeRO 1's curve, relative."""
    found: dict[int, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="mta-zero3-") as folder:
        for stage in STAGES:
            torch.multiprocessing.spawn(_worker, (config, stage, _free_port(), folder), nprocs=config.workers)
            found[stage] = [json.loads((Path(folder) / f"{stage}.{n}").read_text()) for n in range(config.workers)]
    pairs = [
        (one, other)
        for one_adapter, other_adapter in zip(found[3][0]["losses"], found[1][0]["losses"], strict=True)
        for one, other in zip(one_adapter, other_adapter, strict=True)
    ]
    return {
        "zero3_held_share": max(worker["held_share"] for worker in found[3]),
        "zero3_loss_difference": max(abs(one - other) / other for one, other in pairs),
        "zero3": {
            "base_parameters": found[3][0]["base_parameters"],
            "held_shares": {stage: [worker["held_share"] for worker in found[stage]] for stage in STAGES},
            "rss_mib": {stage: [worker["rss_mib"] for worker in found[stage]] for stage in STAGES},
            "losses": {stage: found[stage][0]["losses"] for stage in STAGES},
            "config": asdict(config),
        },
    }


def held_share(parameters: Iterable[nn.Parameter]) -> float:
    """Elements that this worker has in memory, pieces and what is whole alike, over those of the whole model."""
    held = whole = 0
    for parameter in parameters:
        piece = getattr(parameter, "ds_tensor", None)  # ZeRO 3's: this worker's part, beside the parameter itself
        is_whole = piece is None or parameter.shape == parameter.ds_shape
        held += (0 if piece is None else piece.numel()) + (parameter.numel() if is_whole else 0)
        whole += parameter.numel() if piece is None else parameter.ds_numel
    return held / whole


def _worker(rank: int, config: Zero3Config, stage: int, port: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(config.workers)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")

    # 1. the frozen base, whole on every worker until the engine is made
    torch.manual_seed(config.seed)
    llama = LlamaConfig(
        hidden_size=config.hidden,
        intermediate_size=config.hidden * 11 // 4,
        num_hidden_layers=config.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=config.vocabulary,
        max_position_embeddings=512,
        pad_token_id=0,
    )
    routed = RoutedModel(Backbone(LlamaForCausalLM(llama).eval(), any_tokenizer(), "llama", "random"))
    base = list(routed.model.parameters())

    # 2. a pack
    train = TrainConfig(rank=8, examples_per_step=2, steps=config.steps, learning_rate=1e-3)
    engine = partial(
        DeepSpeedSlotEngine,
        routed.model,
        zero_stage=stage,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
    )
    shares, rss_mib = [], []

    def look(step: int) -> None:
        shares.append(held_share(base))
        rss_mib.append(psutil.Process().memory_info().rss / 2**20)

    result = train_pack(routed, _jobs(config), train, make_engine=engine, on_step=look)
    told = {"held_share": max(shares), "rss_mib": max(rss_mib), "losses": result.losses}
    told |= {"base_parameters": sum(getattr(p, "ds_numel", p.numel()) for p in base)}
    (Path(folder) / f"{stage}.{rank}").write_text(json.dumps(told))
    torch.distributed.destroy_process_group()


def _jobs(config: Zero3Config) -> list[Job]:
    draw = random.Random(config.seed)

    def row() -> Tokens:
        length = draw.randint(8, 32)
        return Tokens(tuple(draw.randrange(config.vocabulary) for _ in range(length)), length // 2)

    return [Job(id=f"user {number}", examples=[row() for _ in range(6)]) for number in range(config.adapters)]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


if __name__ == "__main__":
    print(json.dumps(zero3_benchmark(Zero3Config()), indent=2))
