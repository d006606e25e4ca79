"""A small table of results of two data sets, its costs, and the facts of its report."""

from __future__ import annotations

import pandas as pd
import pytest
from benchmark_rows import made_results

from mta_ray.comparison.judge import BenchmarkFacts
from mta_ray.comparison.results import GROUPS, SPENT
from mta_ray.lamp.leaks import Leaks


@pytest.fixture(scope="session")
def results() -> pd.DataFrame:
    return pd.concat(
        [made_results("movies", "movie_tagging", 1), made_results("ratings", "product_rating", 2)], ignore_index=True
    )


@pytest.fixture(scope="session")
def costs(results) -> pd.DataFrame:
    cells = results[["dataset", "method", "rag", "budget", "seed"]].drop_duplicates(ignore_index=True)
    sizes = cells["method"].map({"mta": 4000.0, "zebra": 90.0, "mta:k=1": 3000.0}).fillna(0.0)
    spent = {name: sizes + cells["seed"] for name in SPENT} | {"decode_tokens_per_s": float("nan")}
    found = cells.assign(**spent)
    return pd.concat(
        [
            found.assign(group=group, bytes_per_user=found["bytes_per_user"] + 100 * place)
            for place, group in enumerate(GROUPS)
        ],
        ignore_index=True,
    )


@pytest.fixture(scope="session")
def facts() -> BenchmarkFacts:
    kinds = {"own_profile": 0, "tested_profile": 0, "teacher_profile": 2, "tested_query": 0, "teacher_query": 0}
    leaks = Leaks(users=9, queries=18, leaked=2, with_answer=1, kinds=kinds, twins=0, is_allowed=True)
    return BenchmarkFacts(title="A title", leaks={"movies": leaks}, settings={"k": 4})
