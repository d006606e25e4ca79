"""What a person reads while a stage runs."""

from __future__ import annotations

import io
import re
import time

import pytest
from rich.console import Console

from mta_ray import console as console_module
from mta_ray.console import announce, progress


def test_the_time_left_does_not_count_the_start_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr("mta_ray.console.time.monotonic", lambda: now_s)
    said = io.StringIO()
    with progress("train", 24, "steps", console=Console(file=said)) as meter:
        now_s = 100.0  # the workers are up, and have done four
        meter.advance(4)
        assert meter.line() == "train: 4/24 steps, 2.4 steps/min, 8 min 20 s left"
        now_s = 110.0
        meter.advance(10)
        assert meter.line() == "train: 14/24 steps, 1.0 steps/s, 10 s left"
    assert said.getvalue().splitlines()[-1] == meter.line()


def told_by(unit_of_time_s: float, *, terminal: bool, total: int | None = 30) -> str:
    """What is shown while 3 times 10 are done, `unit_of_time_s` apart."""
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=100, color_system=None)
    with progress("embed [users]", total, "users", console=console) as meter:
        for done in (10, 20, 30):
            time.sleep(unit_of_time_s)
            meter.set(done) if done == 20 else meter.advance(10)
    assert meter.done == 30
    return text.getvalue()


def test_elsewhere_than_on_a_terminal_there_is_one_line_at_the_end() -> None:
    told = told_by(0.0, terminal=False)
    assert re.fullmatch(r"embed \[users\]: 30/30 users, [\d,.]+ users/s, 0\.\d s in all\n", told)


def test_a_line_comes_in_between_when_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console_module, "LINE_EVERY_S", 0.3)
    told = told_by(0.2, terminal=False).splitlines()
    assert len(told) == 2  # 20 users after 0.4 s, then the end
    assert re.fullmatch(r"embed \[users\]: 20/30 users, [\d.]+ users/s, [\d.]+ s left", told[0])


def test_a_terminal_shows_a_bar_only_for_what_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told_by(0.0, terminal=True) == ""
    monkeypatch.setattr(console_module, "QUIET_S", 0.1)
    told = told_by(0.2, terminal=True)
    assert "embed [users]" in told and "30/30 users" in told and "users/s" in told


def test_a_total_need_not_be_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.fullmatch(r"embed \[users\]: 30 users, .* so far\n", told_by(0.0, terminal=False, total=None))
    monkeypatch.setattr(console_module, "QUIET_S", 0.1)
    assert "30 users" in told_by(0.2, terminal=True, total=None)


def test_a_bar_ends_with_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.StringIO()
    with pytest.raises(KeyError), progress("embed", 5, "users", console=Console(file=text)) as meter:
        meter.advance(2)
        raise KeyError
    assert text.getvalue().startswith("embed: 2/5 users")


def test_an_announcement_is_shown_as_it_is() -> None:
    text = io.StringIO()
    announce("bank [red] is at /a/[b]", console=Console(file=text, width=10))
    assert text.getvalue() == "bank [red] is at /a/[b]\n"
