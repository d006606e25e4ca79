"""How much memory a run takes on this machine: the driver and Ray's processes, added up, at the worst moment."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import ray

EVERY_S = 2.0
MIB = 2**20


class PeakMemory:
    """The largest sum that was seen so far."""

    def __init__(self) -> None:
        self.peak_mib = 0.0
        """MiB. Pages that several processes share (the object store, libraries) count once."""
        self.process_peak_mib = 0.0
        """MiB of the largest single process, with its share of what it shares with others."""
        self.process_peak_name = ""
        """What Ray or the system calls that process."""

    def look(self) -> None:
        """Measure once more."""
        sizes = {pid: _proportional_bytes(pid) / MIB for pid in _processes()}
        self.peak_mib = max(self.peak_mib, sum(sizes.values()))
        largest = max(sizes, key=lambda pid: sizes[pid])
        if sizes[largest] > self.process_peak_mib:
            self.process_peak_mib, self.process_peak_name = sizes[largest], _name(largest)


@contextmanager
def watch_memory() -> Iterator[PeakMemory]:
    """Measure every two seconds until the block ends; on a cluster of several machines, this one alone."""
    memory, ended = PeakMemory(), threading.Event()

    def watch() -> None:
        memory.look()
        while not ended.wait(EVERY_S):
            memory.look()

    watcher = threading.Thread(target=watch, name="watch memory", daemon=True)
    watcher.start()
    try:
        yield memory
    finally:
        ended.set()
        watcher.join(timeout=EVERY_S)


def _processes() -> set[int]:
    """This process with all that it started, and the processes of the Ray session that it is connected to."""
    found = {os.getpid()} | {child.pid for child in psutil.Process().children(recursive=True)}
    if not ray.is_initialized():
        return found
    session = ray.get_runtime_context().get_session_name()
    for process in psutil.process_iter():
        try:
            if session in " ".join(process.cmdline()):
                found |= {process.pid} | {child.pid for child in process.children(recursive=True)}
        except psutil.Error:
            continue
    return found


def _name(pid: int) -> str:
    """`driver`, or a process's title without its arguments: Ray tells the work there."""
    if pid == os.getpid():
        return "driver"
    try:
        return Path((psutil.Process(pid).cmdline() or ["?"])[0]).name
    except psutil.Error:
        return "?"


def _proportional_bytes(pid: int) -> int:
    try:
        full = psutil.Process(pid).memory_full_info()
    except (psutil.Error, OSError):  # it has ended since
        return 0
    return int(getattr(full, "pss", full.uss))
