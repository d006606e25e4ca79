"""What a person sees while a stage runs: a bar on a terminal, a plain line now and then elsewhere; on stderr."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

QUIET_S = 2.0
"""What is done within this time shows no bar."""
LINE_EVERY_S = 10.0
"""Without a terminal (a job's log), one line at most this often."""


FILE_COLUMNS = 160
"""Of a table that is printed to no terminal."""


class Meter:
    """How much of one named piece of work is done. Any thread may report."""

    def __init__(self, name: str, total: int | None, unit: str) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done = 0
        self.started_s = time.monotonic()
        self._first = (0, self.started_s)  # (done, when) once anything was: what came before was starting up
        self._lock = threading.Lock()

    def advance(self, n: int = 1) -> None:
        """`n` more are done."""
        with self._lock:
            self._reach(self.done + n)
        self._show()

    def set(self, done: int) -> None:
        """`done` are done in all."""
        with self._lock:
            self._reach(done)
        self._show()

    def line(self) -> str:
        """`embed users: 300/1,000 users, 50.0 users/s, 14 s left`."""
        now_s = time.monotonic()
        elapsed_s = max(now_s - self.started_s, 1e-9)
        done, since_s = self._first if self.done > self._first[0] else (0, self.started_s)
        rate = (self.done - done) / max(now_s - since_s, 1e-9)
        share = f"{self.done:,.0f}" + (f"/{self.total:,.0f}" if self.total is not None else "")
        words = [f"{self.name}: {share} {self.unit}", _rate(rate, self.unit)]
        if self.total is not None and 0 < self.done < self.total:
            words.append(f"{duration((self.total - self.done) / rate)} left")
        else:
            words.append(
                f"{duration(elapsed_s)} so far" if self.done != self.total else f"{duration(elapsed_s)} in all"
            )
        return ", ".join(words)

    def _reach(self, done: int) -> None:
        if not self.done:
            self._first = (done, time.monotonic())
        self.done = done

    def _show(self) -> None:
        """Bring what is on the screen up to date."""

    def _end(self) -> None:
        """Nothing more comes."""


@contextmanager
def progress(name: str, total: int | None, unit: str, *, console: Console | None = None) -> Iterator[Meter]:
    """Show how far a piece of work is, with rate and time left, until the block ends; `total` may be unknown (None)."""
    console = console or Console(stderr=True)
    meter = _Bar(name, total, unit, console) if console.is_terminal else _Lines(name, total, unit, console)
    try:
        yield meter
    finally:
        meter._end()


def announce(text: str, *, console: Console | None = None) -> None:
    """Say one thing, such as what a stage begins or why it rests. The text is shown as it is."""
    (console or Console(stderr=True)).print(text, markup=False, highlight=False, soft_wrap=True)


def table_console() -> Console:
    """Where tables are printed: as wide as the terminal; in a file or a pipe wide enough that no cell is broken."""
    console = Console()
    return console if console.is_terminal else Console(width=FILE_COLUMNS)


def duration(seconds: float) -> str:
    """`9.5 s`, `14 s`, `8 min 20 s`, `2 h 05 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as text in columns, the first one being their heads."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


class _Bar(Meter):
    def __init__(self, name: str, total: int | None, unit: str, console: Console) -> None:
        super().__init__(name, total, unit)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            _Count(unit),
            TimeRemainingColumn(elapsed_when_finished=True) if total is not None else TimeElapsedColumn(),
            console=console,
        )
        self._task = self._bar.add_task(name, total=total)
        self._is_shown = self._is_ended = False
        self._turn = threading.Lock()
        self._timer = threading.Timer(QUIET_S, self._begin)
        self._timer.daemon = True
        self._timer.start()

    def _begin(self) -> None:
        with self._turn:
            if not self._is_ended:
                self._bar.start()
                self._is_shown = True

    def _show(self) -> None:
        self._bar.update(self._task, completed=self.done)

    def _end(self) -> None:
        self._timer.cancel()
        with self._turn:
            self._is_ended = True
            if self._is_shown:
                self._bar.stop()


class _Count(ProgressColumn):
    """`300/1,000 users  50.0 users/s`."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        share = f"{task.completed:,.0f}" + (f"/{task.total:,.0f}" if task.total is not None else "")
        rate = task.finished_speed or task.speed
        return Text(f"{share} {self._unit}" + (f"  {_rate(rate, self._unit)}" if rate else ""))


class _Lines(Meter):
    def __init__(self, name: str, total: int | None, unit: str, console: Console) -> None:
        super().__init__(name, total, unit)
        self._console = console
        self._turn = threading.Lock()
        self._last_s = self.started_s

    def _show(self) -> None:
        with self._turn:
            if time.monotonic() - self._last_s < LINE_EVERY_S:
                return
            self._last_s = time.monotonic()
        announce(self.line(), console=self._console)

    def _end(self) -> None:
        announce(self.line(), console=self._console)


def _rate(per_s: float, unit: str) -> str:
    return f"{per_s:,.1f} {unit}/s" if per_s >= 0.1 else f"{per_s * 60:,.1f} {unit}/min"
