"""The plots of the benchmark's report: differences to `mta`, quality by history, quality against bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from mta_ray.comparison.results import ALL, BASELINE, OURS
from mta_ray.comparison.tables import ALPHA, GROUP_NAMES, methods_of_budgets
from mta_ray.evaluation import words
from mta_ray.evaluation.charts import BLUE, GREEN, GREY, LINES, RED, STYLE

NAMED = (BASELINE, "rag", "oppu", "mta_fusion", OURS, "mta_coefficients")
"""Points that bear their name on the map of quality against bytes, beside those on the frontier."""
_COLOURS = {name: colour for name, (colour, _) in LINES.items()} | {"mta_coefficients": "#0f8fa8"}


@rc_context(STYLE)
def differences_chart(methods: Mapping[str, Any], group: str) -> Figure | None:
    """Each method's mean difference to `mta` over users, with its interval; coloured where the test is significant."""
    found = {
        name: entry[group]["per_user"].get(f"over_{OURS}")
        for name, entry in methods.items()
        if name not in (OURS, "oracle") and entry[group]["per_user"].get(f"over_{OURS}")
    }
    if not found:
        return None
    figure = Figure(figsize=(7, 0.9 + 0.2 * len(found)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="black", alpha=0.6, linewidth=1)
    for row, (name, interval) in enumerate(found.items()):
        is_significant = methods[name][group].get("p_holm", 1.0) < ALPHA
        colour = GREY if not is_significant else GREEN if interval["mean"] > 0 else RED
        axes.plot(interval["mean"], row, "o", color=colour, markersize=5)
        if interval["low"] is not None:
            axes.plot([interval["low"], interval["high"]], [row, row], color=colour, linewidth=4, alpha=0.5)
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.set_xlabel(f"difference to {OURS}, positive is better")
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure


@rc_context(STYLE)
def budget_chart(dataset: Mapping[str, Any], groups: Sequence[str]) -> Figure:
    """A line for each method over the budgets, a panel for each group of users."""
    shown = [group for group in groups if group != "all"]
    budgets, primary = list(dataset["curves"]), dataset["primary"]
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for panel, group in zip(panels, shown, strict=True):
        for name in methods_of_budgets(dataset):
            places = [place for place, budget in enumerate(budgets) if name in dataset["curves"][budget]]
            scores = [dataset["curves"][budgets[p]][name][group]["metrics"][primary] for p in places]
            dashes = "--" if name == BASELINE else ":" if name.endswith("+rag") else "-"
            width = 3 if name == OURS else 1.5
            panel.plot(places, scores, dashes, marker="o", color=_colour(name), linewidth=width, label=name)
        panel.set_xticks(range(len(budgets)), budgets)
        panel.set_xlabel("latest history items")
        panel.set_title(GROUP_NAMES[group], loc="left", fontsize=9)
        panel.grid(axis="x", visible=False)
    panels[0].set_ylabel(primary)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


@rc_context(STYLE)
def pareto_chart(dataset: Mapping[str, Any], group: str) -> Figure | None:
    """Every method's quality against the bytes that are kept of a user, and the frontier."""
    points = _points(dataset, group)
    if not points:
        return None
    best = frontier(dataset, group)
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("symlog", linthresh=1, linscale=0.3)  # 0 bytes have a place too
    axes.plot(
        [points[name][0] for name in best], [points[name][1] for name in best], drawstyle="steps-post", color=BLUE,
        alpha=0.5, linewidth=1.5,
    )  # fmt: skip
    for name, (size, quality) in points.items():
        is_named = name in best or name in NAMED
        mark = "s" if name.endswith("+rag") else "o"
        axes.plot(size, quality, mark, color=_colour(name), markersize=7 if is_named else 4)
        if is_named:
            weight = "bold" if name == OURS else "normal"
            axes.annotate(name, (size, quality), (5, 4), textcoords="offset points", fontsize=8, weight=weight)
    axes.set_xlim(left=-0.3)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: words.size(size)))
    axes.set_xlabel("kept per user (squares: items in the prompt too)")
    axes.set_ylabel(dataset["primary"])
    if not dataset["higher_is_better"]:
        axes.invert_yaxis()
    return figure


def frontier(dataset: Mapping[str, Any], group: str) -> list[str]:
    """The methods that no other beats with as few bytes, by bytes; the oracle is no method."""
    sign = 1.0 if dataset["higher_is_better"] else -1.0
    best: list[str] = []
    reached = float("-inf")
    for name, (_, quality) in sorted(_points(dataset, group).items(), key=lambda p: (p[1][0], -sign * p[1][1])):
        if sign * quality > reached:
            best.append(name)
            reached = sign * quality
    return best


def _points(dataset: Mapping[str, Any], group: str) -> dict[str, tuple[float, float]]:
    """Method -> (bytes per user, primary metric)."""
    return {
        name: (float(entry[group]["costs"]["bytes_per_user"]), entry[group]["metrics"][dataset["primary"]])
        for name, entry in dataset["budgets"].get(ALL, {}).items()
        if name != "oracle" and entry[group]["costs"]["bytes_per_user"] is not None
    }


def _colour(name: str) -> str:
    return _COLOURS.get(name.removesuffix("+rag"), GREY)
