"""Every figure of the service in one run, as ratios of things that took turns: what `jobs/benchmark_serving.py` prints.

The decoding figures are those of the base model that did worst; each base's own lie under `bases`.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mta_ray.benchmarks.decode import BenchmarkConfig, benchmark
from mta_ray.benchmarks.serve_overhead import serve_overhead
from mta_ray.benchmarks.store import StoreBenchmarkConfig, store_benchmark

log = logging.getLogger(__name__)
WORST = (
    *("mixed_over_base", "mixed_over_peft", "mixed_over_merge", "mixed_over_peft_traffic", "base_over_peft"),
    *("same_answers_as_peft", "same_answers_as_merge"),
)


def serving_benchmark(bases: Sequence[str], *, is_quick: bool) -> dict[str, Any]:
    """The figures by name, what each came from, and the seconds that each part took."""
    seconds: dict[str, float] = {}
    clock_s = time.perf_counter()

    def note(part: str) -> None:
        nonlocal clock_s
        seconds[part], clock_s = round(time.perf_counter() - clock_s, 1), time.perf_counter()
        log.info("%s: %.1f s", part, seconds[part])

    # The service first: it is a Ray cluster, and shares the machine with nothing but its client.
    overhead = serve_overhead(quick=is_quick)
    note("serve")
    decode = BenchmarkConfig(rounds=2, merge_users=4) if is_quick else BenchmarkConfig()
    each = {}
    for base in bases:
        each[base] = benchmark(replace(decode, base=base))
        note(f"decode {base}")
    store = store_benchmark(StoreBenchmarkConfig(rounds=3) if is_quick else StoreBenchmarkConfig())
    note("store")
    worst = {name: min(figures[name] for figures in each.values()) for name in WORST}
    return worst | store | overhead | {"bases": each, "seconds": seconds}


def main() -> None:
    """Print the figures, and write them where that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures")
    parser.add_argument("--quick", action="store_true", help="fewer runs: within 3 minutes on two cores")
    parser.add_argument("--base", nargs="+", default=["default", "wide"], help="base models: default, wide, 8b")
    asked = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("mta_ray").setLevel(logging.INFO)
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)  # it says much of its own end
    figures = serving_benchmark(asked.base, is_quick=asked.quick)
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=2))
    for name, value in figures.items():
        if name != "bases":
            print(f"{name}: {round(value, 3) if isinstance(value, float) else value}")
