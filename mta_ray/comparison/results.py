"""What the judgement expects of a table of results, and in which order and by which names tables show its methods."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
import pyarrow as pa

BASELINE, OURS = "non_personalised", "mta"
"""The two that every method is compared with."""
ABLATED = "mta:"
"""An ablation's name begins with it: `mta:k=2`."""
ALL = "all"
"""The budget of the whole history."""

METHODS = {
    "non_personalised": "the base model, the same for everybody",
    "majority_label": "control: the user's most frequent answer",
    "nearest_item": "control: the answer to the most similar history item",
    "rag": "base model, similar history items in the prompt",
    "oppu": "one LoRA per user, trained on the history",
    "all_users_lora": "one LoRA for everybody, trained on tested users' items and others'",
    "nearest_anchor": "the most similar anchor's LoRA",
    "uniform_mean": "all anchors' LoRAs, weighed alike",
    "random_anchors": "random anchors' LoRAs, weighed alike",
    "stack_only": "a small stack trained on the history, nothing merged",
    "prime": "nearest anchors' LoRAs, weights searched on the history",
    "as_released": "merge and stack as in the paper's released code",
    "mta_fusion": "nearest anchors' LoRAs, merged by similarity",
    "mta": "merged, then a small stack trained on the history",
    "mta_coefficients": "merged, then a scale for each merged direction",
    "mta_learned_route": "merged, then a weight for each layer and anchor",
    "oracle": "the best possible answer (simulated users)",
}
"""Method names in the order of tables, each in a few words; any other method comes after these."""
CHANCE_FREE = ("non_personalised", "majority_label", "nearest_item", "rag", "oracle")
"""Methods without chance in them: they stand for all seeds with one."""

RESULTS = pa.schema(
    [
        ("dataset", pa.string()),
        ("task", pa.string()),
        ("method", pa.string()),
        ("rag", pa.bool_()),
        ("budget", pa.string()),
        ("seed", pa.int32()),
        ("user_id", pa.string()),
        ("person", pa.string()),
        ("query_id", pa.string()),
        ("history_items", pa.int32()),
        ("full_history_items", pa.int32()),
        ("few_shot", pa.bool_()),
        ("prompt_hash", pa.string()),
        ("gold", pa.string()),
        ("prediction", pa.string()),
        ("score", pa.float64()),
    ]
)
"""`results.parquet`: one row a prediction. `history_items` are those within the budget; a higher score is better.

`person`: the first, by id, of the users who are one user over again; mostly the user alone."""
COSTS = pa.schema(
    [
        ("dataset", pa.string()),
        ("method", pa.string()),
        ("rag", pa.bool_()),
        ("budget", pa.string()),
        ("seed", pa.int32()),
        ("group", pa.string()),
        ("bytes_per_user", pa.float64()),
        ("seconds_per_user", pa.float64()),
        ("training_device_seconds", pa.float64()),
        ("bank_device_seconds", pa.float64()),
        ("decode_tokens_per_s", pa.float64()),
    ]
)
"""`costs.parquet`: one row for each cell and group of users in it. Seconds are those to personalise, a user's share of
a pack's; training is of the group's users together. A device is a GPU, or a CPU where there is none."""
GROUPS = ("few_shot", "rest", "all")
"""Groups of users, each judged by itself."""
SPENT = tuple(name for name in COSTS.names if name not in (*RESULTS.names, "group"))
"""What a cell took, without which cell it is."""

_ONE_CELL = ["method", "rag", "budget", "seed"]
_QUESTION = ["user_id", "query_id"]


def label(method: str, rag: bool) -> str:
    """What a row of a table is called: `mta`, `mta+rag`; the base model with retrieved items is `rag`."""
    if method in (BASELINE, "rag"):
        return "rag" if rag or method == "rag" else BASELINE
    return f"{method}+rag" if rag else method


def in_order(labels: Iterable[str]) -> list[str]:
    """Labels in the order of tables: a method, then the same with RAG; unknown methods come last, by name."""
    place = {name: number for number, name in enumerate(METHODS)}

    def key(name: str) -> tuple[int, str, bool]:
        method = name.removesuffix("+rag")
        return place.get(method, len(place)), method, name != method

    return sorted(labels, key=key)


def budgets_in_order(budgets: Iterable[str]) -> list[str]:
    """From no item to all of them."""
    return sorted(budgets, key=lambda budget: (budget == ALL, int(budget) if budget != ALL else 0))


def is_ablation(name: str) -> bool:
    """Whether it is `mta` with one part changed."""
    return name.startswith(ABLATED)


def check_results(results: pd.DataFrame) -> None:
    """Raises ValueError for a table that cannot be judged: columns, the baseline, the same questions."""
    missing = [name for name in RESULTS.names if name not in results.columns]
    if missing:
        raise ValueError(f"results lack the columns {missing}; got {list(results.columns)}")
    if not len(results):
        raise ValueError("results hold no row; run the benchmark first")
    bad = int((~np.isfinite(results["score"].astype(float))).sum())
    if bad:
        raise ValueError(f"{bad} of {len(results)} scores are not finite; mend the scores")
    for dataset, rows in results.groupby("dataset", sort=True):
        if BASELINE not in set(rows["method"]):
            raise ValueError(
                f"data set {dataset} has no rows of {BASELINE!r}, which gains are measured against; add it"
            )
        if rows["task"].nunique() != 1:
            raise ValueError(f"data set {dataset} is of several tasks: {sorted(rows['task'].unique())}; part it")
    assert_same_questions(results)


def assert_same_questions(results: pd.DataFrame) -> None:
    """Raises ValueError unless, in each data set, every method, budget and seed has answered the same questions once.

    The same are users, queries, the questions' hashes and golds; and a user's group and history belong to the user.
    """
    for dataset, rows in results.groupby("dataset", sort=True):
        # 1. each question is one and the same everywhere
        for columns, of in (
            (("prompt_hash", "gold"), _QUESTION),
            (("few_shot", "full_history_items", "person"), ["user_id"]),
            (("history_items",), ["user_id", "budget"]),
        ):
            for column in columns:
                torn = int((rows.groupby(of)[column].nunique() != 1).sum())
                if torn:
                    raise ValueError(
                        f"data set {dataset}: {torn} times {column} is not one for the same {' and '.join(of)}; "
                        "methods were not asked the same; remove the cells and answer again"
                    )

        # 2. nobody has left one out or answered it twice
        number = rows.groupby(_QUESTION, sort=True).ngroup()
        questions = int(number.max()) + 1
        cells = pd.DataFrame({name: rows[name] for name in _ONE_CELL} | {"number": number}).groupby(_ONE_CELL)["number"]
        for cell, (answers, different) in cells.agg(["size", "nunique"]).iterrows():
            if answers != questions or different != questions:
                method, rag, budget, seed = cell
                raise ValueError(
                    f"data set {dataset}: {label(method, rag)}, budget {budget}, seed {seed} has {answers} answers to "
                    f"{different} of {questions} questions; wanted one to each; answer that cell again"
                )
