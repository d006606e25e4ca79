"""Checkpointed blocks over real workers: every ZeRO stage trains the pack that plain torch trains in one process."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "model"))

from architectures import random_backbone

from mta_ray.model.backbone import RoutedModel
from mta_ray.model.batches import tokenise
from mta_ray.personalize.lanes import Job
from mta_ray.personalize.train_config import TrainConfig
from mta_ray.personalize.training import PackResult, train_pack
from mta_ray.pipeline.group import GroupConfig
from mta_ray.pipeline.group_engines import prepare_blocks, slot_engine

CONFIG = TrainConfig(rank=2, alpha=4.0, learning_rate=1e-2, steps=4, examples_per_step=2, max_grad_norm=0.05)
TEXTS = ("a robot wakes up", "love in paris at night", "an old war", "two sisters and a dog run home", "space")
WIDTH = 4200
"""Times the hidden size, more than 100,000: below that, stage 3 keeps a weight whole and would not be tested."""
FLOAT, HALF = torch.float32, torch.bfloat16
SETTINGS = [
    ("llama", 1, FLOAT),
    ("llama", 3, FLOAT),
    ("gpt_neox", 3, FLOAT),
    ("bert", 3, FLOAT),
    ("llama", 1, HALF),
    ("llama", 3, HALF),
]


def packs(model_type: str, dtype: torch.dtype, group: GroupConfig | None = None) -> list[PackResult]:
    """Two packs, one after the other over the same model; without a group in plain torch, nothing checkpointed."""
    routed = RoutedModel(random_backbone(model_type, intermediate_size=WIDTH, dtype=dtype))
    if group:
        prepare_blocks(routed.model, group)
    results = []
    for first in (0, 2):
        jobs = [
            Job(id=f"{n}", examples=[tokenise(routed.backbone, f"film {n}: {t}", "war") for t in TEXTS[: n + 1]])
            for n in range(first, first + 2)
        ]
        make = slot_engine(routed.model, CONFIG, group) if group else None
        results.append(train_pack(routed, jobs, CONFIG, make_engine=make))
    return results


def worker(rank: int, port: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    for number, (model_type, stage, dtype) in enumerate(SETTINGS):
        found = packs(model_type, dtype, GroupConfig(workers=2, zero_stage=stage, gradient_checkpointing=True))
        torch.save([[(a.factors, r.losses) for a in r.adapters] for r in found], Path(folder) / f"{number}.{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workers")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(worker, (port, str(folder)), nprocs=2)
    return folder


@pytest.mark.parametrize("number", range(len(SETTINGS)), ids=[str(setting) for setting in SETTINGS])
def test_packs_are_those_of_plain_torch(found: Path, number: int) -> None:
    model_type, _, dtype = SETTINGS[number]
    wanted = packs(model_type, dtype)
    for rank in (0, 1):
        got = torch.load(found / f"{number}.{rank}.pt", weights_only=False)
        for pack, result in zip(got, wanted, strict=True):
            for (factors, losses), adapter in zip(pack, result.adapters, strict=True):
                rounded = 1e-4 if dtype == FLOAT else 1e-2
                torch.testing.assert_close(torch.tensor(losses), torch.tensor(result.losses), atol=1e-4, rtol=rounded)
                if dtype == HALF:
                    continue
                for module, one in adapter.factors.items():
                    torch.testing.assert_close(factors[module].up, one.up, atol=1e-5, rtol=1e-3)
                    torch.testing.assert_close(factors[module].down, one.down, atol=1e-5, rtol=1e-3)
