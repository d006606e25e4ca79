"""Does an adapter cost more when the bank has more of them? Time of each, and peak memory above the base.

    python -m mta_ray.benchmarks.growth

The same lanes take 8, 16, 32 and 64 anchors, every size in a fresh process, finished adapters published as a group
does. Linux only: the kernel keeps the peak.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mta_ray.benchmarks.random_base import random_base
from mta_ray.lora.adapter import Adapter
from mta_ray.model.backbone import RoutedModel
from mta_ray.model.batches import Tokens
from mta_ray.personalize.lanes import Checkpoint, Job, Wishes, train_lanes
from mta_ray.personalize.train_config import TrainConfig
from mta_ray.pipeline.bank.files import AdapterFiles

ANCHORS = (8, 16, 32, 64)
LANES = 8
MODULE = "mta_ray.benchmarks.growth"
ROWS, TOKENS = 4, 32


@dataclass(frozen=True, slots=True, kw_only=True)
class GrowthConfig:
    """How each size is measured."""

    anchors: tuple[int, ...] = ANCHORS
    rounds: int = 2
    """Times that each size has its turn."""
    steps: int = 30
    shape: str = "256"
    """A base model of `pack_training`."""


def growth_benchmark(config: GrowthConfig) -> dict[str, Any]:
    """`growth_time` and `growth_memory`: how far sizes lie apart, largest over smallest less 1."""
    runs: dict[int, list[dict[str, float]]] = {anchors: [] for anchors in config.anchors}
    for _ in range(config.rounds):
        for anchors, each in runs.items():
            command = [sys.executable, "-m", MODULE, "--one", str(anchors), str(config.steps), config.shape]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            each.append(json.loads(done.stdout.splitlines()[-1]))
    time_s, peak_mib = (
        {anchors: statistics.median(run[name] for run in each) for anchors, each in runs.items()}
        for name in ("seconds_per_adapter", "peak_mib")
    )
    return {
        "growth_time": spread(time_s),
        "growth_memory": spread(peak_mib),
        "growth": {"seconds_per_adapter": time_s, "peak_mib_above_base": peak_mib, "lanes": LANES},
    }


def spread(figures: Mapping[int, float]) -> float:
    """How much more the largest is than the smallest, as a share of it."""
    return max(figures.values()) / min(figures.values()) - 1


class _Anchors:
    """A `personalize.lanes.Dispatcher` that makes anchors as they are asked for, and publishes what is finished."""

    def __init__(self, count: int, files: AdapterFiles) -> None:
        self.waiting = list(range(count))
        self.files = files

    def take(self, lanes: int) -> list[Job]:
        taken, self.waiting = self.waiting[:lanes], self.waiting[lanes:]
        return [Job(id=str(number), examples=_examples(number)) for number in taken]

    def wishes(self, has_free_lanes: bool) -> Wishes:
        return Wishes()

    def stepped(self, done: Mapping[str, int], losses: Mapping[str, float], tokens: int) -> None:
        """Nobody asks."""

    def finished(self, job: Job, adapter: Adapter, losses: Sequence[float]) -> None:
        self.files.publish(int(job.id), adapter, losses)

    def failed(self, job: Job, reason: str) -> None:
        raise FloatingPointError(f"adapter {job.id}: {reason}")

    def keep(self, checkpoints: Sequence[tuple[Job, Checkpoint]]) -> None:
        """Never wished for."""


def _examples(number: int) -> list[Tokens]:
    draw = random.Random(number)
    return [Tokens(tuple(draw.randrange(4000) for _ in range(TOKENS)), TOKENS // 4) for _ in range(3 * ROWS)]


def _measure(anchors: int, steps: int, shape: str) -> dict[str, float]:
    routed = RoutedModel(random_base(shape))
    train = TrainConfig(rank=8, examples_per_step=ROWS, steps=steps, learning_rate=1e-3)
    with tempfile.TemporaryDirectory(prefix="mta-growth-") as folder:
        base_mib = _memory_mib("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        warm = AdapterFiles(root=f"{folder}/warm", key="growth")
        train_lanes(routed, LANES, _Anchors(LANES, warm), replace(train, steps=2))
        files = AdapterFiles(root=folder, key="growth")
        start_s = time.perf_counter()
        train_lanes(routed, LANES, _Anchors(anchors, files), train)
        seconds = time.perf_counter() - start_s
        assert len(files.finished(anchors)) == anchors
    return {"seconds_per_adapter": seconds / anchors, "peak_mib": _memory_mib("VmHWM") - base_mib}


def _memory_mib(name: str) -> float:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, name
    return int(found[1]) / 1024


def main() -> None:
    """Print the figures, or of one size what its process found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", nargs=3, metavar=("ANCHORS", "STEPS", "SHAPE"), help="one size, in this process")
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(_measure(int(asked.one[0]), int(asked.one[1]), asked.one[2])))
    else:
        print(json.dumps(growth_benchmark(GrowthConfig()), indent=2))


if __name__ == "__main__":
    main()
