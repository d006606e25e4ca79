"""The benchmark of the store measures what it says: real users with routes, and what they take on disk."""

from __future__ import annotations

from mta_ray.benchmarks.store import StoreBenchmarkConfig, store_benchmark

RANK_1_STACK = 12 * (384 + 384) * 2
"""Bytes of the factors on q and v of the embedded base's six layers, as bfloat16."""
VECTOR_AND_ROUTE = 384 * 4 + 4 * (4 + 4)


def test_the_figures_are_of_real_users() -> None:
    config = StoreBenchmarkConfig(few=20, many=600, users=2, requests=3, rounds=1, prompt_tokens=4, new_tokens=2)
    figures = store_benchmark(config)
    cost = figures["bytes_per_user"]
    assert VECTOR_AND_ROUTE < cost["without_stack"] < 4 * VECTOR_AND_ROUTE
    assert RANK_1_STACK < cost["with_stack"] - cost["without_stack"] < 1.5 * RANK_1_STACK
    assert set(figures["tokens_per_s"]) == {"20", "600"} and figures["flat_in_users"] > 0
