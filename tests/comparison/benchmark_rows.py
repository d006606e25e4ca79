"""Rows of a small benchmark: methods with and without chance, budgets, an ablation; hostile user ids."""

from __future__ import annotations

import numpy as np
import pandas as pd

from mta_ray.comparison.results import RESULTS
from mta_ray.lamp.metrics import query_score
from mta_ray.lamp.tasks import task_named

HOSTILE = "<script>alert('u')</script>"
USERS = {f"{HOSTILE}{number:02}": number for number in range(9)}
"""User id -> number; user n has n % 3 + 1 queries, and 4 or 40 history items."""
CELLS = (
    # method, rag, budgets, seeds, how often it is right
    ("non_personalised", False, ("0", "2", "all"), (0,), 0.3),
    ("rag", True, ("all",), (0,), 0.5),
    ("oracle", False, ("all",), (0,), 1.0),
    ("mta", False, ("0", "2", "all"), (0, 1, 2), 0.7),
    ("mta", True, ("all",), (0,), 0.6),
    ("zebra", False, ("all",), (0, 1, 2), 0.5),
    ("mta:k=1", False, ("all",), (1,), 0.5),
)


def made_results(dataset: str, task_name: str, seed: int) -> pd.DataFrame:
    """Rows of one data set; right answers are drawn."""
    task, generator, rows = task_named(task_name), np.random.default_rng(seed), []
    answers = list(task.labels) or ["a red house", "the blue sea", "green hills at sea"]
    for method, rag, budgets, seeds, right in CELLS:
        for budget in budgets:
            for number in seeds:
                for user_id, n in USERS.items():
                    items = 4 if n < 5 else 40
                    for query in range(n % 3 + 1):
                        gold = answers[(n + query) % len(answers)]
                        wrong = answers[(n + query + 1) % len(answers)]
                        said = gold if generator.random() < right else wrong
                        rows.append((
                            dataset, task.name, method, rag, budget, number, user_id, user_id, f"q{n}-{query}",
                            items if budget == "all" else min(items, int(budget)), items, n < 5, f"{n:08x}{query:08x}",
                            gold, said, query_score(task, said, gold),
                        ))  # fmt: skip
    return pd.DataFrame(rows, columns=RESULTS.names)
