"""What is written comes back, the same every time; the table fits a terminal."""

from __future__ import annotations

import json
import math
from io import StringIO

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from mta_ray.evaluation.report import table, write_report
from mta_ray.evaluation.summary import summarise


def test_what_is_written_comes_back(tmp_path, summary, facts, predictions):
    odd = summary | {"settings": {"limit": math.inf, "sizes": (np.int64(1), 2)}}
    paths = write_report(tmp_path / "report", odd, facts, predictions)
    assert sorted(p.name for p in (tmp_path / "report").iterdir()) == sorted(paths)
    report = json.loads(paths["report.json"].read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert report["settings"] == {"limit": None, "sizes": [1, 2]}
    assert report["methods"]["mta"] == summary["methods"]["mta"]
    pd.testing.assert_frame_equal(pd.read_parquet(paths["predictions.parquet"]), predictions, check_dtype=False)
    assert paths["report.html"].read_text().startswith("<!doctype html>")


def test_the_same_predictions_give_the_same_bytes(tmp_path, predictions, facts, metrics):
    written = []
    for name in ("one", "two"):
        summary = summarise(predictions.copy(), facts, metrics, samples=50)
        paths = write_report(tmp_path / name, summary, facts, predictions)
        written.append((paths["report.json"].read_bytes(), paths["report.html"].read_bytes()))
    assert written[0] == written[1]


def test_the_terminal_table_fits_80_columns(summary):
    out = StringIO()
    Console(file=out, width=80).print(table(summary))
    lines = out.getvalue().splitlines()
    row = next(line for line in lines if line.startswith(("mta ", " mta ")))
    assert row.split() == ["mta", "0.750", "+0.50", "[+0.33,", "+1.00]", "0.500", "768", "B", "500", "ms"]
    assert "…" not in out.getvalue()


@pytest.mark.parametrize("group", ["few_shot", "rest"])
def test_a_group_without_users_leaves_its_columns_empty(predictions, facts, metrics, group):
    out = StringIO()
    frame = predictions[predictions["few_shot"] == (group == "rest")]
    Console(file=out, width=80).print(table(summarise(frame, facts, metrics, samples=50)))
    row = next(line.split() for line in out.getvalue().splitlines() if line.startswith(("mta ", " mta ")))
    left = {"few_shot": ["–", "–", "0.500"], "rest": ["0.750", "+0.50", "[+0.33,", "+1.00]", "–"]}
    assert row[1:-4] == left[group]
