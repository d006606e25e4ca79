"""A load report from rows that were made by hand, and the page that comes of it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mta_ray.evaluation.sections import write_sections
from mta_ray.population.load.figures import samples_table, summarise, to_table
from mta_ray.population.load.report import sections
from mta_ray.population.load.rows import Row
from mta_ray.population.load.service import Sample, read_figures
from mta_ray.population.load.traffic import TrafficConfig

TRAFFIC = TrafficConfig(seconds=100.0, warmup=0.1, flash_start=0.4, flash_share=0.2)
"""Warm-up to 10 s, flash crowd from 40 s to 60 s."""


def row(at_s: float, *, total_ms: float = 100.0, **more) -> Row:
    base = {"kind": "ask", "user": 1, "is_stream": True, "most_tokens": 8, "status": 200, "first_status": 200}
    base |= {"ttft_ms": total_ms / 4, "tokens": 8, "prompt_tokens": 12, "gaps_ms": [10.0, 20.0]}
    base |= {"sent_s": at_s, "ended_s": at_s + total_ms / 1e3, "total_ms": total_ms}
    return Row(at_s=at_s, **base | more)


ROWS = [
    row(5.0, total_ms=1000.0),
    *(row(10.0 + n, total_ms=100.0 + n) for n in range(30)),
    *(row(40.0 + n / 4, total_ms=200.0 + n) for n in range(80)),
    row(70.0, is_stream=False, ttft_ms=None, gaps_ms=[]),
    row(71.0, status=503, first_status=503, retried=True, error="busy", ttft_ms=None, gaps_ms=[]),
    row(72.0, first_status=503, retried=True, total_ms=1500.0),
    row(73.0, status=500, first_status=500, error="status 500", ttft_ms=None, gaps_ms=[]),
    row(74.0, kind="history", is_stream=False, ttft_ms=None, gaps_ms=[], tokens=0, anchors=[(0, 1.0)]),
    row(75.0, lag_ms=7.0),
]
VERDICTS = ["ok"] * 111 + ["ok", "503", "ok", "failed", "ok", "wrong_user"]
SAMPLES = [
    Sample(at_s=float(s), running=2 if 45 <= s < 80 else 1, starting=0, stopping=0,
           metrics={"stack_hits": 10.0 + s, "stack_misses": 4.0 + s / 4} if s % 5 == 0 else {})
    for s in range(100)
]  # fmt: skip


def report(samples: list[Sample] = SAMPLES, *, is_checked: bool = True) -> dict:
    table = to_table(ROWS, VERDICTS, TRAFFIC)
    return summarise(table, samples, TRAFFIC, locust={"requests": 119, "failures": 3}, is_checked=is_checked)


def test_each_phase_has_its_own_figures() -> None:
    phases = report()["phases"]
    assert {name: told["requests"] for name, told in phases.items()} == {
        "warm-up": 1, "steady": 30, "flash crowd": 80, "recovery": 6,
    }  # fmt: skip
    flash = phases["flash crowd"]
    assert flash["offered_per_s"] == 4.0 and phases["steady"]["offered_per_s"] == 1.0
    totals = 200.0 + np.arange(80)
    assert flash["total_ms"] == {f"p{p}": pytest.approx(np.percentile(totals, p)) for p in (50, 95, 99)}
    assert flash["ttft_ms"]["p95"] == pytest.approx(np.percentile(totals / 4, 95))
    assert flash["token_ms"] == {"p50": 15.0, "p95": 20.0, "p99": 20.0}
    recovery = phases["recovery"]
    assert (recovery["refused_first"], recovery["refused_twice"], recovery["failed"]) == (2, 1, 1)
    assert (recovery["wrong"], recovery["wrong_user"], recovery["ok"]) == (0, 1, 3)
    # the last one of the flash crowd was over in the recovery
    assert recovery["answered_per_s"] == pytest.approx((4 + 1) / 40)
    # of what came to an end as a right or wrong answer, the history is none, and the failed one neither
    assert recovery["total_ms"]["p50"] == 100.0


def test_windows_replicas_and_the_stack_cache_follow_the_samples() -> None:
    told = report()
    assert [window["replicas"] for window in told["windows"]] == [1, 1, 1, 1, 1.5, 2, 2, 2, 1, 1]
    assert told["replicas"]["changes"] == [
        {"at_s": 0.0, "running": 1}, {"at_s": 45.0, "running": 2}, {"at_s": 80.0, "running": 1},
    ]  # fmt: skip
    assert told["stack_cache"] == {"hits": 95.0, "misses": 23.75, "hit_share": pytest.approx(0.8)}
    flight = told["windows"][5]["in_flight"]
    assert flight == pytest.approx(sum((200.0 + n) / 1e4 for n in range(40, 80)), rel=0.02)
    assert told["generator"]["tries"] == len(ROWS) + 2 and told["errors"] == {"status 500": 1}


def test_the_page_tells_them_and_what_was_not_seen(tmp_path) -> None:
    told = report()
    write_sections(tmp_path, "Load", sections(json.loads(json.dumps(told))), told)
    page = (tmp_path / "report.html").read_text()
    assert "1 at the start, 2 at most, 1 at the end" in page and "80.0% of 119 stacks" in page
    assert "1 of them another user" in page and page.count("<svg") == 1

    blind = report([], is_checked=False)
    assert blind["replicas"] is None and blind["stack_cache"] is None and len(blind["not_seen"]) == 3
    write_sections(tmp_path, "Load", sections(blind), blind)
    assert "Replicas were not seen" in (tmp_path / "report.html").read_text()


def test_the_table_has_what_the_planner_reads_and_no_text() -> None:
    table = to_table(ROWS, VERDICTS, TRAFFIC)
    assert table.column_names[:10] == [
        "at_s", "phase", "kind", "status", "ttft_ms", "total_ms", "tokens", "is_stream", "retried", "verdict",
    ]  # fmt: skip
    assert "text" not in table.column_names
    assert table["at_s"].to_pylist() == sorted(row.at_s for row in ROWS)


def test_samples_are_a_table_with_gaps_where_nobody_looked() -> None:
    table = samples_table(SAMPLES)
    assert table.num_rows == 100 and table["stack_hits"].null_count == 80
    assert samples_table([]).num_rows == 0


def test_only_our_figures_of_a_metrics_page_are_read() -> None:
    page = (
        "# HELP ray_mta_stack_hits_total Stacks.\n# TYPE ray_mta_stack_hits_total counter\n"
        'ray_mta_stack_hits_total{replica="a"} 3.0\nray_mta_stack_hits_total{replica="b"} 4.0\n'
        "# HELP ray_node_mem_used Memory.\n# TYPE ray_node_mem_used gauge\nray_node_mem_used 5.0\n"
        "# HELP ray_mta_waiting_requests Wait.\n# TYPE ray_mta_waiting_requests gauge\n"
        'ray_mta_waiting_requests{replica="a"} 2.0\n'
    )
    found = list(read_figures(page))
    assert [(kind, name, value) for kind, name, _, value in found] == [
        ("counter", "stack_hits", 3.0), ("counter", "stack_hits", 4.0), ("gauge", "waiting_requests", 2.0),
    ]  # fmt: skip
    assert found[0][2] != found[1][2]
