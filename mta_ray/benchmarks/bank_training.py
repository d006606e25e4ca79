"""What training a bank costs, in one run: what `jobs/benchmark_bank_training.py` prints, each figure beside its bar."""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mta_ray.benchmarks.pack_training import pack_benchmarks

log = logging.getLogger(__name__)
CPU_SHAPES = ("64", "256", "576", "default")
PARTS = ("pack", "growth", "zero3", "groups", "kills")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """What a figure should be."""

    key: str
    what: str
    side: Literal[">=", "<="]
    value: float

    def is_met(self, figure: float | int) -> bool:
        return figure >= self.value if self.side == ">=" else figure <= self.value

    def line(self, figure: float | int) -> str:
        """One row of the table."""
        said = f"{figure:.3g}" if isinstance(figure, float) else str(figure)
        verdict = "ok" if self.is_met(figure) else "MISSED"
        return f"{self.key:<34} {said:>9}   {self.side} {self.value:<7g} {verdict:<7} {self.what}"


BARS = (
    Bar(key="pack_over_sequential", what="adapters/h of a pack over PEFT's, worst case", side=">=", value=1.0),
    Bar(key="pack_over_sequential_small_batch", what="the same, one example a step, worst case", side=">=", value=2.0),
    Bar(key="pack_equals_alone", what="largest ‖a−b‖/‖b‖, adapter in the pack to alone", side="<=", value=1e-4),
    Bar(key="pack_equals_alone_float64", what="the same in float64, embedded base", side="<=", value=1e-6),
    Bar(key="group_scaling", what="adapters/s of two groups over one", side=">=", value=1.8),
    Bar(key="growth_time", what="time per adapter, 8 to 64 anchors, max/min - 1", side="<=", value=0.15),
    Bar(key="growth_memory", what="peak memory above the base, the same", side="<=", value=0.15),
    Bar(key="zero3_held_share", what="of the base on each of two workers", side="<=", value=0.55),
    Bar(key="zero3_loss_difference", what="to ZeRO 1's loss curve, relative", side="<=", value=1e-3),
    Bar(key="lost_after_kills", what="finished adapters lost", side="<=", value=0.0),
    Bar(key="retrained_after_kills", what="finished adapters trained again", side="<=", value=0.0),
    Bar(key="kills_difference", what="largest ‖a−b‖/‖b‖ to the undisturbed bank", side="<=", value=1e-2),
)
BARS_8B = (Bar(key="pack_over_sequential", what="adapters/h of a pack over PEFT's", side=">=", value=3.0),)


def bank_benchmark(parts: Sequence[str], *, is_quick: bool) -> dict[str, Any]:
    """The figures by name, what each came from, and the seconds that each part took. Needs Ray."""
    found: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="mta-world-") as name:
        world = Path(name)
        for part in parts:
            start_s = time.perf_counter()
            found |= _PARTS[part](is_quick, world)
            seconds[part] = round(time.perf_counter() - start_s, 1)
            log.info("%s: %.0f s", part, seconds[part])
    return found | {"seconds": seconds}


def table(figures: Mapping[str, Any], bars: Sequence[Bar]) -> str:
    """Each figure that was measured beside its bar."""
    return "\n".join(bar.line(figures[bar.key]) for bar in bars if bar.key in figures)


# Imports inside: the pack's part runs where there is no Ray.


def _pack(is_quick: bool, world: Path) -> dict[str, Any]:
    shapes = CPU_SHAPES[:2] if is_quick else CPU_SHAPES
    return pack_benchmarks(shapes, is_quick=is_quick, device="cpu", dtype="float32")


def _growth(is_quick: bool, world: Path) -> dict[str, Any]:
    from mta_ray.benchmarks.growth import GrowthConfig, growth_benchmark

    return growth_benchmark(GrowthConfig(anchors=(8, 32), rounds=1, steps=10) if is_quick else GrowthConfig())


def _zero3(is_quick: bool, world: Path) -> dict[str, Any]:
    from mta_ray.benchmarks.zero3 import Zero3Config, zero3_benchmark

    return zero3_benchmark(Zero3Config(steps=3) if is_quick else Zero3Config())


def _groups(is_quick: bool, world: Path) -> dict[str, Any]:
    from mta_ray.benchmarks.bank_groups import GroupsConfig, groups_benchmark

    _make_world(is_quick, world)
    quick = GroupsConfig(anchors=8, lanes=2, rounds=1, steps=15, plain_s=0)
    return groups_benchmark(quick if is_quick else GroupsConfig(), world)


def _kills(is_quick: bool, world: Path) -> dict[str, Any]:
    from mta_ray.benchmarks.bank_kills import BankKillConfig, kill_benchmark

    _make_world(is_quick, world)
    return kill_benchmark(BankKillConfig(kills=2, anchors=6, steps=60) if is_quick else BankKillConfig(), world)


def _make_world(is_quick: bool, world: Path) -> None:
    """The same users for groups and kills; made when the first of them wants it."""
    from mta_ray.benchmarks.small_world import make_world

    if not (world / "base").exists():
        make_world(world, users=64 if is_quick else 128)


_PARTS: Mapping[str, Callable[[bool, Path], dict[str, Any]]] = {
    "pack": _pack,
    "growth": _growth,
    "zero3": _zero3,
    "groups": _groups,
    "kills": _kills,
}


def main() -> None:
    """Print the table, and write the figures where that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter runs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="which of them")
    parser.add_argument("--shape", nargs="+", help="the pack's part alone, over these: default, 64, 256, 576, 8b")
    parser.add_argument("--device", default="cpu", help="of the pack's part alone: cpu or cuda")
    parser.add_argument("--dtype", default="float32", help="of the pack's part alone: float32 or bfloat16")
    asked = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("mta_ray.benchmarks").setLevel(logging.INFO)
    if asked.shape or asked.device != "cpu" or asked.dtype != "float32":
        shapes = asked.shape or CPU_SHAPES
        figures = pack_benchmarks(shapes, is_quick=asked.quick, device=asked.device, dtype=asked.dtype)
    else:
        figures = bank_benchmark(asked.parts, is_quick=asked.quick)
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=2))
    print(table(figures, BARS_8B if asked.shape == ["8b"] else BARS))
    if "kills" in figures:
        print(f"{figures['kills']} kills: {figures['bank_kills']['by_kind']}")


if __name__ == "__main__":
    main()
