"""The plots of a report: what each method gains, its score by history length, who is served by whom, training losses.

They have no background. Black is drawn as the colour of the text around it by the page; all other colours are between
light and dark, at least 3:1 on either.
"""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullFormatter

from mta_ray.evaluation import words
from mta_ray.evaluation.bands import Bands
from mta_ray.evaluation.summary import BASELINE, GROUPS, Curve, MapPoint

BLUE, GREEN, ORANGE, GOLD = "#3b7dd8", "#1a966a", "#d9622b", "#a8841a"
VIOLET, RED, GREY = "#8467d6", "#d84a4d", "#85847e"

LINES: dict[str, tuple[str, str]] = {
    "mta": (BLUE, "-"),
    "mta_fusion": (GREEN, "-"),
    "oppu": (ORANGE, "-"),
    "rag": (GOLD, "-"),
    "nearest_anchor": (VIOLET, "-"),
    "as_released": (RED, "-"),
    "non_personalised": ("black", "--"),
    "majority_label": (GREY, "--"),
    "nearest_item": (GREY, ":"),
    "oracle": (GREY, "-."),
}
"""Method -> (colour, dashes); any other method is a grey line."""

VERDICTS = {"better": GREEN, "worse": RED, "open": GREY}

MAP_USERS = 1500
"""More users than this are thinned on the map: their dots would only cover each other."""
CURVE_POINTS = 120
"""A longer curve is shown as means over runs of steps."""

STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that text is measured alike everywhere
    "font.size": 9,
    "text.parse_math": False,  # a name with $ is a name
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "black",
    "grid.alpha": 0.12,
    "legend.frameon": False,
    "savefig.transparent": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "mta_ray",
}
"""Of every figure: `@rc_context(STYLE)` on whatever draws one."""


def plain_ticks(axis: Axis) -> None:
    """Numbers of a logarithmic axis as 10k and 1M: matplotlib's own would be formulas, which STYLE leaves as text."""
    axis.set_major_formatter(EngFormatter(sep=""))
    axis.set_minor_formatter(NullFormatter())


@rc_context(STYLE)
def svg(figure: Figure) -> str:
    """The figure as an element for a page: the same bytes for the same figure, texts escaped."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = file.getvalue()
    # The names of groups repeat from one picture to the next, and nothing refers to them.
    return re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])


@rc_context(STYLE)
def gains_chart(summary: dict[str, Any]) -> Figure | None:
    """Every method's gain with its interval, few-shot users beside the others."""
    groups = [key for key in GROUPS if summary["methods"][BASELINE][key]["queries"]]
    methods = [name for name in summary["methods"] if name != BASELINE]
    if not methods:
        return None
    figure = Figure(figsize=(7, 0.9 + 0.22 * len(methods)), layout="constrained")
    panels = figure.subplots(1, len(groups), sharex=True, sharey=True, squeeze=False)[0]
    for panel, group in zip(panels, groups, strict=True):
        panel.axvline(0, color="black", alpha=0.6, linewidth=1)
        for row, name in enumerate(methods):
            figures = summary["methods"][name][group]
            colour = VERDICTS[words.verdict(figures)]
            panel.plot(figures["gain"], row, "o", color=colour)
            if figures["ci95_of_gain"]:
                panel.plot(figures["ci95_of_gain"], [row, row], color=colour, linewidth=4, alpha=0.5)
        panel.set_title(GROUPS[group], loc="left", fontsize=9)
        panel.set_xlabel("gain")
        panel.grid(axis="y", visible=False)
        panel.spines["left"].set_visible(False)
        panel.tick_params(axis="y", length=0)
    panels[0].set_yticks(range(len(methods)), methods)
    panels[0].invert_yaxis()
    return figure


@rc_context(STYLE)
def history_chart(bands: Bands, metric: str) -> Figure | None:
    """A line for each method over the bands of history length; one band makes no line."""
    if len(bands.labels) < 2:
        return None
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    # the legend names the lines in the order in which they end
    for name, scores in sorted(bands.scores.items(), key=lambda line: -line[1][-1]):
        colour, dashes = LINES.get(name, (GREY, "-"))
        width, dot = (3, 6) if name == "mta" else (1.5, 4)
        axes.plot(scores, dashes, marker="o", color=colour, linewidth=width, markersize=dot, label=name)
    ticks = [f"{label}\n{users} users" for label, users in zip(bands.labels, bands.users, strict=True)]
    axes.set_xticks(range(len(ticks)), ticks)
    axes.set_xlabel("history items")
    axes.set_ylabel(metric)
    axes.grid(axis="x", visible=False)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


@rc_context(STYLE)
def map_chart(points: Sequence[MapPoint]) -> Figure | None:
    """Users and anchors in two dimensions, each user joined to its anchor, each anchor with the number it serves."""
    anchors = {p.anchor_index: p for p in points if p.kind == "anchor"}
    users = [p for p in points if p.kind != "anchor"]
    if not users or not anchors:
        return None
    shown = users[:: math.ceil(len(users) / MAP_USERS)]
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()

    # 1. spokes: one line with gaps
    pairs = [(p, anchors[p.anchor_index]) for p in shown if p.anchor_index in anchors]
    axes.plot(
        [x for user, anchor in pairs for x in (user.x, anchor.x, math.nan)],
        [y for user, anchor in pairs for y in (user.y, anchor.y, math.nan)],
        color="black", alpha=0.18, linewidth=0.7,
    )  # fmt: skip

    # 2. dots
    for kind, label, mark, dot, colour in (
        ("user", "other user", "o", 4, GREY),
        ("few_shot", "few-shot user", "o", 4.5, ORANGE),
        ("anchor", "anchor, and how many users it serves", "D", 7, BLUE),
    ):
        these = [p for p in (*shown, *anchors.values()) if p.kind == kind]
        axes.plot([p.x for p in these], [p.y for p in these], mark, color=colour, markersize=dot, label=label)

    # 3. numbers
    served = Counter(p.anchor_index for p in users)
    for index, p in anchors.items():
        axes.annotate(str(served[index]), (p.x, p.y), (6, 5), textcoords="offset points", weight="bold")
    axes.set_aspect("equal", adjustable="datalim")  # distances mean the same up and across
    axes.set_axis_off()
    figure.legend(loc="outside upper left", ncols=3)
    return figure


@rc_context(STYLE)
def curve_charts(curves: Sequence[Curve]) -> dict[str, Figure]:
    """A small figure for each panel of training losses."""
    panels: dict[str, list[np.ndarray]] = {}
    for curve in curves:
        points = np.array([curve.steps, curve.losses], dtype=float).T  # (points, 2)
        points = points[np.isfinite(points).all(axis=1)]
        if len(points):
            runs = np.array_split(points, min(CURVE_POINTS, len(points)))
            panels.setdefault(curve.name.split("/", 1)[0], []).append(np.array([run.mean(axis=0) for run in runs]))

    charts = {}
    for name, lines in panels.items():
        charts[name] = Figure(figsize=(3.6, 2.2), layout="constrained")
        _draw_curves(charts[name].subplots(), lines)
    return charts


def _draw_curves(axes: Axes, lines: list[np.ndarray]) -> None:
    alpha = 1 if len(lines) < 3 else max(0.25, 1 / math.sqrt(len(lines)))
    for line in lines:
        axes.plot(*line.T, color=BLUE, alpha=alpha, marker="o" if len(line) == 1 else "")
    first, last = (np.mean([line[i][1] for line in lines]) for i in (0, -1))
    count = f"{len(lines)} lines, mean " if len(lines) > 1 else ""
    axes.set_xlabel(f"step ({count}{first:.3g} to {last:.3g})")
    axes.set_ylabel("loss")
