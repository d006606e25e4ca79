"""Files of this machine: one written whole or not at all (folders are artifacts), a folder's identity, a lock."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SMALL_BYTES, SAMPLES, SAMPLE_BYTES = 4 * 2**20, 256, 4096
"""A file up to the first size counts whole; of a larger one its size, and so many pieces, evenly spaced."""


def folder_identity(folder: str | Path) -> str:
    """A hash of what lies in a folder of a model, large files by sample: another model there has another one."""
    digest = hashlib.sha256()
    root = Path(folder)
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(root).as_posix()}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= SMALL_BYTES:
                digest.update(file.read())
                continue
            for number in range(SAMPLES):
                file.seek((size - SAMPLE_BYTES) * number // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def replace_file(path: str | Path, write: Callable[[Path], Any]) -> None:
    """`write` fills a file of another name beside `path`, which then takes its place; folders are made.

    If `write` raises, nothing has changed. Two processes that write the same file do not meet: the later one counts.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # the name must never reach the disk before what it stands for
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def alone_in(folder: str | Path, work: str) -> Iterator[None]:
    """Be the only process that does this work in the folder, which is made; whatever lies in it. The lock ends with the
    process, however that ends. Where the file system has no locks, there is none.

    Raises ValueError where another process is at work there.
    """
    os.makedirs(folder, exist_ok=True)
    held = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise ValueError(
                    f"{work} is at work in {folder}; wait for it, stop it, or give another --out"
                ) from None
        yield
    finally:
        os.close(held)
