"""The report of a load run for readers: load, replicas and latency over one time, and a table by phase."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from mta_ray.evaluation.charts import BLUE, GREEN, ORANGE, RED, STYLE, VIOLET, plain_ticks
from mta_ray.evaluation.sections import Section
from mta_ray.population.load.figures import WINDOW_S


def sections(report: Mapping[str, Any]) -> list[Section]:
    """The report for readers."""
    return [
        Section(
            title="Load, replicas and latency",
            lead=_lead(report),
            figures=[("Load, replicas and latency over the run; the flash crowd is shaded", time_chart(report))],
            notes=report["not_seen"],
        ),
        Section(title="By phase", rows=_phase_rows(report), notes=_phase_notes(report)),
    ]


def _lead(report: Mapping[str, Any]) -> str:
    told = report["all"]
    wrong, others = told["wrong"] + told["wrong_user"], told["wrong_user"]
    checked = (
        f"{told['ok']} right or well, {wrong} wrong, {others} of them another user's" if report["is_checked"] else ""
    )
    text = (
        f"{told['requests']} requests of {report['users']} users in {report['seconds']:.0f} s: "
        f"{told['failed']} failed, {told['refused_first']} refused with 503 at first and {told['refused_twice']} twice"
    )
    text += f"; {checked}." if checked else "."
    replicas = report["replicas"]
    if replicas:
        text += (
            f" Replicas: {replicas['first']} at the start, {replicas['most']} at most, {replicas['last']} at the end."
        )
    return text


def _phase_rows(report: Mapping[str, Any]) -> list[list[str]]:
    head = ["phase", "requests", "offered /s", "answered /s"]
    names = {"ttft_ms": "first token", "token_ms": "next token", "total_ms": "whole answer"}
    head += [f"{label} {p}, ms" for label in names.values() for p in ("p50", "p95", "p99")]
    head += ["failed", "503 first", "503 twice", "wrong", "wrong user"]
    lines = [head]
    for phase, told in [*report["phases"].items(), ("all", report["all"])]:
        line = [phase, str(told["requests"]), f"{told['offered_per_s']:.2f}", f"{told['answered_per_s']:.2f}"]
        for name in names:
            line += [f"{told[name][p]:.0f}" if told[name] else "–" for p in ("p50", "p95", "p99")]
        line += [str(told[name]) for name in ("failed", "refused_first", "refused_twice", "wrong", "wrong_user")]
        lines.append(line)
    return lines


def _phase_notes(report: Mapping[str, Any]) -> list[str]:
    generator = report["generator"]
    lag, cache = generator["lag_ms"], report["stack_cache"]
    notes = [
        "Times to the first and the next token are of streams; a request that was sent twice is counted from the first."
    ]
    if report["is_checked"]:
        notes.append(
            f"{report['all']['unchecked']} requests were not checked: the service trained that user's stack, a "
            "change of the user got no answer, or two tokens were too close to tell apart."
            + (f" Of {report['users_never_checked']} users no answer was." if report.get("users_never_checked") else "")
        )
        if report.get("telling") is not None:
            notes.append(
                f"{report['telling']:.1%} of the right answers to users with a history from before the run, which did "
                "not change, would have been no other such user's."
            )
    if (after := report.get("afterwards")) and after["users"]:
        notes.append(
            f"Afterwards {after['users']} users were looked for and removed: {after['not_deleted']} were there after "
            f"their deletion, {after['lost']} had lost their history, {after['stacks_unknown']} had no stack although "
            f"one was promised, {after['not_removed']} could not be removed; of {after['not_seen']} nothing is known."
        )
    if lag:
        late = " It could not keep its own pace: the times here are partly its own." if lag["p99"] > 100 else ""
        notes.append(
            f"The load generator itself was late by {lag['p50']:.0f} ms (p50), {lag['p99']:.0f} ms (p99).{late}"
        )
    notes.append(
        f"{generator['waited_for_own_session']:.1%} of the requests waited for the one before in their own session."
    )
    if cache:
        notes.append(
            f"{cache['hit_share']:.1%} of {cache['hits'] + cache['misses']:.0f} stacks were on the device already."
        )
    if report["errors"]:
        notes.append("Failures: " + ", ".join(f"{error} ({count})" for error, count in report["errors"].items()) + ".")
    return notes


@rc_context(STYLE)
def time_chart(report: Mapping[str, Any]) -> Figure:
    """Three panels over one time: load, replicas, latency."""
    windows, flash = report["windows"], report["phases"]["flash crowd"]
    middle_s = [window["at_s"] + WINDOW_S / 2 for window in windows]
    has_replicas = report["replicas"] is not None
    figure = Figure(figsize=(7, 5.6 if has_replicas else 4.4), layout="constrained")
    ratios = [3, 1.2, 3] if has_replicas else [3, 3]
    panels = list(figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios))

    # 1. load
    panels[0].plot(middle_s, [window["offered_per_s"] for window in windows], color=BLUE, label="offered")
    panels[0].plot(middle_s, [window["answered_per_s"] for window in windows], "--", color=GREEN, label="answered")
    panels[0].set_ylabel("requests per second")

    # 2. replicas
    if has_replicas:
        changes = report["replicas"]["changes"]
        until_s = max(report["seconds"], middle_s[-1])
        panels[1].step(
            [*(change["at_s"] for change in changes), until_s],
            [*(change["running"] for change in changes), changes[-1]["running"]],
            where="post", color=VIOLET,
        )  # fmt: skip
        panels[1].set_ylim(0, report["replicas"]["most"] + 0.5)
        panels[1].set_yticks(range(report["replicas"]["most"] + 1))
        panels[1].set_ylabel("replicas")

    # 3. latency
    for name, colour, label in (("ttft_ms", ORANGE, "first token"), ("total_ms", RED, "whole answer")):
        for percentile, dashes in (("p50", "-"), ("p95", ":")):
            values = [window[name][percentile] if window[name] else np.nan for window in windows]
            panels[-1].plot(middle_s, values, dashes, color=colour, label=f"{label}, {percentile}")
    panels[-1].set_yscale("log")
    plain_ticks(panels[-1].yaxis)
    panels[-1].set_ylabel("milliseconds")
    panels[-1].set_xlabel("seconds")

    for panel in panels:
        panel.axvspan(flash["from_s"], flash["to_s"], color=ORANGE, alpha=0.12, linewidth=0)
        panel.axvline(report["phases"]["warm-up"]["to_s"], color="black", alpha=0.3, linewidth=0.8, linestyle=":")
    panels[0].legend(loc="upper left", bbox_to_anchor=(1, 1))
    panels[-1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    panels[0].set_xlim(0, None)
    return figure
