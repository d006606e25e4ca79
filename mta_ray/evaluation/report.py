"""Evidence that one can read: a folder with `report.json`, `report.html` and `predictions.parquet`, and a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from mta_ray.evaluation import words
from mta_ray.evaluation.page import render_page
from mta_ray.evaluation.summary import BASELINE, ReportFacts


def write_report(
    folder: str | Path, summary: dict[str, Any], facts: ReportFacts, predictions: pd.DataFrame
) -> dict[str, Path]:
    """The paths by name of `predictions.parquet`, `report.html` and `report.json`, written into a draft's folder."""
    home = Path(folder)
    home.mkdir(parents=True, exist_ok=True)
    paths = {name: home / name for name in ("predictions.parquet", "report.html", "report.json")}
    # NaN and infinity are no JSON to other readers: there and back again as null.
    known = json.loads(json.dumps(summary, default=lambda scalar: scalar.item()), parse_constant=lambda name: None)
    text = json.dumps(known, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    predictions.to_parquet(paths["predictions.parquet"], index=False)
    paths["report.html"].write_text(render_page(summary, facts, predictions), encoding="utf-8")
    paths["report.json"].write_text(text, encoding="utf-8")
    return paths


def table(summary: dict[str, Any]) -> Table:
    """The report's table for a terminal of 80 columns: few-shot users with their interval, the rest in short."""
    few, users = summary["few_shot_users"], summary["users"]
    shown = Table(
        title=Text(f"{summary['title']}: {summary['primary']}"),
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    shown.add_column("method", no_wrap=True)
    heads = (
        f"few-shot\n{few} users",
        "gain\n[95% interval]",
        f"rest\n{users - few} users",
        "kept\n/user",
        "time\n/user",
    )
    for head in heads:
        shown.add_column(head, justify="right", no_wrap=True)

    for name, figures in summary["methods"].items():
        few_shot, rest = figures["few_shot"], figures["rest"]
        style = {"better": "green", "worse": "red"}.get(words.verdict(few_shot), "dim")
        shown.add_row(
            Text(name, style="bold" if name == "mta" else ""),
            words.number(few_shot.get(summary["primary"])),
            Text("" if name == BASELINE else words.gain(few_shot, digits=2), style=style),
            words.number(rest.get(summary["primary"])),
            words.size(figures["bytes_per_user"]),
            words.duration(figures["seconds_per_user"]),
        )
    return shown
