"""A single file of this machine, written whole or not at all. Folders are artifacts; stores have their own put."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any


def replace_file(path: str | Path, write: Callable[[Path], Any]) -> None:
    """`write` fills a file of another name beside `path`, which then takes its place; folders are made.

    If `write` raises, nothing has changed. Two processes that write the same file do not meet: the later one counts.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
