"""What a person sees of a bank's training: a table on a terminal, lines elsewhere, and never an error of its own."""

from __future__ import annotations

import io
import logging
import math
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from mta_ray.pipeline.bank import watch
from mta_ray.pipeline.bank.snapshot import GroupRow, Snapshot
from mta_ray.pipeline.bank.table import bank_line, bank_table
from mta_ray.pipeline.bank.watch import live

SHOW_CURSOR = b"\x1b[?25h"
HIDE_CURSOR = b"\x1b[?25l"


def group(number: int, **facts: object) -> GroupRow:
    usual = {
        "state": "training",
        "reason": "",
        "workers": 2,
        "devices": 2,
        "lanes_busy": 4,
        "lanes": 4,
        "adapters_done": 1,
        "tokens_per_s": 6000.0,
        "loss": 1.5,
    }
    return GroupRow(group=number, **(usual | facts))  # type: ignore[arg-type]


LOST = group(
    2, state="lost", reason="worker 1 died:\n [red] memory", lanes_busy=0, adapters_done=2, tokens_per_s=0.0, loss=None
)
NOW = Snapshot(
    groups=(group(0), group(1, lanes_busy=2, loss=3.0), LOST),
    adapters=1400,
    adapters_done=6,
    adapters_done_here=4,
    failures={9: "loss is nan"},
    steps=200,
    tokens=480_000,
    tokens_per_s=12_000.0,
    elapsed_s=40.0,
    devices=6,
    device_seconds=200.0,
    eta_s=500.0,
)


def drawn(snapshot: Snapshot, rows: int, width: int) -> str:
    text = io.StringIO()
    Console(file=text, width=width, color_system=None).print(bank_table("train bank", snapshot, rows))
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def test_the_table_has_groups_as_rows_and_their_sums_below() -> None:
    assert drawn(NOW, rows=5, width=80) == WHOLE


WHOLE = """\
group   state                             devices  lanes  done  tokens/s   loss
────────────────────────────────────────────────────────────────────────────────
0       training                                2    4/4     1     6,000  1.500
1       training                                2    2/4     1     6,000  3.000
2       lost: worker 1 died: [red] memo…        2    0/4     2         0

2 of 3                                          4    6/8     4    12,000  2.000
train bank: 6/1,400 adapters, 1 failed, 2 groups, 6/8 lanes, 12,000 tokens/s,
loss 2.000, 8 min 20 s left"""


def test_a_short_screen_shows_the_lost_groups_first_and_keeps_the_sums() -> None:
    told = drawn(NOW, rows=2, width=80)
    assert "lost: worker 1" in told and "1 more" in told and "6/8" in told
    assert len(told.splitlines()) == len(WHOLE.splitlines()) - 1


def test_a_narrow_screen_keeps_the_numbers() -> None:
    told = drawn(NOW, rows=5, width=50)
    assert max(map(len, told.splitlines())) <= 50
    assert "12,000" in told and "2.000" in told


def test_the_line_tells_what_is_known() -> None:
    assert bank_line("train bank", NOW) == (
        "train bank: 6/1,400 adapters, 1 failed, 2 groups, 6/8 lanes, 12,000 tokens/s, loss 2.000, 8 min 20 s left"
    )
    start = Snapshot(
        groups=(group(0, state="starting", tokens_per_s=0.0, loss=None, lanes_busy=0),),
        adapters=14,
        adapters_done=0,
        adapters_done_here=0,
        failures={},
        steps=0,
        tokens=0,
        tokens_per_s=0.0,
        elapsed_s=3.0,
        devices=2,
        device_seconds=6.0,
        eta_s=None,
    )
    assert bank_line("x", start) == "x: 0/14 adapters, 1 group, 0/4 lanes, 0 tokens/s, 3.0 s so far"


def test_a_loss_that_is_no_number_is_shown() -> None:
    assert "loss nan" in bank_line("x", with_groups(group(0, loss=math.nan)))


def test_after_the_end_the_line_is_of_the_whole_time() -> None:
    over = with_groups(group(0, state="ended", lanes_busy=0, tokens_per_s=0.0, loss=None), LOST)
    assert bank_line("x", over) == "x: 6/1,400 adapters, 1 failed, 12,000 tokens/s, 40 s in all"


def with_groups(*groups: GroupRow) -> Snapshot:
    return Snapshot(**{name: getattr(NOW, name) for name in Snapshot.__slots__} | {"groups": groups})


# ---- live


def shown(monkeypatch: pytest.MonkeyPatch, poll: object, *, terminal: bool, seconds: float) -> str:
    monkeypatch.setattr(watch, "POLL_S", 0.05)
    monkeypatch.setattr(watch, "LINE_EVERY_S", 0.4)
    monkeypatch.setattr(watch, "QUIET_S", 0.2)
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=120, height=40, color_system=None)
    with live(poll, console=console):  # type: ignore[arg-type]
        time.sleep(seconds)
    return text.getvalue()


def test_elsewhere_than_on_a_terminal_lines_come_now_and_then_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    line = bank_line("train bank", NOW)
    assert shown(monkeypatch, lambda: NOW, terminal=False, seconds=0.0).splitlines() == [line]
    lines = shown(monkeypatch, lambda: NOW, terminal=False, seconds=1.0).splitlines()
    assert set(lines) == {line} and len(lines) in (2, 3)


def test_what_is_short_shows_no_table_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, lambda: NOW, terminal=True, seconds=0.0) == bank_line("train bank", NOW) + "\n"


def test_a_terminal_shows_the_table_and_keeps_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    told = shown(monkeypatch, lambda: NOW, terminal=True, seconds=0.8)
    assert told.count("worker 1 died") >= 2
    assert told.rindex(bank_line("train bank", NOW)) > told.rindex("worker 1 died")
    assert told.endswith(SHOW_CURSOR.decode())


@pytest.mark.parametrize("terminal", [True, False])
def test_a_poll_that_fails_leaves_the_old_picture(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    polls = 0

    def poll() -> Snapshot:
        nonlocal polls
        polls += 1
        if polls > 8:
            raise TimeoutError("nobody answers")
        return NOW

    told = shown(monkeypatch, poll, terminal=terminal, seconds=0.9)
    assert polls > 10 and bank_line("train bank", NOW) in told and "nobody" not in told


def test_a_poll_that_never_works_shows_nothing_and_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, lambda: {}["none"], terminal=False, seconds=0.2) == ""


def test_a_poll_that_hangs_does_not_hold_the_end_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "LAST_POLL_S", 0.2)
    started_s = time.monotonic()
    assert shown(monkeypatch, lambda: time.sleep(5), terminal=True, seconds=0.1) == ""
    assert time.monotonic() - started_s < 3


def test_an_error_of_the_work_goes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.StringIO()
    with pytest.raises(KeyError), live(lambda: NOW, console=Console(file=text)):
        raise KeyError
    assert text.getvalue() == bank_line("train bank", NOW) + "\n"


def test_a_screen_that_is_gone_stops_nothing() -> None:
    text = io.StringIO()
    with live(lambda: NOW, console=Console(file=text)):
        text.close()


SCRIPT = """
import logging, signal, sys, time
import test_watch
from mta_ray.pipeline.bank import watch
signal.signal(signal.SIGINT, signal.default_int_handler)
logging.basicConfig(format="%(message)s", stream=sys.stderr)
watch.POLL_S, watch.QUIET_S = 0.05, 0.1
try:
    with watch.live(lambda: test_watch.NOW):
        time.sleep(0.5)
        print("a result", flush=True)
        logging.warning("an event")
        time.sleep(60)
except KeyboardInterrupt:
    print("stopped", file=sys.stderr)
"""


def test_ctrl_c_leaves_the_terminal_clean_and_what_is_logged_stands_above_the_table() -> None:
    ours, theirs = pty.openpty()
    env = os.environ | {"TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), env["PYTHONPATH"]])
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdin=theirs, stdout=subprocess.PIPE, stderr=theirs, env=env
    ) as process:
        os.close(theirs)
        told, is_told = b"", False
        while True:
            try:
                told += os.read(ours, 4096)
            except OSError:  # the other side is closed
                break
            if not is_told and b"an event" in told:
                process.send_signal(signal.SIGINT)
                is_told = True
        assert process.stdout is not None
        assert process.stdout.read() == b"a result\n"  # a pipe is no terminal, and stays as it is
    os.close(ours)
    assert process.returncode == 0
    last = told.rindex(SHOW_CURSOR)
    assert told.rindex(HIDE_CURSOR) < last
    assert told[last:].removeprefix(SHOW_CURSOR) == b"stopped\r\n"
    assert re.search(rb"\x1b\[2Kan event *\r\n", told)  # where the table began, which then follows
    assert told.index(b"an event") < told.rindex(b"worker 1 died")


def test_the_log_goes_where_it_went_before(monkeypatch: pytest.MonkeyPatch) -> None:
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(handler)
    try:
        before = sys.stderr
        shown(monkeypatch, lambda: NOW, terminal=True, seconds=0.5)
        assert handler.stream is before and sys.stderr is before
    finally:
        logging.getLogger().removeHandler(handler)
