"""How many adapters an hour a pack gives, next to the same adapters one after another with PEFT; and whether they are
the same adapters.

    python -m mta_ray.benchmarks.pack_training --json FILE
    python -m mta_ray.benchmarks.pack_training --device cuda --shape 8b --dtype bfloat16

Both train over the same frozen weights, with the same examples in the same order, as many steps, one precision and as
many threads, by turns in one process. PEFT keeps its model from one adapter to the next: its factors and AdamW's state
are set back, nothing is loaded again. Needs torch, transformers and peft, and no Ray.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from mta_ray.benchmarks.random_base import random_base
from mta_ray.lora.adapter import Adapter, Factors
from mta_ray.model.backbone import Backbone, RoutedModel
from mta_ray.model.batches import Tokens, collate, row_losses
from mta_ray.personalize.lanes import Job, draw_examples, initial_down
from mta_ray.personalize.train_config import TrainConfig, schedule
from mta_ray.personalize.training import train_pack

log = logging.getLogger(__name__)

WARM_STEPS = 2
STEPS = (2, 40)
"""Least and most steps of an adapter in a timed run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One adapter's examples in a step."""

    rows: int
    tokens: int
    """Of each row; a quarter of them are its target."""

    def __str__(self) -> str:
        return f"{self.rows}x{self.tokens}"

    @property
    def is_small(self) -> bool:
        """One short example: what a step costs beside its arithmetic weighs most."""
        return self.rows == 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PackBenchmarkConfig:
    """One base model and the batches that it is trained with."""

    shape: str = "default"
    """`default`, or a random Llama: `64`, `256`, `576`, `8b`."""
    batches: tuple[Batch, ...] = (
        Batch(rows=1, tokens=32),
        Batch(rows=1, tokens=64),
        Batch(rows=4, tokens=64),
        Batch(rows=8, tokens=128),
    )
    adapters: int = 16
    """In the pack (G)."""
    alone: int = 8
    """So many of them one after another; their rate needs no more."""
    rank: int = 8
    rounds: int = 3
    """Times that each of the two is timed, after a run to get warm."""
    seconds: float = 3.0
    """About so long the adapters one after another take in a round: it sets the steps of both."""
    equal_steps: int = 20
    """Steps after which adapters of a pack, alone and of PEFT are compared; 0: they are not."""
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0


def pack_benchmark(config: PackBenchmarkConfig) -> dict[str, Any]:
    """By batch, adapters an hour of the pack over those of PEFT; and the largest differences of adapters."""
    bench = _Bench(config)
    batches = {}
    for batch in config.batches:
        batches[str(batch)] = found = bench.time(batch)
        log.info("%s %s: %.2f times PEFT in %d steps", config.shape, batch, found["ratio"], found["steps"])
    out: dict[str, Any] = {"batches": batches}
    if config.equal_steps:
        out |= bench.compare()
        log.info("%s: pack and alone %.1e, and PEFT %.1e", config.shape, out["pack_alone"], out["pack_peft"])
    if config.device == "cuda":
        out["gpu_gib_peak"] = torch.cuda.max_memory_allocated() / 2**30
    return out | {
        "config": asdict(config),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if config.device == "cuda" else "cpu",
    }


def difference(one: Adapter, other: Adapter) -> float:
    """The largest ‖a − b‖ / ‖b‖ of any module's side."""
    return max(
        float((getattr(factors, side) - (wanted := getattr(other.factors[module], side))).norm() / wanted.norm())
        for module, factors in one.factors.items()
        for side in ("down", "up")
    )


class _Bench:
    """The same weights and examples for both."""

    def __init__(self, config: PackBenchmarkConfig) -> None:
        self.config = config
        backbone = random_base(config.shape, device=config.device, dtype=config.dtype, seed=config.seed)
        # A second model around the same tensors, before layers are replaced in the first.
        shared = {id(t): t for t in (*backbone.model.parameters(), *backbone.model.buffers())}
        twin = copy.deepcopy(backbone.model, shared)
        self.routed = RoutedModel(backbone)
        self.peft = _Peft(replace(backbone, model=twin), self.routed, self._train(1, 1))

    def time(self, batch: Batch) -> dict[str, Any]:
        jobs = self._jobs(batch.rows, [batch.tokens])
        alone = jobs[: self.config.alone]

        # 1. warm, and how long one step of PEFT takes
        warm = self._train(batch.rows, WARM_STEPS)
        train_pack(self.routed, jobs, warm)
        self.peft.train(jobs[0], warm)
        step_s = self._seconds(lambda: self.peft.train(jobs[0], warm)) / WARM_STEPS
        steps = min(max(round(self.config.seconds / step_s / len(alone)), STEPS[0]), STEPS[1])

        # 2. by turns
        train = self._train(batch.rows, steps)
        pack_s, alone_s = [], []
        for _ in range(self.config.rounds):
            pack_s.append(self._seconds(lambda: train_pack(self.routed, jobs, train)))
            alone_s.append(self._seconds(lambda: [self.peft.train(job, train) for job in alone]))
        rates = [(len(jobs) / p, len(alone) / a) for p, a in zip(pack_s, alone_s, strict=True)]
        return {
            "ratio": statistics.median(pack / peft for pack, peft in rates),
            "pack_adapters_per_hour": 3600 * statistics.median(pack for pack, _ in rates),
            "peft_adapters_per_hour": 3600 * statistics.median(peft for _, peft in rates),
            "steps": steps,
            "is_small": batch.is_small,
        }

    def compare(self) -> dict[str, float]:
        """Largest difference of an adapter in the pack to the same one alone, and to PEFT's; rows of many lengths."""
        jobs = self._jobs(4, range(8, 49))
        train = self._train(4, self.config.equal_steps)
        together = train_pack(self.routed, jobs, train).adapters
        pairs = list(zip(together, jobs, strict=True))[: self.config.alone]
        return {
            "pack_alone": max(difference(a, train_pack(self.routed, [job], train).adapters[0]) for a, job in pairs),
            "pack_peft": max(difference(a, self.peft.train(job, train)) for a, job in pairs),
        }

    def _train(self, rows: int, steps: int) -> TrainConfig:
        return TrainConfig(rank=self.config.rank, examples_per_step=rows, steps=steps, learning_rate=1e-3)

    def _jobs(self, rows: int, lengths: Sequence[int]) -> list[Job]:
        draw = random.Random(self.config.seed)

        def row() -> Tokens:
            length = draw.choice(lengths)
            return Tokens(tuple(draw.randrange(1000, 4000) for _ in range(length)), max(2, length // 4))

        return [
            Job(id=f"user {number}", examples=[row() for _ in range(3 * rows)])
            for number in range(self.config.adapters)
        ]

    def _seconds(self, run: Callable[[], object]) -> float:
        start_s = time.perf_counter()
        run()
        if self.config.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start_s


class _Peft:
    """One adapter after another, as a loop around PEFT and torch's AdamW would do it."""

    def __init__(self, backbone: Backbone, routed: RoutedModel, config: TrainConfig) -> None:
        self.backbone = backbone
        self.routed = routed
        # Adapters of the base model's dtype, as ours are; PEFT's own choice would be float32.
        wrapped = get_peft_model(
            backbone.model,
            LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=list(routed.layers)),
            autocast_adapter_dtype=False,
        )
        wrapped.eval()  # no dropout in either
        self.model = wrapped.get_base_model()
        named = dict(self.model.named_parameters())
        self.sides: dict[str, tuple[nn.Parameter, nn.Parameter]] = {
            module: (named[f"{module}.lora_A.default.weight"], named[f"{module}.lora_B.default.weight"])
            for module in routed.layers
        }
        self.trainable = [side for pair in self.sides.values() for side in pair]
        # The fastest of torch's three.
        self.optimizer = torch.optim.AdamW(self.trainable, weight_decay=config.weight_decay, fused=True)

    def train(self, job: Job, config: TrainConfig) -> Adapter:
        self._reset(job, config)
        draw = draw_examples(job.examples, config, job.id)
        for step in range(config.steps):
            rows = next(draw)
            losses = row_losses(self.model, collate(self.backbone, rows, self.model.device))
            (losses.sum() / sum(row.target_tokens for row in rows)).backward()
            nn.utils.clip_grad_norm_(self.trainable, config.max_grad_norm)
            self.optimizer.param_groups[0]["lr"] = schedule(step, config.steps, config)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

        def kept(side: Tensor) -> Tensor:
            return side.detach().float().cpu().clone()

        factors = {module: Factors(down=kept(down), up=kept(up)) for module, (down, up) in self.sides.items()}
        return Adapter(factors=factors, scale=config.alpha / config.rank)

    @torch.no_grad()
    def _reset(self, job: Job, config: TrainConfig) -> None:
        for module, (down, up) in self.sides.items():
            down.copy_(initial_down(self.routed.layers[module], job.id, config))
            up.zero_()
        self.optimizer.state.clear()


def summary(shapes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The worst figures over all base models and batches."""
    cases = {f"{shape} {batch}": found for shape, each in shapes.items() for batch, found in each["batches"].items()}
    small = [found["ratio"] for found in cases.values() if found["is_small"]]
    out: dict[str, Any] = {"pack_over_sequential": min(found["ratio"] for found in cases.values())}
    if small:
        out["pack_over_sequential_small_batch"] = min(small)
    for key, name in (("pack_equals_alone", "pack_alone"), ("pack_equals_peft", "pack_peft")):
        if differences := [each[name] for each in shapes.values() if name in each]:
            out[key] = max(differences)
    return out | {"pack_over_sequential_by_case": {name: found["ratio"] for name, found in cases.items()}}


EIGHT_B = (Batch(rows=2, tokens=64),)


def quick(config: PackBenchmarkConfig) -> PackBenchmarkConfig:
    """The same with fewer and shorter runs."""
    batches = tuple(batch for batch in config.batches if batch.rows * batch.tokens <= 256)
    return replace(config, batches=batches, alone=min(4, config.alone), rounds=2, seconds=0.6, equal_steps=4)


def pack_benchmarks(shapes: Sequence[str], *, is_quick: bool, device: str, dtype: str) -> dict[str, Any]:
    """The figures of `summary`, and each base model's own under `shapes`."""
    found = {}
    for shape in shapes:
        config = PackBenchmarkConfig(shape=shape, device=device, dtype=dtype)
        if dtype != "float32":
            config = replace(config, equal_steps=0)  # one rounding of bfloat16 is more than the bar
        if shape == "8b":
            config = replace(config, batches=EIGHT_B)
        found[shape] = pack_benchmark(quick(config) if is_quick else config)
    exact = {}
    if "default" in found and dtype == "float32" and not is_quick:
        # What rounding makes of many steps of Adam, told apart from what is not the same computation.
        found["default"]["float64"] = pack_benchmark(
            PackBenchmarkConfig(shape="default", batches=(), alone=4, device=device, dtype="float64")
        )
        exact = {"pack_equals_alone_float64": found["default"]["float64"]["pack_alone"]}
    return summary(found) | exact | {"shapes": found}


def main() -> None:
    """Print the figures, and write them where that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter runs")
    parser.add_argument("--shape", nargs="+", default=["64", "256", "576", "default"], help="default, 64, 256, 576, 8b")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16")
    asked = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    log.setLevel(logging.INFO)
    figures = pack_benchmarks(asked.shape, is_quick=asked.quick, device=asked.device, dtype=asked.dtype)
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=2))
    for name, value in figures.items():
        if name != "shapes":
            print(f"{name}: {value}")


if __name__ == "__main__":
    main()
