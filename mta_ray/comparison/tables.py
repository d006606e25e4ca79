"""The judgement as tables of text: for the page, for a paper (Markdown), for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from mta_ray.comparison.results import ABLATED, ALL, BASELINE, METHODS, OURS, in_order
from mta_ray.evaluation import words
from mta_ray.lamp.leaks import KINDS

Rows = list[tuple[str, ...]]
"""First the heading; the first cell of a row names it."""
GROUP_NAMES = {"few_shot": "few-shot users", "rest": "the rest", "all": "all users"}
ALPHA = 0.05
"""A corrected p-value below it makes a difference to mta significant."""


def groups_of(dataset: Mapping[str, Any]) -> list[str]:
    """The groups that have users, few-shot ones first; all of them only where there are several."""
    few, users = dataset["few_shot_users"], dataset["users"]
    return ["few_shot"] * (few > 0) + ["rest"] * (few < users) + ["all"] * (0 < few < users)


def quality_rows(dataset: Mapping[str, Any], group: str) -> Rows:
    """Every method with the whole history."""
    metrics = dataset["metrics"]
    found: Rows = [
        (
            "method",
            *metrics,
            f"{metrics[0]} per user",
            f"gain over {BASELINE}",
            f"difference to {OURS}",
            "p (Holm)",
            "spread",
            "kept",
            "time",
        )
    ]
    for name, entry in dataset["budgets"].get(ALL, {}).items():
        figures, costs = entry[group], entry[group]["costs"]
        found.append(
            (
                name,
                *(value(figures["metric_intervals"][metric]) for metric in metrics),
                value(figures["per_user"]["score"], dataset["higher_is_better"]),
                "" if name == BASELINE else difference(figures, BASELINE),
                "" if name == OURS else difference(figures, OURS),
                p_value(figures),
                words.number(figures["spread_over_seeds"][metrics[0]]),
                words.size(costs["bytes_per_user"]),
                words.duration(costs["seconds_per_user"]),
            )
        )
    return found


def budget_rows(dataset: Mapping[str, Any], group: str) -> Rows:
    """The primary metric of each method that stands at several budgets, and its gain over the base model there."""
    budgets = list(dataset["curves"])
    found: Rows = [("method", *(f"{budget} items" for budget in budgets))]
    for name in methods_of_budgets(dataset):
        cells = []
        for budget in budgets:
            figures = dataset["curves"][budget].get(name, {}).get(group)
            if figures is None:
                cells.append("–")
                continue
            gained = "" if name == BASELINE else f" ({difference(figures, BASELINE)})"
            cells.append(words.number(figures["metrics"][dataset["primary"]]) + gained)
        found.append((name, *cells))
    return found if len(found) > 1 else []


def methods_of_budgets(dataset: Mapping[str, Any]) -> list[str]:
    """The methods that stand at several budgets."""
    return in_order({name for methods in dataset["curves"].values() for name in methods})


def ablation_rows(dataset: Mapping[str, Any], group: str) -> Rows:
    """`mta`, then `mta` with one part changed, each against `mta` with the same seeds."""
    if not dataset["ablations"]:
        return []
    primary = dataset["primary"]
    found: Rows = [("changed", primary, f"difference to {OURS}", "p (Holm)", "spread", "kept", "time")]
    whole = dataset["budgets"].get(ALL, {})
    entries = {"nothing": whole[OURS]} if OURS in whole else {}
    entries |= {name.removeprefix(ABLATED): entry for name, entry in dataset["ablations"].items()}
    for name, entry in entries.items():
        figures, costs = entry[group], entry[group]["costs"]
        found.append(
            (
                name,
                words.number(figures["metrics"][primary]),
                "" if name == "nothing" else difference(figures, OURS),
                p_value(figures),
                words.number(figures["spread_over_seeds"][primary]),
                words.size(costs["bytes_per_user"]),
                words.duration(costs["seconds_per_user"]),
            )
        )
    return found


def cost_rows(dataset: Mapping[str, Any]) -> Rows:
    """What each method costs with the whole history, over all tested users."""
    group = groups_of(dataset)[-1]
    found: Rows = [("method", "kept per user", "time per user", "training", "its bank", "tokens/s")]
    for name, entry in dataset["budgets"].get(ALL, {}).items():
        costs = entry[group]["costs"]
        speed = costs["decode_tokens_per_s"]
        found.append(
            (
                name,
                words.size(costs["bytes_per_user"]),
                words.duration(costs["seconds_per_user"]),
                words.duration(costs["training_device_seconds"]),
                words.duration(costs["bank_device_seconds"]),
                "–" if speed is None else f"{speed:.0f}",
            )
        )
    return found


def leak_rows(datasets: Mapping[str, Mapping[str, Any]]) -> Rows:
    """Counts of leaks, a row a data set."""
    found: Rows = [("data set", "questions", "leaked", "with answer", *_KIND_HEADS, "users twice")]
    for name, dataset in datasets.items():
        leaks = dataset["leaks"]
        if leaks is None:
            found.append((name, f"{dataset['queries']}", *["not checked"] * (len(KINDS) + 3)))
            continue
        counts = [leaks["queries"], leaks["leaked"], leaks["with_answer"], *leaks["kinds"].values(), leaks["twins"]]
        found.append((name, *map(str, counts)))
    return found


def markdown(report: Mapping[str, Any]) -> str:
    """Tables for a paper, each under the name of its data set."""
    text = [f"# {report['title']}"]
    for name, dataset in report["datasets"].items():
        text += [f"## {name}", said_of(dataset)]
        for group in groups_of(dataset):
            text += [f"### {name}: {GROUP_NAMES[group]}", _markdown_table(quality_rows(dataset, group))]
        group = groups_of(dataset)[0]
        for title, rows in (
            (f"{name}: {dataset['primary']} by history items, {GROUP_NAMES[group]}", budget_rows(dataset, group)),
            (f"{name}: parts of {OURS}, {GROUP_NAMES[group]}", ablation_rows(dataset, group)),
        ):
            text += [f"### {title}", _markdown_table(rows)] if rows else []
    text += ["## Leaks", _markdown_table(leak_rows(report["datasets"])), _how(report)]
    text += ["## Made with", _markdown_table(made_rows(report))] if report["settings"] else []
    return "\n\n".join(text) + "\n"


def made_rows(report: Mapping[str, Any]) -> Rows:
    """The settings that a reader asks for first; `report.json` has all of them."""
    found: Rows = [("setting", "value")]
    for name, path in _SHOWN.items():
        here: Any = report["settings"]
        for part in path.split("."):
            here = here.get(part) if isinstance(here, Mapping) else None
        if here is not None:
            found.append((name, ", ".join(map(str, here)) if isinstance(here, list) else str(here)))
    return found + [(library, version) for library, version in report["versions"].items()]


def said_of(dataset: Mapping[str, Any]) -> str:
    """Who was asked what, in a sentence."""
    better = "higher" if dataset["higher_is_better"] else "lower"
    seeds = ", ".join(map(str, dataset["seeds"]))
    return (
        f"Task {dataset['task']} ({dataset['lamp_id']}); {dataset['users']} tested users, {dataset['few_shot_users']} "
        f"of them few-shot; {dataset['queries']} queries, {dataset['few_shot_queries']} of few-shot users; seeds "
        f"{seeds}. {dataset['primary']}: {better} is better; a gain or difference above 0 is for the better."
    )


def terminal_table(name: str, dataset: Mapping[str, Any]) -> Table:
    """A data set's table for a terminal of 80 columns: the first group, in short."""
    group, primary = groups_of(dataset)[0], dataset["primary"]
    users = dataset["budgets"][ALL][BASELINE][group]["users"]
    shown = Table(
        title=Text(f"{name}: {primary} of {users} {GROUP_NAMES[group]}"), title_justify="left", box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0), pad_edge=False,
    )  # fmt: skip
    shown.add_column("method", no_wrap=True)
    for head in (primary, "gain\n[95% interval]", f"p to\n{OURS}", "kept\n/user", "time\n/user"):
        shown.add_column(head, justify="right", no_wrap=True)
    for method, entry in dataset["budgets"][ALL].items():
        figures, costs = entry[group], entry[group]["costs"]
        gained = "" if method == BASELINE else difference(figures, BASELINE, digits=2)
        style = {"better": "green", "worse": "red"}.get(words.verdict(_as_gain(figures, BASELINE)), "dim")
        shown.add_row(
            Text(method, style="bold" if method == OURS else ""),
            words.number(figures["metrics"][primary]),
            Text(gained, style=style),
            p_value(figures),
            words.size(costs["bytes_per_user"]),
            words.duration(costs["seconds_per_user"]),
        )
    return shown


def value(interval: Mapping[str, Any], higher_is_better: bool = True) -> str:
    """`0.512 [0.401, 0.623]`; a score of a metric that is better where it is lower as that metric."""
    ends = (interval["mean"], interval["low"], interval["high"])
    if not higher_is_better:
        ends = (
            0.0 - interval["mean"],
            *(None if end is None else 0.0 - end for end in (interval["high"], interval["low"])),
        )
    mean, low, high = (words.number(end) for end in ends)
    return mean if ends[1] is None else f"{mean} [{low}, {high}]"


def difference(figures: Mapping[str, Any], over: str, *, digits: int = 3) -> str:
    """`+0.500 [+0.333, +1.000]`, mean over users; a dash where there is nothing to compare with."""
    return words.gain(_as_gain(figures, over), digits)


def p_value(figures: Mapping[str, Any]) -> str:
    """The corrected p-value, with a star where the difference to `mta` is significant."""
    p = figures.get("p_holm")
    if p is None:
        return ""
    return ("<.001" if p < 0.001 else f"{p:.3f}") + ("*" if p < ALPHA else "")


def against_ours(dataset: Mapping[str, Any], group: str) -> dict[str, list[str]]:
    """Methods that are "better" or "worse" than `mta` by the corrected test, and those that are "open"."""
    found: dict[str, list[str]] = {"better": [], "worse": [], "open": []}
    for name, entry in dataset["budgets"].get(ALL, {}).items():
        p = entry[group].get("p_holm")
        if p is not None:
            is_better = entry[group]["per_user"][f"over_{OURS}"]["mean"] > 0
            found["open" if p >= ALPHA else "better" if is_better else "worse"].append(name)
    return found


def described(name: str) -> str:
    """A label in a few words; nothing for a method that is not known."""
    words_of = METHODS.get(name.removesuffix("+rag"), "")
    return f"{words_of}, history items in the prompts" if words_of and name.endswith("+rag") else words_of


def _as_gain(figures: Mapping[str, Any], over: str) -> dict[str, Any]:
    interval = figures["per_user"].get(f"over_{over}")
    if interval is None:
        return {"gain": None, "ci95_of_gain": None}
    ends = None if interval["low"] is None else [interval["low"], interval["high"]]
    return {"gain": interval["mean"], "ci95_of_gain": ends}


_SHOWN = {
    "base model": "materials.base.base_model",
    "how it learns the task": "materials.base.mode",
    "encoder": "materials.embed.encoder",
    "simulated people": "materials.users",
    "seed of the simulated world": "materials.world.seed",
    "anchors": "materials.bank.anchors",
    "steps of an anchor": "materials.bank.train.steps",
    "rank of an anchor": "materials.bank.train.rank",
    "anchors of a user": "settings.fusion.k",
    "temperature": "settings.fusion.temperature",
    "rank of a stack": "settings.stack.rank",
    "steps of a stack": "settings.stack.steps",
    "seeds": "seeds",
}
_KIND_HEADS = tuple(f"in {kind.replace('_', ' ')}" for kind in KINDS)


def _how(report: Mapping[str, Any]) -> str:
    return (
        f"Brackets: 95% percentile intervals, {report['samples']} bootstrap samples of users. Gains and differences "
        f"are means over users. p: sign-flip test of users' mean differences to {OURS}, Holm-corrected over the "
        f"methods of the table; * below {ALPHA:g}. Users who are one user over again are resampled, and flipped, as "
        "one. Macro F1 has no interval: resampled users lack rare labels, each of which counts 0. By history items "
        "each method stands with the seeds that it has at all of them. Seeds are averaged first; intervals and p are "
        "of users and leave out the chance that all of them share, a bank's draw: that is in the spread, the standard "
        "deviation over seeds, where there are several."
    )


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *body))
