"""The pictures of a population's report, in the style of the evaluation's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from mta_ray.evaluation.charts import BLUE, GREEN, GREY, ORANGE, STYLE, plain_ticks
from mta_ray.population.crowd.parts import BINS


@rc_context(STYLE)
def growth_chart(growth: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Time a user and the largest process over the number of users; one size makes no line.

    What a run needed that went on after a stop is of a rest of its users, and left out.
    """
    growth = [one for one in growth if not one["is_resumed"]]
    if len(growth) < 2:
        return None
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    time, memory = figure.subplots(1, 2)
    sizes = [one["users"] for one in growth]
    steady = [np.nan if (s := one["steady_seconds_per_user"]) is None else s * 1e3 for one in growth]
    time.plot(sizes, steady, "o-", color=BLUE)
    time.set_ylabel("ms a user, steady")
    memory.plot(sizes, [one["process_peak_memory_mib"] for one in growth], "o-", color=ORANGE, label="largest process")
    memory.plot(sizes, [one["peak_memory_mib"] for one in growth], "o--", color=GREY, label="all processes")
    memory.set_ylabel("peak memory, MiB")
    memory.legend()
    for axes in (time, memory):
        axes.set_xscale("log")
        plain_ticks(axes.xaxis)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("users")
    return figure


@rc_context(STYLE)
def load_chart(load: Mapping[str, Any]) -> Figure:
    """Each anchor's share of the users, the busiest first."""
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    axes = figure.subplots()
    ranks = np.arange(1, load["count"] + 1)
    for name, label, colour in (("users", "as the nearest", BLUE), ("weighted_load", "by weight", GREEN)):
        shares = np.sort(np.asarray(load[name]) / np.sum(load[name]))[::-1]
        axes.step(ranks, shares * 100, where="mid", color=colour, label=label)
    axes.axhline(100 / load["count"], color=GREY, linestyle=":", label="even")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("anchor, the busiest first")
    axes.set_ylabel("% of users")
    axes.legend()
    return figure


@rc_context(STYLE)
def similarity_chart(histogram: Sequence[int]) -> Figure:
    """How many users have which cosine to their nearest anchor."""
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axes = figure.subplots()
    counts = np.asarray(histogram)
    shown = np.flatnonzero(counts)
    low, high = max(shown[0] - 2, 0), min(shown[-1] + 3, len(counts))
    axes.stairs(counts[low:high] / counts.sum() * 100, BINS[low : high + 1], fill=True, color=BLUE, alpha=0.7)
    axes.set_xlabel("cosine to the nearest anchor")
    axes.set_ylabel("% of users")
    return figure


@rc_context(STYLE)
def quality_chart(quality: Mapping[str, Any]) -> Figure:
    """What each band of similarity may expect, above how many are in it."""
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    axes, share = figure.subplots(1, 2)
    bands = quality["bands"]
    labels = [f"{band['from']:.2f}–\n{band['to']:.2f}" for band in bands]
    errors = [band["standard_error"] or 0.0 for band in bands]
    axes.errorbar(range(len(bands)), [band["quality"] for band in bands], errors, fmt="o-", color=BLUE)
    axes.axhline(quality["expected"], color=GREY, linestyle=":")
    axes.set_ylabel(quality["metric"])
    total = sum(band["population_users"] for band in bands)
    share.bar(range(len(bands)), [band["population_users"] / total * 100 for band in bands], color=GREEN, alpha=0.7)
    share.set_ylabel("% of the population")
    for panel in (axes, share):
        panel.set_xticks(range(len(bands)), labels)
        panel.set_xlabel("cosine to the nearest anchor")
    return figure
