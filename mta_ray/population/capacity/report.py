"""The page and the tables of a capacity plan, made from its report alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from mta_ray.evaluation.charts import BLUE, GREEN, GREY, ORANGE, RED, STYLE, plain_ticks
from mta_ray.evaluation.sections import Section
from mta_ray.population.capacity.fleet import LOAD_MAX, TOO_LONG_TOLD
from mta_ray.population.capacity.service_times import PLACEHOLDER

TITLE = "How many machines for how many users"
CLOCKS = {
    "ttft_ms_p50": "first token p50",
    "ttft_ms_p99": "first token p99",
    "total_ms_p50": "total p50",
    "total_ms_p99": "total p99",
}
WITHIN = 0.25
"""A prediction that is closer than this to what was measured is called right."""


def sections(report: Mapping[str, Any]) -> list[Section]:
    """The plan, the replica that it is made of, and what is known of the model's truth."""
    told = [_plan_section(report), _replica_section(report), _times_section(report)]
    if "validation" in report:
        told.append(_validation_section(report["validation"]))
    if "replayed" in report:
        told.append(
            Section(
                title="A live run, replayed",
                lead="Arrivals of a finished load test, through the simulated pod; predicted / measured.",
                rows=_compared(report["replayed"], "phase", lambda load: str(load["phase"])),
            )
        )
    return told


def tables(report: Mapping[str, Any]) -> list[Table]:
    """The same in short, for a terminal."""
    title = f"capacity of {report['fleet']['name']}; service times: {report['times']['source']}"
    told = [_table(title, _plan_rows(report["plans"], short=True), notes=caveats(report))]
    if "validation" in report:
        loads = report["validation"]["loads"]
        told.append(_table("predicted / measured", _compared(loads, "load", _load_name)))
    if "replayed" in report:
        rows = _compared(report["replayed"], "phase", lambda load: str(load["phase"]))
        told.append(_table("replayed: predicted / measured", rows))
    return told


def caveats(report: Mapping[str, Any]) -> list[str]:
    """What whoever buys machines by this plan must know."""
    times, fleet, told = report["times"], report["fleet"], []
    if fleet["gpus_per_replica"] > 0 and (of := _other_than_gpu(times)):
        told.append(
            f"No plan for GPUs: the service times are {of}. Replicas are taken to be as fast as these times say, so "
            "the numbers and costs of GPUs here are not those of a service on GPUs. Measure on one (--measure BASE "
            "--measuring.device cuda), or plan for CPUs (--fleet.gpus-per-replica 0)."
        )
    if missing := [name for name in ("proxy", "ingress", "replica") if not _is_measured(times[name])]:
        told.append(
            f"Not measured, and left out of the plan as if it took no time: {', '.join(missing)}"
            f"{' (all but its engine)' if 'replica' in missing else ''}."
        )
    share = report.get("too_long_share", 0.0)
    if share > TOO_LONG_TOLD:
        told.append(
            f"{share:.1%} of the requests are longer than the {fleet['pod']['max_tokens']} tokens that a replica "
            "takes: the service refuses them, the plan serves them."
        )
    return told


def _other_than_gpu(times: Mapping[str, Any]) -> str:
    """What service times are, where they are not those of a GPU and a model that somebody would serve."""
    if times["source"] == PLACEHOLDER:
        return "placeholders that nobody has measured"
    device = times.get("device", "")
    of = ["a CPU"] if device == "cpu" else [] if device else ["a device that their file does not name"]
    of += ["the tiny model"] if times.get("base") == "tiny" else []
    return f"those of {' and '.join(of)}" if of else ""


def _is_measured(part: Mapping[str, float]) -> bool:
    return any(part.values())


def _fleet_note(fleet: Mapping[str, Any]) -> str:
    gpus = fleet["gpus_per_replica"]
    shared = f", {math.floor(1 / gpus + 1e-9)} of them on each" if 0 < gpus < 1 else ""
    return (
        f"Fleet: {fleet['name']}. GPUs a replica: {gpus:g}{shared}; {fleet['price_per_gpu_hour']:g} for a GPU and "
        f"hour, {fleet['price_per_replica_hour']:g} for a replica and hour without GPUs. Prices are settings."
    )


def _limit_note(report: Mapping[str, Any]) -> str:
    """What keeps a replica from more."""
    share = report["limit"]["per_s"] / report["can_per_s"]
    is_promise = share < LOAD_MAX * (1 - 1e-9)
    return (
        f"A replica that always has more to do gets through {report['can_per_s']:.3g} requests a second, and is "
        f"planned for at most {LOAD_MAX:.0%} of that. What limits it here: "
        + (f"the promise, at {share:.0%}." if is_promise else f"these {LOAD_MAX:.0%}: the promise holds there.")
    )


def _plan_section(report: Mapping[str, Any]) -> Section:
    plans, limit, demand, target = report["plans"], report["limit"], report["demand"], report["target"]
    last = plans[-1]
    known = " ".join((f"Service times: {report['times']['source']}.", *caveats(report)))
    return Section(
        title="Users, replicas, cost",
        lead=f"{known} {_count(last['users'])} users ask {_count(last['peak_per_s'])} times a second at the peak and "
        f"need {last['replicas']:,} replicas ({last['gpus']:,} GPUs): one takes {limit['per_s']:.3g} requests a "
        "second.",
        figures=[("replicas and cost a month against users, both axes logarithmic", plans_chart(plans))],
        rows=_plan_rows(plans),
        notes=[
            _fleet_note(report["fleet"]),
            f"{demand['requests_per_day']:g} requests a user and day, {demand['peak_factor']:g} times as many at the "
            f"peak as on average. Promised: first token p99 {target['ttft_ms_p99']:g} ms, total p99 "
            f"{target['total_ms_p99']:g} ms, at most {target['refused_share']:.1%} refused.",
            f"Replicas with {report['fleet']['spare_share']:.0%} spare, at least one; the latency is that of the peak "
            "with the spare ones dead. `scaled`: replicas follow the day's curve.",
            "One pod is simulated and counted as often as needed: replicas share only the user store, whose own "
            "capacity is not simulated.",
        ],
    )


def _replica_section(report: Mapping[str, Any]) -> Section:
    limit, pod = report["limit"], report["fleet"]["pod"]
    hits, expected = limit["stack_hits"], report["expected_stack_hits"]
    notes = [
        f"A pod of {pod['replicas']} replicas, {pod['max_requests']} rows each. At the chosen rate the engine has "
        f"something to do {limit['engine_busy']:.0%} of the time, with {limit['rows']:.1f} rows a step; the ingress "
        + (f"{limit['ingress_busy']:.0%}." if _is_measured(report["times"]["ingress"]) else "was not measured.")
    ]
    if "can_per_s" in report:
        notes.insert(0, _limit_note(report))
    if limit["ingress_busy"] > 0.8:
        notes.append("The ingress is what limits this pod: fewer replicas for each ingress would do more.")
    if hits is not None:
        notes.append(
            f"{hits:.0%} of the requests with a stack find it on the device (simulated, from an empty shelf on); "
            f"Che's approximation says {expected:.0%} for one replica in the long run."
        )
    return Section(
        title="What one replica can take",
        lead=f"{limit['per_s']:.3g} requests a second: first token p99 {limit['ttft_ms_p99']:.0f} ms, total p99 "
        f"{limit['total_ms_p99']:.0f} ms.",
        figures=[
            (
                "latency against requests per second of one replica, p50 and p99, with the target and the chosen rate",
                latency_chart(report["curve"], limit, report["target"]),
            )
        ],
        notes=notes,
    )


def _times_section(report: Mapping[str, Any]) -> Section:
    times = report["times"]
    step = times["step"]
    rows: list[tuple[str, ...]] = [("milliseconds", "a request", "a token", "other threads: a request", "a token")]
    for name in ("proxy", "ingress", "replica", "client"):
        part = times[name]
        keys = ("request_ms", "token_ms", "native_request_ms", "native_token_ms")
        rows.append((name, *(f"{part[key]:.2f}" if _is_measured(part) else "–" for key in keys)))
    around = any(_is_measured(times[name]) for name in ("proxy", "ingress", "replica"))
    away = f"{times['away_ms']:.1f} ms a request" if around or times["away_ms"] else "not measured"
    notes = [
        f"Measured on: {times['source']} (base: {times.get('base') or 'not told'}; device: "
        f"{times.get('device') or 'not told'}). –: not measured. Time in which nobody works: {away}."
    ]
    if "engine" in report:
        fit = report["engine"]["fit"]
        notes.append(
            f"The step's line was fitted to {fit['samples']} mixtures: R² {fit['r2']:.3f}, error p50 "
            f"{fit['error_p50']:.1%}, p95 {fit['error_p95']:.1%}."
        )
    return Section(
        title="Service times",
        lead=f"A step takes {step['fixed_ms']:.2f} ms + {step['row_ms']:.3f} ms a decoding row + "
        f"{step['prompt_ms']:.2f} ms a prompt + {step['prompt_token_ms']:.4f} ms a token of it.",
        rows=rows,
        notes=notes,
    )


def _validation_section(validation: Mapping[str, Any]) -> Section:
    loads = validation["loads"]
    ratios = [clock["ratio"] for load in loads for clock in load["clocks"].values()]
    right = sum(ratio is not None and abs(ratio - 1) <= WITHIN for ratio in ratios)
    fit = validation["engine"]["fit"]
    alone = validation["calibration"]["one_at_a_time"]
    shown = ", ".join(
        f"{run['tokens']:.0f} tokens {run['simulated_total_ms']:.0f} / {run['total_ms_p50']:.0f} ms" for run in alone
    )
    others = "; ".join(", ".join(f"{cpus:.1f}" for cpus in load["others_cpus"]) for load in loads)
    paces = "; ".join(", ".join(f"{a:.2f} and {b:.2f}" for a, b in load["paces"]) for load in loads)
    apart = "; ".join(
        f"{load['share']:.0%}: "
        + ", ".join(
            " and ".join(f"{run['predicted']:.0f} / {run['measured']:.0f}" for run in load["each_run"][clock])
            for clock in CLOCKS
        )
        for load in loads
    )
    return Section(
        title="Predicted against measured",
        lead=f"{right} of {len(ratios)} percentiles of a live service are predicted within {WITHIN:.0%}.",
        figures=[("predicted and measured latency at each load", validation_chart(loads))],
        rows=_compared(loads, "load", _load_name),
        notes=[
            f"A service of base {validation['config']['base']} on {validation['cpus']} CPUs, which run its client too. "
            "Known to the model: step times of the engine by itself, CPU times of the processes while one client asks "
            "alone and a few ask at once, each waiting for its answer, what they waited for, and the arrivals.",
            f"Loads are shares of {validation['can_per_s']:.1f} requests/s, which the model says this service can do, "
            "over the machine's pace just before. Told to the model, of each run: other programs took "
            f"{others} CPUs, and all work took {paces} times as long as at the calibration, before and after it (of "
            "clients who wait for their answers).",
            "A row is all runs of a load together. Each by itself, predicted / measured ms, in the order above: "
            f"{apart}.",
            f"Step fit: {fit['samples']} mixtures, error p50 {fit['error_p50']:.1%}, p95 {fit['error_p95']:.1%}. "
            f"One at a time, simulated / measured: {shown}.",
        ],
    )


def _plan_rows(plans: Sequence[Mapping[str, Any]], *, short: bool = False) -> list[tuple[str, ...]]:
    head = ("users", "peak/s", "replicas", "GPUs", "first p50", "p99", "total p50", "p99", "cost/month", "store")
    rows: list[tuple[str, ...]] = [
        head if short else (*head, "scaled/month", "1,000 users/month", "busy", "stack hits")
    ]
    for plan in plans:
        point = plan["at_peak"]
        row: tuple[str, ...] = (
            _count(plan["users"]),
            f"{plan['peak_per_s']:,.1f}" if plan["peak_per_s"] < 100 else f"{plan['peak_per_s']:,.0f}",
            f"{plan['replicas']:,}",
            f"{plan['gpus']:,}",
            *(f"{point[clock]:.0f} ms" for clock in CLOCKS),
            f"{plan['cost_per_month']:,.0f}",
            _bytes(plan["store_bytes"]),
        )
        if not short:
            hits = point["stack_hits"]
            row = (
                *row,
                f"{plan['cost_per_month_scaled']:,.0f}",
                f"{plan['cost_per_1000_users']:,.2f}",
                f"{point['engine_busy']:.0%}",
                "–" if hits is None else f"{hits:.0%}",
            )
        rows.append(row)
    return rows


def _compared(loads: Sequence[Mapping[str, Any]], name: str, name_of: Any) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [(name, "requests", *CLOCKS.values(), "refused")]
    for load in loads:
        cells = []
        for clock in CLOCKS:
            figures = load["clocks"][clock]
            ratio = f" ({figures['ratio']:.2f})" if figures["ratio"] else ""
            cells.append(f"{figures['predicted']:.0f} / {figures['measured']:.0f} ms{ratio}")
        refused = f"{load['refused']['predicted']} / {load['refused']['measured']}"
        rows.append((name_of(load), str(load["requests"]), *cells, refused))
    return rows


def _load_name(load: Mapping[str, Any]) -> str:
    return f"{load['share']:.0%}, {load['per_s']:.1f}/s"


def _table(title: str, rows: Sequence[Sequence[str]], *, notes: Sequence[str] = ()) -> Table:
    table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.caption, table.caption_justify, table.caption_style = escape("\n".join(notes)) or None, "left", "bold"
    for number, head in enumerate(rows[0]):
        table.add_column(head, justify="right" if number else "left")
    for row in rows[1:]:
        table.add_row(*row)
    return table


@rc_context(STYLE)
def latency_chart(points: Sequence[Mapping[str, Any]], limit: Mapping[str, Any], target: Mapping[str, Any]) -> Figure:
    """p50 and p99 of both clocks, each with its target, over the rate of one replica."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True)
    for panel, clock, title in zip(panels, ("ttft_ms", "total_ms"), ("first token", "whole answer"), strict=True):
        rates = [point["per_s"] for point in points]
        for p, colour in (("p50", BLUE), ("p99", ORANGE)):
            panel.plot(rates, [point[f"{clock}_{p}"] for point in points], "o-", color=colour, markersize=3, label=p)
        panel.axhline(target[f"{clock}_p99"], color=RED, linestyle="--", linewidth=1, label="target of p99")
        panel.axvline(limit["per_s"], color=GREEN, linestyle=":", linewidth=1.5, label="chosen")
        panel.set_yscale("log")
        plain_ticks(panel.yaxis)
        panel.set_title(title, loc="left", fontsize=9)
        panel.set_xlabel("requests/s of one replica")
    panels[0].set_ylabel("milliseconds")
    panels[0].legend(fontsize=8)
    return figure


@rc_context(STYLE)
def plans_chart(plans: Sequence[Mapping[str, Any]]) -> Figure:
    """Replicas and cost over users."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    users = [plan["users"] for plan in plans]
    left.loglog(users, [plan["replicas"] for plan in plans], "o-", color=BLUE, label="replicas")
    left.loglog(users, [max(plan["gpus"], 1) for plan in plans], "s--", color=GREY, markersize=3, label="GPUs")
    left.set_title("replicas and GPUs", loc="left", fontsize=9)
    left.legend()
    right.loglog(users, [plan["cost_per_month"] for plan in plans], "o-", color=ORANGE, label="all the time")
    scaled = [plan["cost_per_month_scaled"] for plan in plans]
    right.loglog(users, scaled, "o--", color=GREEN, markersize=3, label="with the day's curve")
    right.set_title("cost a month", loc="left", fontsize=9)
    right.legend()
    for panel in (left, right):
        plain_ticks(panel.xaxis)
        plain_ticks(panel.yaxis)
        panel.set_xlabel("users")
    return figure


@rc_context(STYLE)
def validation_chart(loads: Sequence[Mapping[str, Any]]) -> Figure:
    """Each percentile, predicted beside measured, with the band in which a prediction is called right."""
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    panels = figure.subplots(1, len(CLOCKS))
    for panel, (clock, title) in zip(panels, CLOCKS.items(), strict=True):
        rates = [load["per_s"] for load in loads]
        measured = [load["clocks"][clock]["measured"] for load in loads]
        predicted = [load["clocks"][clock]["predicted"] for load in loads]
        low, high = ([value * (1 + sign * WITHIN) for value in measured] for sign in (-1, 1))
        panel.fill_between(rates, low, high, color=GREY, alpha=0.25, linewidth=0)
        panel.plot(rates, measured, "o-", color="black", label="measured")
        panel.plot(rates, predicted, "s--", color=BLUE, label="predicted")
        panel.set_ylim(bottom=0)
        panel.set_title(title, loc="left", fontsize=9)
        panel.set_xlabel("requests/s")
    panels[0].set_ylabel("milliseconds")
    panels[0].legend(fontsize=8)
    return figure


def _count(value: float) -> str:
    for size, unit in ((1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value:,.0f}"


def _bytes(value: float) -> str:
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} PB"
