"""Answers in LaMP's own form, a file for each method, budget and seed, and the golds beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from mta_ray.comparison.results import label
from mta_ray.lamp.tasks import Task, normalise_label, task_named

GOLDS = "golds.json"


def write_submissions(
    folder: str | Path, results: pd.DataFrame, labels: Mapping[str, Sequence[str]] | None = None
) -> list[Path]:
    """The paths of DATASET/METHOD[+rag]-BUDGET-SEED.json and DATASET/golds.json under `folder`, written anew.

    Each is `{"task": "LaMP_2", "golds": [{"id": …, "output": …}]}`, by id. A query's id is its own where no two users
    have it in common, else USER/QUERY. An answer that is a label but for case and marks is written as the label, which
    LaMP's scorer looks for; `labels`: by data set, where it has labels of its own.
    """
    home, paths = Path(folder), []
    for dataset, rows in results.groupby("dataset", sort=True):
        task = task_named(str(rows["task"].iloc[0]))
        place = home / _file_name(str(dataset))
        place.mkdir(parents=True, exist_ok=True)
        for old in place.glob("*.json"):
            old.unlink()

        owners = rows.groupby("query_id")["user_id"].nunique()
        is_own = bool((owners == 1).all())
        ids = rows["query_id"] if is_own else rows["user_id"] + "/" + rows["query_id"]
        rows = rows.assign(id=ids).sort_values("id")
        if task.kind == "label":
            known = {normalise_label(name): name for name in (labels or {}).get(str(dataset)) or task.labels}
            for column in ("prediction", "gold"):
                rows[column] = [known.get(normalise_label(str(text)), text) for text in rows[column]]
        for cell, answers in rows.groupby(["method", "rag", "budget", "seed"], sort=True):
            method, rag, budget, seed = cell
            path = place / f"{_file_name(label(method, rag))}-{budget}-{seed}.json"
            if path in paths:
                raise ValueError(f"two methods of {dataset} would be {path.name}; give one of them another name")
            path.write_text(_in_lamps_form(task, answers["id"], answers["prediction"]), encoding="utf-8")
            paths.append(path)
        golds = rows.drop_duplicates("id")
        (place / GOLDS).write_text(_in_lamps_form(task, golds["id"], golds["gold"]), encoding="utf-8")
        paths.append(place / GOLDS)
    return paths


def _in_lamps_form(task: Task, ids: pd.Series, outputs: pd.Series) -> str:
    golds = [{"id": str(key), "output": str(text)} for key, text in zip(ids, outputs, strict=True)]
    written: dict[str, Any] = {"task": task.lamp_id.replace("-", "_"), "golds": golds}
    return json.dumps(written, ensure_ascii=False, indent=1) + "\n"


def _file_name(text: str) -> str:
    """The text with all that a file system may take amiss as a hyphen."""
    return re.sub(r"[^\w.+=-]+", "-", text)
