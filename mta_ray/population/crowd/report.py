"""What a population's run shows: speed of each stage, growth, load of the anchors, similarity, fidelity, store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mta_ray.console import table
from mta_ray.evaluation.sections import Section
from mta_ray.pipeline.memory import PeakMemory
from mta_ray.population.crowd import charts as crowd_charts
from mta_ray.population.crowd.anchors import Anchors
from mta_ray.population.crowd.parts import BINS

STAGES = {
    "draw": "draw vectors",
    "generate": "make users",
    "encode": "encode texts",
    "route": "route",
    "store": "user store",
    "parquet": "Parquet",
}


def report_of(
    summaries: Sequence[Mapping[str, Any]],
    *,
    settings: Mapping[str, Any],
    anchors: Anchors,
    growth: Sequence[Mapping[str, Any]],
    fidelity: Mapping[str, Any] | None,
    bare_users_per_s: float | None,
    workers: int,
) -> dict[str, Any]:
    """The content of `report.json`, made of the summaries of all parts."""
    users = sum(part["users"] for part in summaries)
    histogram = np.sum([part["histogram"] for part in summaries], axis=0)
    cosine_sums = np.sum([part["cosine_sums"] for part in summaries], axis=0)
    whole = growth[-1]
    return {
        "simulation": "population",
        "settings": dict(settings),
        "users": users,
        "embeddings": settings["embeddings"],
        "anchors": _load(summaries, anchors),
        "cosines": {
            "histogram": histogram.tolist(),
            "mean_by_rank": (cosine_sums / users).tolist(),
            "quantiles": {str(q): _quantile(histogram, q) for q in (0.05, 0.25, 0.5, 0.75, 0.95)},
        },
        "stages": _stages(summaries),
        "growth": list(growth),
        "encoder": None if bare_users_per_s is None else _encoder(whole, summaries, bare_users_per_s, workers),
        "fidelity": fidelity,
        "store": _store(whole),
        "quality": None,
    }


def growth_of(
    summaries: Sequence[Mapping[str, Any]],
    *,
    users: int,
    seconds: float,
    memory: PeakMemory,
    store_bytes: int | None,
    store_bytes_before: int | None = 0,
) -> dict[str, Any]:
    """What one run took. `steady` leaves out all until the first part was done: processes that start, models that load.

    Of a run that went on after a stop it is about the parts that were missing.
    """
    run_users = sum(part["users"] for part in summaries)
    ends = sorted((part["ended_at_s"], part["users"]) for part in summaries)
    steady_users = sum(count for _, count in ends[1:])
    steady_s = ends[-1][0] - ends[0][0] if steady_users else None
    began_s = min((part["began_at_s"] for part in summaries), default=0.0)
    return {
        "users": users,
        "users_this_run": run_users,
        "seconds": seconds,
        "seconds_of_parts": ends[-1][0] - began_s if ends else 0.0,
        "users_per_s": run_users / seconds if run_users else None,
        "steady_seconds_per_user": None if steady_s is None else steady_s / steady_users,
        "peak_memory_mib": memory.peak_mib,
        "process_peak_memory_mib": memory.process_peak_mib,
        "process_peak_name": memory.process_peak_name,
        "store_bytes": store_bytes,
        "store_bytes_before": store_bytes_before,
        "users_added": sum(part["added"] for part in summaries),
        "is_resumed": run_users < users,
    }


def sections(report: Mapping[str, Any]) -> list[Section]:
    """The page's sections, made of the report alone."""
    made = [_speed_section(report), _anchor_section(report), _similarity_section(report)]
    if report["quality"]:
        made.append(_quality_section(report["quality"]))
    if report["fidelity"]:
        made.append(_fidelity_section(report["fidelity"]))
    return made


def told(report: Mapping[str, Any]) -> str:
    """The main figures, for a terminal."""
    whole, load = report["growth"][-1], report["anchors"]
    rows = [
        ("population", f"{report['users']:,} users, {report['embeddings']}"),
        ("this run", f"{whole['users_this_run']:,} users in {whole['seconds']:.1f} s, {_rate(whole['users_per_s'])}"),
        *(
            (STAGES[name], f"{_rate(one['users_per_s'])} in one process")
            for name, one in report["stages"].items()
            if name != "store" or whole["users_added"]
        ),
        ("largest process", f"{whole['process_peak_memory_mib']:.0f} MiB ({whole['process_peak_name']})"),
        ("all processes", f"{whole['peak_memory_mib']:.0f} MiB"),
        ("anchors", f"{load['count']}, {load['effective']:.1f} effective, {load['unserved']} serve nobody"),
    ]
    if report["encoder"]:
        rows.append(("of the encoder's bare speed", f"{report['encoder']['share_of_bare']:.2f}"))
    if report["store"]:
        a_user = report["store"]["bytes_per_user"]
        rows.append(("store", "nobody added" if a_user is None else f"{a_user:.0f} bytes a user"))
    if whole.get("users_kept_as_they_were"):
        rows.append(("kept as they were in the store", f"{whole['users_kept_as_they_were']:,} users"))
    if report["fidelity"]:
        for key, label in FIDELITY.items():
            one, other = (report["fidelity"][name][key] for name in ("sampled", "noise_floor"))
            rows.append((label, f"{one:.3f} (two halves of encoded users: {other:.3f})"))
    if report["quality"]:
        quality = report["quality"]
        rows.append((f"expected {quality['metric']}", f"{quality['expected']:.3f} ({quality['method']})"))
    return table(rows)


FIDELITY = {
    "nearest_cosine_ks": "cosine to the nearest anchor, KS",
    "anchor_share_distance": "users per anchor, total variation",
    "kth_cosine_difference": "mean k-th cosine, difference",
}


def balance(counts: Sequence[float] | Sequence[int]) -> dict[str, float]:
    """Entropy in bits and as a share of its maximum, the number of equal anchors of that entropy, the largest share."""
    shares = np.asarray(counts, dtype=np.float64) / np.sum(counts)
    some = shares[shares > 0]
    bits = float(-(some * np.log2(some)).sum()) + 0.0
    most = float(np.log2(len(shares)))
    return {
        "entropy_bits": bits,
        "entropy_share": bits / most if most else 1.0,
        "effective": 2**bits,
        "largest_share": float(shares.max()),
    }


def _store(run: Mapping[str, Any]) -> dict[str, Any] | None:
    """The store's size, and what it grew by for each user that this run put into it."""
    if run["store_bytes"] is None:
        return None
    grown, added = run["store_bytes"] - (run["store_bytes_before"] or 0), run["users_added"]
    return {
        "bytes": run["store_bytes"],
        "bytes_per_user": grown / added if added else None,
        "kept_as_they_were": run["users_kept_as_they_were"],
    }


def _load(summaries: Sequence[Mapping[str, Any]], anchors: Anchors) -> dict[str, Any]:
    nearest = np.sum([part["nearest"] for part in summaries], axis=0)[anchors.in_service]
    load = np.sum([part["load"] for part in summaries], axis=0)[anchors.in_service]
    return {
        "count": len(anchors.in_service),
        "are_of_a_bank": anchors.is_bank,
        "retired": len(anchors.retired),
        "users": nearest.tolist(),
        "weighted_load": load.tolist(),
        "unserved": int((nearest == 0).sum()),
        "weighted": balance(load.tolist()),
        **balance(nearest.tolist()),
    }


def _stages(summaries: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Time within each stage's own function, added over processes: what one process of it can do."""
    found = {}
    for name in STAGES:
        seconds = sum(part["seconds"].get(name, 0.0) for part in summaries)
        users = sum(part["users"] for part in summaries if name in part["seconds"])
        if users:
            found[name] = {"seconds": seconds, "users_per_s": users / max(seconds, 1e-9)}
    return found


def _encoder(
    whole: Mapping[str, Any], summaries: Sequence[Mapping[str, Any]], bare: float, workers: int
) -> dict[str, float]:
    """From when the first encoder had texts to when the last part was written."""
    seconds = whole["seconds_of_parts"]
    rate = whole["users_this_run"] / seconds
    busy = sum(part["seconds"]["encode"] for part in summaries) / (workers * seconds)
    return {
        "bare_users_per_s": bare,
        "users_per_s": rate,
        "share_of_bare": rate / bare,
        "share_of_bare_with_start": whole["users_per_s"] / bare,
        "busy_share": busy if not whole["is_resumed"] else None,
    }


def _quantile(histogram: np.ndarray, q: float) -> float:
    """Linear within a bin."""
    ends = np.concatenate([[0], np.cumsum(histogram)]) / histogram.sum()
    return float(np.interp(q, ends, BINS))


def _speed_section(report: Mapping[str, Any]) -> Section:
    growth, whole = report["growth"], report["growth"][-1]
    rows = [
        ("users", "seconds", "users/s", "ms a user, steady", "largest process, MiB", "all processes, MiB", "store, MB")
    ]
    for one in growth:
        steady, stored = one["steady_seconds_per_user"], one["store_bytes"]
        rows.append(
            (
                f"{one['users']:,}",
                f"{one['seconds']:.1f}",
                "–" if one["users_per_s"] is None else f"{one['users_per_s']:,.0f}",
                "–" if steady is None else f"{steady * 1e3:.3f}",
                f"{one['process_peak_memory_mib']:.0f}",
                f"{one['peak_memory_mib']:.0f}",
                "–" if stored is None else f"{stored / 1e6:,.1f}",
            )
        )
    speeds = [f"{STAGES[name]} {_rate(one['users_per_s'])}" for name, one in report["stages"].items()]
    notes = ["One process of each stage: " + ", ".join(speeds) + "."]
    if report["encoder"]:
        encoder = report["encoder"]
        notes.append(
            f"The encoders alone do {encoder['bare_users_per_s']:.1f} users/s on the same texts; the pipeline reaches "
            f"{encoder['share_of_bare']:.0%} of that, {encoder['share_of_bare_with_start']:.0%} with the start of its "
            "processes."
        )
    notes.append(f"The largest process of the largest population was {whole['process_peak_name']}.")
    if whole["is_resumed"]:
        notes.append(
            f"The largest population went on after a stop: its figures are of {whole['users_this_run']:,} users."
        )
    if report["store"] and report["store"]["bytes_per_user"] is not None:
        notes.append(f"A user takes {report['store']['bytes_per_user']:,.0f} bytes in the store.")
    if kept := whole.get("users_kept_as_they_were"):
        notes.append(
            f"{kept:,} users were in the store already with another route or history and stay as they were there: its "
            "users are not those of the files."
        )
    figure = crowd_charts.growth_chart(growth)
    return Section(
        title="A population through the pipeline",
        lead=(
            f"{report['users']:,} users with {report['embeddings']} embeddings; "
            f"{whole['users_this_run']:,} of them in {whole['seconds']:.0f} s in this run."
        ),
        figures=[] if figure is None else [("Time a user and memory by the number of users", figure)],
        rows=rows,
        notes=notes,
    )


def _anchor_section(report: Mapping[str, Any]) -> Section:
    load = report["anchors"]
    rows = [("", "as the nearest", "by weight")]
    for key, label, form in (
        ("entropy_bits", "entropy, bits", "{:.2f}"),
        ("entropy_share", "of the most possible", "{:.1%}"),
        ("effective", "effective anchors", "{:.1f}"),
        ("largest_share", "largest share", "{:.1%}"),
    ):
        rows.append((label, form.format(load[key]), form.format(load["weighted"][key])))
    return Section(
        title="Load of the anchors",
        lead=(
            f"{load['count']} anchors serve as {load['effective']:.1f} equal ones would; {load['unserved']} are "
            f"nobody's nearest, and the busiest one is nearest to {load['largest_share']:.1%} of the users."
        ),
        figures=[("Share of users of each anchor, sorted", crowd_charts.load_chart(load))],
        rows=rows,
        notes=() if load["are_of_a_bank"] else ("Anchors were chosen as build-bank does; no adapters were trained.",),
    )


def _similarity_section(report: Mapping[str, Any]) -> Section:
    cosines = report["cosines"]
    rows = [("anchor", "mean cosine")]
    rows += [(f"nearest {rank}", f"{mean:.3f}") for rank, mean in enumerate(cosines["mean_by_rank"], start=1)]
    low, middle, high = (cosines["quantiles"][q] for q in ("0.05", "0.5", "0.95"))
    return Section(
        title="Similarity to the nearest anchor",
        lead=f"Half of the users have a cosine above {middle:.2f}; nine of ten lie between {low:.2f} and {high:.2f}.",
        figures=[("Users by cosine to the nearest anchor", crowd_charts.similarity_chart(cosines["histogram"]))],
        rows=rows,
    )


def _quality_section(quality: Mapping[str, Any]) -> Section:
    rows = [("cosine to the nearest anchor", quality["metric"], "evaluated users", "users of the population")]
    for band in quality["bands"]:
        error = "" if band["standard_error"] is None else f" ± {band['standard_error']:.3f}"
        rows.append(
            (
                f"{band['from']:.2f} to {band['to']:.2f}",
                f"{band['quality']:.3f}{error}",
                f"{band['evaluated_users']}",
                f"{band['population_users']:,}",
            )
        )
    return Section(
        title="Quality to expect",
        lead=(
            f"{quality['method']}: the population may expect {quality['metric']} {quality['expected']:.3f}; the "
            f"evaluated users had {quality['evaluated']:.3f}."
        ),
        figures=[("Quality and share of users by similarity", crowd_charts.quality_chart(quality))],
        rows=rows,
        notes=(
            f"{quality['population_outside_evaluated']:.1%} of the users are nearer or farther than any evaluated one.",
            "± is the standard error of the mean.",
        ),
    )


def _fidelity_section(fidelity: Mapping[str, Any]) -> Section:
    rows = [("difference", "drawn and encoded users", "two halves of encoded users")]
    for key, label in FIDELITY.items():
        rows.append((label, f"{fidelity['sampled'][key]:.4f}", f"{fidelity['noise_floor'][key]:.4f}"))
    nearest, kth = fidelity["mean_nearest_cosine"], fidelity["mean_kth_cosine"]
    return Section(
        title="Are drawn vectors like encoded ones?",
        lead=(
            f"Mean cosine to the nearest anchor: {nearest['sampled']:.3f} drawn, {nearest['encoded']:.3f} encoded; to "
            f"the k-th: {kth['sampled']:.3f} and {kth['encoded']:.3f}."
        ),
        rows=rows,
        notes=(
            f"Groups of {fidelity['users_of_a_group']} users that the model was not fitted on, means over random "
            "halves. The last column is what chance alone makes.",
        ),
    )


def _rate(users_per_s: float | None) -> str:
    return (
        "–"
        if users_per_s is None
        else f"{users_per_s:,.0f} users/s"
        if users_per_s >= 100
        else f"{users_per_s:.1f} users/s"
    )
