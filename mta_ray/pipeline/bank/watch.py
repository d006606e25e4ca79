"""The training of a bank, shown while it runs: a live table on a terminal, a plain line now and then elsewhere.

Where the picture comes from is the caller's: `with live(lambda: ray.get(foreman.snapshot.remote(), timeout=5)): ...`
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TextIO

from rich.console import Console
from rich.live import Live

from mta_ray.console import LINE_EVERY_S, QUIET_S, announce
from mta_ray.pipeline.bank.snapshot import Snapshot
from mta_ray.pipeline.bank.table import bank_line, bank_table

log = logging.getLogger(__name__)

POLL_S = 0.5
LAST_POLL_S = 10.0
"""The end waits so long for the last picture, and goes on without it."""
FRAME_LINES = 8
"""Lines of the screen that are not groups: head, rules, sums, the line below, and the prompt."""


@contextmanager
def live(poll: Callable[[], Snapshot], *, name: str = "train bank", console: Console | None = None) -> Iterator[None]:
    """Show what `poll` tells, on stderr, until the block ends; a poll that fails leaves the picture that was.

    What takes less than QUIET_S shows no table, only the line at the end.
    """
    console = console or Console(stderr=True)
    watch = _Watch(poll, name, console)
    thread = threading.Thread(target=watch.run, name=f"watch {name}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        watch.ended.set()
        try:
            thread.join(LAST_POLL_S)
        finally:  # a second Ctrl-C too leaves the terminal as it was
            watch.close()


class _Watch:
    def __init__(self, poll: Callable[[], Snapshot], name: str, console: Console) -> None:
        self._poll, self._name, self._console = poll, name, console
        self.ended = threading.Event()
        self._snapshot: Snapshot | None = None
        self._table: Live | None = None
        self._open = ExitStack()
        self._turn = threading.Lock()
        self._is_closed = False

    def run(self) -> None:
        """Look until the end, and once more then."""
        started_s = last_s = time.monotonic()
        is_last = False
        while not is_last:
            is_last = self.ended.wait(POLL_S)
            try:
                self._snapshot = self._poll()
                now_s = time.monotonic()
                if self._console.is_terminal:
                    if now_s - started_s >= QUIET_S:
                        self._draw(self._snapshot)
                elif not is_last and now_s - last_s >= LINE_EVERY_S:
                    last_s = now_s
                    self._say(self._snapshot)
            except Exception as error:  # whatever goes wrong with looking, the work goes on
                log.debug("%s: no new picture: %r", self._name, error)

    def close(self) -> None:
        """Leave the last picture standing, or its line."""
        with self._turn:
            self._is_closed = True
            was_drawn = self._table is not None
            with suppress(Exception):  # a terminal that is gone
                self._open.close()
        if self._snapshot is not None and not was_drawn:
            with suppress(Exception):
                self._say(self._snapshot)

    def _draw(self, snapshot: Snapshot) -> None:
        rows = max(self._console.height - FRAME_LINES, 1)
        table = bank_table(self._name, snapshot, rows)
        with self._turn:
            if self._is_closed:
                return
            if self._table is None:
                stderr = sys.stderr
                self._table = Live(
                    table, console=self._console, auto_refresh=False, redirect_stdout=sys.stdout.isatty()
                )
                self._open.callback(self._table.stop)
                self._table.start()
                self._open.enter_context(_log_above(stderr))
            self._table.update(table, refresh=True)

    def _say(self, snapshot: Snapshot) -> None:
        announce(bank_line(self._name, snapshot), console=self._console)


@contextmanager
def _log_above(stderr: TextIO) -> Iterator[None]:
    """What is logged to `stderr` goes through what rich has put in its place, which prints above the table."""
    moved = [
        (handler, handler.stream)
        for handler in logging.getLogger().handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream is stderr
    ]
    for handler, _ in moved:
        handler.setStream(sys.stderr)
    try:
        yield
    finally:
        for handler, stream in moved:
            handler.setStream(stream)
