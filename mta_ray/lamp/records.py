"""A JSON file of any size in, its records out, one at a time: an array or JSON Lines, in UTF-8 that may be broken."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from decimal import DecimalException
from itertools import count, islice
from typing import Any

import fsspec
from ijson.backends import yajl2_c as ijson
from ijson.common import JSONError

LINE_BYTES_MAX = 64 * 2**20
"""Of one record a line: more is no such file."""


class Unreadable:
    """Stands where a record is that cannot be read."""

    def __init__(self, reason: str, value: Any = None) -> None:
        self.reason = reason
        self.value = value
        """The record, where only some text in it is broken."""


def read_records(
    file: str, tell: Callable[[int], None] = lambda position: None, *, within: str | None = None
) -> Iterator[Any]:
    """The records of a file, an `Unreadable` for one that cannot be read; `tell` hears how many bytes are behind us.

    A file that is cut off, or no JSON, is a ValueError. `within` names the array's key where the file is one object.
    """
    with open_bytes(file) as stream:
        head = stream.read(1 << 16).removeprefix(codecs.BOM_UTF8).lstrip()
    if within is not None:
        yield from _array(file, f"{within}.item", tell)
    elif head.startswith(b"["):
        yield from _array(file, "item", tell)
    elif head.startswith(b"{"):
        yield from _lines(file, tell)
    else:
        found = "nothing" if not head else "gzip" if head.startswith(b"\x1f\x8b") else f"byte 0x{head[0]:02x}"
        raise ValueError(f"{file} is not JSON: it begins with {found}; wanted UTF-8 text that begins with [ or {{")


def describe(value: Any) -> str:
    """What a JSON value is, without its content: field names at most."""
    if isinstance(value, dict):
        return "objects with " + (", ".join(repr(str(key)[:30]) for key in islice(value, 6)) or "no fields")
    return {list: "lists", str: "texts", bool: "true or false", type(None): "null"}.get(type(value), "numbers")


def writable(text: str) -> str:
    """The text with what cannot be written as UTF-8 replaced."""
    return _UNWRITABLE.sub("\ufffd", text)


def open_bytes(file: str) -> Any:
    """A path or fsspec URL, opened to read bytes."""
    store, path = fsspec.core.url_to_fs(file)
    if store.isdir(path):
        raise ValueError(f"{file} is a folder; give the LaMP file in it")
    try:
        return store.open(path, "rb")
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file; correct the path") from None


def is_file(file: str) -> bool:
    """Whether a file is there."""
    store, path = fsspec.core.url_to_fs(file)
    return bool(store.isfile(path))


# ---- arrays


def _array(file: str, prefix: str, tell: Callable[[int], None]) -> Iterator[Any]:
    with open_bytes(file) as stream:
        text = _Utf8(stream)
        values = ijson.items(text, prefix)
        for number in count():
            try:
                value = next(values)
            except StopIteration:
                return
            except (JSONError, ValueError, DecimalException) as error:  # of _Utf8 and of Decimal
                raise ValueError(_what_is_wrong(file, error, number, text.bytes_read)) from None
            tell(text.bytes_read)
            is_broken = text.is_repaired and _is_broken(value)
            yield Unreadable("broken UTF-8", value) if is_broken else value


def _what_is_wrong(file: str, error: Exception, number: int, position: int) -> str:
    is_exponent = isinstance(error, DecimalException)
    what = "a number too large" if is_exponent else str(error).partition("\n")[0]  # the rest of yajl's quotes the file
    if "premature EOF" in what:
        return f"{file} is cut off: it ends at byte {position}, in or after record {number}, not with ]; copy it again"
    where = f"in or after record {number}, at most 64 KiB before byte {position}"
    return f"{file} is not JSON: {what}, {where}; mend or replace it"


class _Utf8:
    """A byte stream as valid UTF-8: what is broken becomes one noncharacter, so that only its record is lost.

    What ijson cannot bear (see `_TOO_DEEP`, `_LongNumbers`) is a ValueError before ijson gets it.
    """

    MARK = "\ufdd0"

    def __init__(self, stream: Any) -> None:
        self.bytes_read = 0
        self.is_repaired = False
        self._stream = stream
        self._long_numbers = _LongNumbers()
        self._decode = codecs.getincrementaldecoder("utf-8-sig")(errors="surrogateescape").decode

    def read(self, size: int) -> bytes:
        while size:
            chunk = self._stream.read(size)
            self.bytes_read += len(chunk)
            text = self._decode(chunk, not chunk)
            try:
                clean = text.encode()
            except UnicodeEncodeError:
                self.is_repaired = True
                clean = _SURROGATES.sub(self.MARK, text).encode()
            if _TOO_DEEP.search(clean):
                raise ValueError("values nested thousands deep")
            self._long_numbers.look_for(clean)
            if clean or not chunk:
                return clean
        return b""


_TOO_DEEP = re.compile(rb'(?:[\[{]\s*(?:"[^"\\]{0,20}"\s*:\s*)?){2000}')
"""ijson's memory grows with the square of the depth: 100,000 brackets would take 26 GB."""


class _LongNumbers:
    """Looks at JSON, chunk by chunk, for integers that Python refuses to read: ijson's C code crashes on them.

    Digits within a text are no number.
    """

    _START = re.compile(rb"[\[,:\s-][0-9]{4000}")  # Python's limit is 4,300 digits
    _START_BYTES = 4001

    def __init__(self) -> None:
        self._tail = b""
        self._is_in_text = False
        self._backslash = b""
        """The backslash, if one ends the last chunk and what it escapes begins the next."""

    def look_for(self, chunk: bytes) -> None:
        """ValueError where such a number begins or goes on in this chunk."""
        start = len(self._tail)  # shorter than what is looked for: whatever is found ends in this chunk
        joined = self._tail + chunk
        may_be = any(joined[n : n + 2000].isdigit() for n in range(0, len(joined), 2000))  # quick, and mostly false
        for found in self._START.finditer(joined) if may_be else ():
            if self._is_in_text == _has_even_quotes(self._backslash + chunk[: found.end() - start]):
                continue
            raise ValueError("a number of thousands of digits")
        self._tail = joined[1 - self._START_BYTES :]
        text = self._backslash + chunk
        self._is_in_text ^= not _has_even_quotes(text)
        self._backslash = b"\\" * ((len(text) - len(text.rstrip(b"\\"))) % 2)


def _has_even_quotes(text: bytes) -> bool:
    return text.replace(b"\\\\", b"").replace(b'\\"', b"").count(b'"') % 2 == 0


_SURROGATES = re.compile("[\ud800-\udfff]+")
_UNWRITABLE = re.compile(f"[\ud800-\udfff]+|{_Utf8.MARK}")


def _is_broken(value: Any) -> bool:
    """Whether a text somewhere in the value was broken UTF-8, or holds half a surrogate pair."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            if _UNWRITABLE.search(value):
                return True
        elif isinstance(value, dict):
            waiting += value.keys()
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return False


# ---- lines


def _lines(file: str, tell: Callable[[int], None]) -> Iterator[Any]:
    with open_bytes(file) as stream:
        position, is_first = 0, True
        for line in iter(lambda: stream.readline(LINE_BYTES_MAX), b""):
            if len(line) == LINE_BYTES_MAX:
                raise ValueError(
                    f"{file} has a line of more than {LINE_BYTES_MAX // 2**20} MiB and is no list of records; LaMP's "
                    "files are one list, or one record a line"
                )
            line = line if position else line.removeprefix(codecs.BOM_UTF8)
            position += len(line)
            if not line.strip():
                continue
            tell(position)
            try:
                value = json.loads(line.decode("utf-8", "surrogateescape"))
            except (ValueError, RecursionError):
                if is_first:
                    raise ValueError(_why_no_lines(file)) from None
                if not line.endswith(b"\n"):
                    raise ValueError(
                        f"{file} is cut off: it ends at byte {position}, within a record; copy it again"
                    ) from None
                value = Unreadable("broken JSON")
            is_first = False
            yield Unreadable("broken UTF-8", value) if _is_broken(value) else value


def _why_no_lines(file: str) -> str:
    """What a file is that begins with { but has no record in its first line."""
    keys: dict[str, None] = {}
    try:
        with open_bytes(file) as stream:
            for prefix, event, value in ijson.parse(_Utf8(stream)):
                if event == "map_key" and prefix == "":
                    keys[value] = None
                    if len(keys) == 6:
                        break
    except (JSONError, ValueError, DecimalException) as error:
        if "premature EOF" in str(error):
            return f"{file} is cut off: it ends within its first record; copy it again"
        return f"{file} is not JSON: {str(error).partition(chr(10))[0]}; mend or replace it"
    found = describe(keys).replace("objects", "one object")
    return f"{file} is JSON, but not LaMP: it holds {found}; wanted an array of records, or one record a line"
