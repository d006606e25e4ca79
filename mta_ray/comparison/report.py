"""The benchmark's report: a page, its figures as JSON, Markdown tables, and answers in LaMP's form."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from mta_ray.comparison import figures
from mta_ray.comparison.judge import BenchmarkFacts, judge
from mta_ray.comparison.results import ALL, BASELINE, OURS
from mta_ray.comparison.submissions import write_submissions
from mta_ray.comparison.tables import (
    ALPHA,
    GROUP_NAMES,
    ablation_rows,
    against_ours,
    budget_rows,
    cost_rows,
    described,
    difference,
    groups_of,
    leak_rows,
    made_rows,
    markdown,
    quality_rows,
    said_of,
)
from mta_ray.evaluation import words
from mta_ray.evaluation.sections import Section, write_sections

TABLES, SUBMISSIONS = "table.md", "submissions"


def write_benchmark_report(
    folder: str | Path,
    results: pd.DataFrame,
    costs: pd.DataFrame,
    facts: BenchmarkFacts,
    *,
    samples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """What `judge` says, written to `folder`: report.html, report.json, table.md, submissions/.

    Raises ValueError where the results cannot be judged; then nothing is written.
    """
    home = Path(folder)
    report = judge(results, costs, facts, samples=samples, seed=seed)
    home.mkdir(parents=True, exist_ok=True)
    write_sections(home, report["title"], sections(report), report)
    (home / TABLES).write_text(markdown(report), encoding="utf-8")
    write_submissions(home / SUBMISSIONS, results, facts.labels)
    return report


def sections(report: Mapping[str, Any]) -> list[Section]:
    """The report as a page shows it. It shows no text and no id of a user."""
    found = []
    for name, dataset in report["datasets"].items():
        found += _of_dataset(name, dataset, report["samples"])
    found.append(_leaks(report["datasets"]))
    if report["settings"]:
        found.append(Section(title="Made with", rows=made_rows(report)))
    return found


def finding(dataset: Mapping[str, Any]) -> str:
    """What a data set shows of its first group of users; every sentence is read off the numbers."""
    group, methods, primary = groups_of(dataset)[0], dataset["budgets"].get(ALL, {}), dataset["primary"]
    if OURS not in methods or BASELINE not in methods:
        return said_of(dataset)
    ours, base = methods[OURS][group], methods[BASELINE][group]
    text = [
        f"On {ours['users']} {GROUP_NAMES[group]} with {ours['queries']} queries, {OURS} takes {primary} from "
        f"{words.number(base['metrics'][primary])} to {words.number(ours['metrics'][primary])}; a user gains "
        f"{difference(ours, BASELINE)}."
    ]
    verbs = {"better": "Better than it are", "worse": "Worse than it are", "open": "Not to be told from it are"}
    for how, names in against_ours(dataset, group).items():
        if names:
            text.append(f"{verbs[how]} {', '.join(names)}.")
    return " ".join(text)


def _of_dataset(name: str, dataset: Mapping[str, Any], samples: int) -> list[Section]:
    groups, primary, whole = groups_of(dataset), dataset["primary"], dataset["budgets"].get(ALL, {})
    found = []

    # 1. all methods
    averaged = "f1_macro is a mean over all labels of the data; one that nobody asks for counts 0. "
    notes = (
        said_of(dataset),
        (averaged if "f1_macro" in dataset["metrics"] else "")
        + f"In brackets and as bars: 95% intervals, {samples} bootstrap samples of users. Gains and differences are "
        f"means over users, query by query. p: sign-flip test of users' mean differences to {OURS}, Holm-corrected "
        f"over the methods here; * below {ALPHA:g}. Users who are one user over again count as one for both. Spread: "
        f"standard deviation of {primary} over seeds, which intervals and p leave out; where it is missing, one seed "
        "is all. Kept is of one of these users; time is a user's share of a pack's, encoding for a route in it.",
    )
    for place, group in enumerate(groups if whole else []):
        picture = figures.differences_chart(whole, group)
        found.append(
            Section(
                title=f"{name}: {GROUP_NAMES[group]}",
                lead="" if place else finding(dataset),
                figures=[(f"difference of each method to {OURS}, with its interval", picture)] if picture else [],
                rows=quality_rows(dataset, group),
                notes=notes if not place else (),
            )
        )

    # 2. history, bytes, parts
    group = groups[0]
    curves = budget_rows(dataset, group)
    if curves:
        found.append(
            Section(
                title=f"{name}: how much history",
                figures=[(f"{primary} by history items", figures.budget_chart(dataset, groups))],
                rows=curves,
                notes=(
                    f"The same {GROUP_NAMES[group]} and queries, with their latest items only; gains per user. Each "
                    "method with the seeds that it has at all of these budgets.",
                ),
            )
        )
    picture = figures.pareto_chart(dataset, group)
    if picture:
        best = figures.frontier(dataset, group)
        found.append(
            Section(
                title=f"{name}: quality against bytes",
                lead=f"No method has a better mean with fewer bytes than {', '.join(best)}.",
                figures=[(f"{primary} against bytes kept of a user", picture)],
                notes=(
                    f"{GROUP_NAMES[group].capitalize()}, whole history. The bank, which all share, is not counted.",
                ),
            )
        )
    parts = ablation_rows(dataset, group)
    if parts:
        changed = figures.differences_chart(dataset["ablations"], group)
        found.append(
            Section(
                title=f"{name}: parts of {OURS}",
                figures=[(f"difference to {OURS} with one part changed", changed)] if changed else [],
                rows=parts,
                notes=(
                    f"{GROUP_NAMES[group].capitalize()}; against {OURS} with the same seeds; p over this table. "
                    "Without a spread it is one seed, so one bank: a small difference may be that draw's.",
                ),
            )
        )

    # 3. costs
    if whole:
        found.append(
            Section(
                title=f"{name}: costs",
                rows=cost_rows(dataset),
                notes=(
                    "Training: device seconds of personalising all tested users; its bank: device seconds of the bank "
                    "that the method stands on, once for everybody, with the start of its processes. A device is a "
                    "GPU, or a CPU where there is none. "
                    "Tokens/s: of answers, the reading of prompts in their time.",
                    "; ".join(f"{method}: {described(method)}" for method in whole if described(method)) + ".",
                ),
            )
        )
    return found


def _leaks(datasets: Mapping[str, Mapping[str, Any]]) -> Section:
    dirty = [name for name, dataset in datasets.items() if dataset["leaks"] and _is_dirty(dataset["leaks"])]
    unknown = [name for name, dataset in datasets.items() if dataset["leaks"] is None]
    lead = f"Allowed by name, and to be read with care: {', '.join(dirty)}." if dirty else "No question leaks."
    if unknown:
        lead = f"{lead} Not checked: {', '.join(unknown)}." if dirty else f"Not checked: {', '.join(unknown)}."
    return Section(
        title="Leaks",
        lead=lead,
        rows=leak_rows(datasets),
        notes=(
            "A tested user's question that stands, by its normalised text, in a profile or among others' questions; "
            "with answer: there with its own gold answer. Users twice: at least half of their items (and 3) are "
            "another user's.",
        ),
    )


def _is_dirty(leaks: Mapping[str, Any]) -> bool:
    return bool(leaks["leaked"] or leaks["twins"])
