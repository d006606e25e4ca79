"""A load run in numbers: by phase, over time, and as a table of requests that others read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from mta_ray.population.load.rows import Row
from mta_ray.population.load.service import Sample
from mta_ray.population.load.traffic import PHASES, TrafficConfig, phase_at

WINDOW_S = 10.0
"""Of the lines over time."""
PERCENTILES = (50, 95, 99)
SCHEMA = pa.schema(
    [
        # what the capacity planner reads
        ("at_s", pa.float64()),
        ("phase", pa.string()),
        ("kind", pa.string()),
        ("status", pa.int32()),
        ("ttft_ms", pa.float64()),  # of streams; null elsewhere
        ("total_ms", pa.float64()),
        ("tokens", pa.int32()),
        ("is_stream", pa.bool_()),
        ("retried", pa.bool_()),
        ("verdict", pa.string()),
        # and the rest
        ("user", pa.int64()),
        ("prompt_tokens", pa.int32()),
        ("most_tokens", pa.int32()),
        ("first_status", pa.int32()),
        ("sent_s", pa.float64()),
        ("ended_s", pa.float64()),
        ("waited_ms", pa.float64()),
        ("lag_ms", pa.float64()),
        ("gaps_ms", pa.list_(pa.float64())),
        ("error", pa.string()),
    ]
)
"""Of requests.parquet, a row for each request, by the time when it was to be sent."""


def to_table(rows: Sequence[Row], verdicts: Sequence[str], traffic: TrafficConfig) -> pa.Table:
    """The rows, judged, without any text or name."""
    records = [
        asdict(row) | {"phase": phase_at(traffic, row.at_s), "verdict": verdict}
        for row, verdict in zip(rows, verdicts, strict=True)
    ]
    columns = {name: [record[name] for record in records] for name in SCHEMA.names}
    return pa.table(columns, schema=SCHEMA).sort_by("at_s")


def samples_table(samples: Sequence[Sample]) -> pa.Table:
    """A row for each second; a column for each figure that was seen, null where there was no look."""
    names = sorted({name for sample in samples for name in sample.metrics})
    columns: dict[str, Any] = {
        "at_s": pa.array([sample.at_s for sample in samples], pa.float64()),
        **{
            name: pa.array([getattr(sample, name) for sample in samples], pa.int32())
            for name in ("running", "starting", "stopping")
        },
        **{name: pa.array([sample.metrics.get(name) for sample in samples], pa.float64()) for name in names},
    }
    return pa.table(columns)


# ---- what it comes to


def summarise(
    table: pa.Table,
    samples: Sequence[Sample],
    traffic: TrafficConfig,
    *,
    locust: Mapping[str, int],
    is_checked: bool,
) -> dict[str, Any]:
    """The report, of plain values."""
    rows = table.to_pandas()
    bounds = [0.0, *traffic.bounds_s, traffic.seconds]
    phases = {}
    for phase, from_s, to_s in zip(PHASES, bounds[:-1], bounds[1:], strict=True):
        phases[phase] = {"from_s": from_s, "to_s": to_s} | _figures(rows[rows.phase == phase], rows, from_s, to_s)
    whole = _figures(rows, rows, 0.0, traffic.seconds)
    return {
        "simulation": "load",
        "seconds": traffic.seconds,
        "is_checked": is_checked,
        "all": whole,
        "phases": phases,
        "kinds": {str(kind): int(count) for kind, count in rows.kind.value_counts().items()},
        "users": int(rows.user.nunique()),
        "users_never_checked": _never_checked(rows),
        "errors": {
            str(error): int(count) for error, count in rows[rows.verdict == "failed"].error.value_counts().items()
        },
        "windows": _windows(rows, samples, traffic.seconds),
        "replicas": _replicas(samples),
        "stack_cache": _stack_cache(samples),
        "generator": {
            "lag_ms": _percentiles(rows.lag_ms),
            "waited_for_own_session": float((rows.waited_ms > 0).mean()) if len(rows) else 0.0,
            "locust": dict(locust),
            "tries": int(len(rows) + rows.retried.sum()),
        },
        "not_seen": _not_seen(samples, is_checked),
    }


def _figures(rows: pd.DataFrame, everything: pd.DataFrame, from_s: float, to_s: float) -> dict[str, Any]:
    """Of the requests that were due in a phase; rates are of what was due, or over, between the two times."""
    asks = rows[(rows.kind == "ask") & rows.status.between(200, 299)]
    verdicts = rows.verdict.value_counts()
    seconds = max(to_s - from_s, 1e-9)
    is_answered = everything.status.between(200, 299)
    is_over = everything.ended_s.between(from_s, to_s, inclusive="left")
    gaps = asks.gaps_ms.explode().dropna().astype(float)
    return {
        "requests": len(rows),
        "questions": int((rows.kind == "ask").sum()),
        "answered": len(asks),
        "offered_per_s": float(everything.at_s.between(from_s, to_s, inclusive="left").sum() / seconds),
        "answered_per_s": float((is_over & is_answered).sum() / seconds),
        "tokens_per_s": float(everything.tokens[is_over & is_answered].sum() / seconds),
        "ttft_ms": _percentiles(asks.ttft_ms),
        "token_ms": _percentiles(gaps),
        "total_ms": _percentiles(asks.total_ms),
        "refused_first": int((rows.first_status == 503).sum()),
        "refused_twice": int(verdicts.get("503", 0)),
        **{name: int(verdicts.get(name, 0)) for name in ("ok", "failed", "wrong", "wrong_user", "unchecked")},
        "judged": int(asks.verdict.isin(["ok", "wrong", "wrong_user"]).sum()),
    }


def _never_checked(rows: pd.DataFrame) -> int:
    """Users who asked, and none of whose answers could be judged."""
    asks = rows[rows.kind == "ask"]
    return int((asks.verdict == "unchecked").groupby(asks.user).all().sum())


def _percentiles(values: pd.Series) -> dict[str, float] | None:
    found = values.dropna().to_numpy(dtype=float)
    if not len(found):
        return None
    return {f"p{p}": float(value) for p, value in zip(PERCENTILES, np.percentile(found, PERCENTILES), strict=True)}


def _windows(rows: pd.DataFrame, samples: Sequence[Sample], seconds: float) -> list[dict[str, Any]]:
    """Ten seconds after ten seconds."""
    windows = []
    last_s = max(seconds, float(rows.ended_s.max()) if len(rows) else 0.0)
    is_answered = rows.status.between(200, 299)
    for from_s in np.arange(0.0, last_s, WINDOW_S):
        to_s = from_s + WINDOW_S
        due = rows.at_s.between(from_s, to_s, inclusive="left")
        under_way_s = (rows.ended_s.clip(upper=to_s) - rows.sent_s.clip(lower=from_s)).clip(lower=0).sum()
        ttft, total = (
            _percentiles(rows[due & is_answered & (rows.kind == "ask")][name]) for name in ("ttft_ms", "total_ms")
        )
        running = [s.running for s in samples if from_s <= s.at_s < to_s and s.running is not None]
        windows.append(
            {
                "at_s": float(from_s),
                "offered_per_s": float(due.sum() / WINDOW_S),
                "answered_per_s": float(
                    (rows.ended_s.between(from_s, to_s, inclusive="left") & is_answered).sum() / WINDOW_S
                ),
                "refused": int((due & (rows.first_status == 503)).sum()),
                "in_flight": float(under_way_s / WINDOW_S),
                "replicas": float(np.mean(running)) if running else None,
                "ttft_ms": ttft,
                "total_ms": total,
            }
        )
    return windows


def _replicas(samples: Sequence[Sample]) -> dict[str, Any] | None:
    seen = [(s.at_s, s.running) for s in samples if s.running is not None]
    if not seen:
        return None
    changes = [seen[0], *(now for before, now in zip(seen, seen[1:], strict=False) if now[1] != before[1])]
    counts = [running for _, running in seen]
    return {
        "first": counts[0],
        "most": max(counts),
        "last": counts[-1],
        "changes": [{"at_s": float(at_s), "running": running} for at_s, running in changes],
    }


def _stack_cache(samples: Sequence[Sample]) -> dict[str, float] | None:
    """Of the questions of users with a stack, how many found it on the device."""
    seen = [s.metrics for s in samples if "stack_misses" in s.metrics or "stack_hits" in s.metrics]
    if len(seen) < 2:
        return None
    hits, misses = (seen[-1].get(name, 0.0) - seen[0].get(name, 0.0) for name in ("stack_hits", "stack_misses"))
    return {"hits": hits, "misses": misses, "hit_share": hits / (hits + misses)} if hits + misses else None


def _not_seen(samples: Sequence[Sample], is_checked: bool) -> list[str]:
    notes = []
    if not is_checked:
        notes.append("Answers were not checked: that takes the base and the bank of the endpoint (base, bank).")
    if not any(sample.running is not None for sample in samples):
        notes.append("Replicas were not seen: the cluster that serves was not joined (cluster.address).")
    if not any(sample.metrics for sample in samples):
        notes.append("The service's own figures (stack cache, batch) were not seen: no metrics page was reached.")
    return notes
