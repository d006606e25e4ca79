"""The processes of a command that leads a session: its cluster, whose parents may be gone already."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress

import psutil

LOOK_S = 0.05


def members(leader: int) -> list[psutil.Process]:
    """All that run in the session, the leader among them."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def kill_all(command: subprocess.Popen[bytes]) -> None:
    """The command and all of its session, as when the machine goes down; nothing where they have ended."""
    while left := members(command.pid):
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        command.poll()  # or it would be a zombie for ever
        time.sleep(LOOK_S)
    command.wait()
