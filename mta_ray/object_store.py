"""An object store by any fsspec URL, reached with patience: one that is away for a minute has done no harm.

What lies there is not known here. A store that stays away is one StoreAway, after $MTA_STORE_PATIENCE_S (two minutes).
"""

from __future__ import annotations

import errno
import logging
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec

ResultT = TypeVar("ResultT")

log = logging.getLogger(__name__)
PATIENCE_S = 120.0
"""How long a store that does not answer is tried again, from its first silence on."""
PAUSE_S, PAUSE_MAX_S = 0.5, 10.0
"""The first pause between two tries, each later one twice as long, and the longest."""

_AWAY_NUMBERS = {
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.ECONNABORTED,
    errno.EPIPE,
    errno.ETIMEDOUT,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.EBUSY,  # what s3fs makes of 503 and SlowDown
    getattr(errno, "EREMOTEIO", errno.EBUSY),  # and of 500
}
# The clients' own errors of a broken line have no ancestor in common but their names: botocore's, aiohttp's, Azure's.
_AWAY_NAMES = {
    "ConnectionError",
    "HTTPClientError",
    "ClientConnectionError",
    "ClientPayloadError",
    "ServiceRequestError",
    "ServiceResponseError",
    "IncompleteRead",
}


class StoreAway(OSError):
    """The store did not answer, however often it was asked."""


def is_remote(path: str | Path) -> bool:
    """Whether it is the URL of a store, not a local folder."""
    text = str(path)
    return isinstance(path, str) and "://" in text and not text.startswith(("file://", "local://"))


def told(url: str | Path) -> str:
    """The URL as it may be logged: without the password that it may hold."""
    return re.sub(r"//[^/@]*@", "//***@", str(url))


@dataclass(frozen=True, slots=True)
class Store:
    """The files under a URL, by relative name. Every call tries again while the store does not answer."""

    url: str
    files: Any
    """fsspec's file system."""
    root: str

    def read(self, name: str) -> bytes:
        """The whole file. Raises FileNotFoundError."""
        return self._patiently(lambda: self.files.cat_file(self._at(name)))

    def write(self, name: str, content: bytes) -> None:
        """One put: whole, or not there."""
        self._patiently(lambda: self.files.makedirs(self.root, exist_ok=True))
        self._patiently(lambda: self.files.pipe_file(self._at(name), content))

    def send(self, file: Path, name: str) -> None:
        """Put a local file there."""
        self._patiently(lambda: self.files.put_file(str(file), self._at(name)))

    def fetch(self, name: str, file: Path) -> None:
        """Get a file to here. Raises FileNotFoundError."""
        self._patiently(lambda: self.files.get_file(self._at(name), file))

    def exists(self, name: str = "") -> bool:
        """Whether a file or a folder is there; of the store's own root where no name is given."""
        return self._patiently(lambda: self.files.exists(self._at(name)))

    def names(self) -> list[str]:
        """What lies directly under the root, in order; nothing where there is no such place."""
        try:
            found = self._patiently(lambda: self.files.ls(self.root, detail=False))
        except FileNotFoundError:
            return []
        own = self.root.rstrip("/").rsplit("/", 1)[-1]
        names = {entry.rstrip("/").rsplit("/", 1)[-1] for entry in found}
        return sorted(names - {"", own} if self.root.rstrip("/") in {f.rstrip("/") for f in found} else names)

    def remove(self, name: str = "") -> None:
        """Remove a file or a folder with all in it; nothing where it is not.

        Raises PermissionError where it is there still: a store may refuse single files of many without an error.
        """
        try:
            self._patiently(lambda: self.files.rm(self._at(name), recursive=True))
        except FileNotFoundError:
            return
        self.files.invalidate_cache()
        if self.exists(name):
            raise PermissionError(
                f"{told(self.url)}: {name or 'it'} could not be removed; may these credentials delete?"
            )

    def _at(self, name: str) -> str:
        return "/".join(part for part in (self.root, name) if part)

    def _patiently(self, act: Callable[[], ResultT]) -> ResultT:
        pause_s, silent_since_s = PAUSE_S, None
        while True:
            try:
                self.files.invalidate_cache()  # others write here too
                return act()
            except Exception as error:
                if not is_away(error):
                    raise
                now_s = time.monotonic()
                silent_since_s = now_s if silent_since_s is None else silent_since_s
                left_s = silent_since_s + patience_s() - now_s
                kind = type(error).__name__
                if left_s <= 0:
                    raise StoreAway(
                        f"{told(self.url)} did not answer for {now_s - silent_since_s:.0f} s ({kind}); what is there "
                        "is as it was: check the network and the store's address, and run again"
                    ) from error
                log.warning("%s does not answer (%s); trying again for %.0f s more", told(self.url), kind, left_s)
                time.sleep(min(pause_s, left_s))
                pause_s = min(2 * pause_s, PAUSE_MAX_S)


def open_store(url: str) -> Store:
    """The store behind a URL; nothing is asked of it yet. Raises ValueError where no client for it is installed."""
    try:
        files, root = fsspec.core.url_to_fs(url)
    except ImportError as error:
        extra = "'mta-ray[s3]'" if url.startswith(("s3://", "s3a://")) else "that package"
        raise ValueError(f"{told(url)}: {error}: pip install {extra}, or give a local folder") from error
    return Store(url, files, root)


def is_away(error: BaseException) -> bool:
    """Whether it says that the other side cannot be reached or is overrun: worth another try."""
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    if isinstance(error, OSError) and error.errno in _AWAY_NUMBERS:
        return True
    return any(kind.__name__ in _AWAY_NAMES for kind in type(error).__mro__)


def patience_s() -> float:
    """$MTA_STORE_PATIENCE_S, else PATIENCE_S."""
    text = os.environ.get("MTA_STORE_PATIENCE_S", "")
    try:
        return float(text) if text else PATIENCE_S
    except ValueError:
        raise ValueError(f"MTA_STORE_PATIENCE_S is {text!r}, wanted a number of seconds") from None
