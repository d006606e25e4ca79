"""From tokens that come one by one to text that can be sent at once: whole characters only, and never a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

_UNFINISHED = "\ufffd"
"""What a tokenizer writes for bytes that are not yet a whole character."""


@dataclass(slots=True)
class TextStream:
    """One answer's text. What `push` and `end` return, put together, is the answer, and no part of it changes later."""

    tokenizer: Any
    """Anything with the `decode` of transformers' tokenizers."""
    stops: Sequence[str] = ()
    """The text ends before the first of these, wherever in a token it begins."""
    strips: bool = False
    """The text begins with its first character that is no space; stop strings are looked for after that."""
    is_stopped: bool = False
    """A stop string came: cancel the request, nothing more will be returned."""
    chars: int = 0
    """Of the text so far, what is held back among it: where the next token's text begins."""
    _ids: list[int] = field(default_factory=list)
    _start: int = 0
    """First token of the window that is decoded again with each push."""
    _read: int = 0
    """Tokens before this one are written already."""
    _held: str = ""
    """Text that may be the beginning of a stop string."""

    def push(self, token: int) -> str:
        """The text that is certain after this token; often empty, sometimes more than the token's own."""
        if self.is_stopped:
            return ""
        self._ids.append(token)
        return self._checked(self._new_text(), is_end=False)

    def end(self) -> str:
        """What was held back."""
        return "" if self.is_stopped else self._checked(self._new_text(is_end=True), is_end=True)

    def _new_text(self, *, is_end: bool = False) -> str:
        # The window starts before what is new: a token's text depends on its neighbours (spaces, word pieces, bytes).
        before = self._decode(self._ids[self._start : self._read])
        now = self._decode(self._ids[self._start :])
        if now.endswith(_UNFINISHED) and not is_end:
            return ""
        if len(now) > len(before):
            self._start, self._read = self._read, len(self._ids)
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        # Without the clean-up, which takes back spaces that were sent already.
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _checked(self, new: str, *, is_end: bool) -> str:
        if self.strips:
            new = new.lstrip()
            self.strips = not new
        self.chars += len(new)
        text = self._held + new
        places = [place for stop in self.stops if stop and (place := text.find(stop)) >= 0]
        if places:
            self.is_stopped, self._held = True, ""
            return text[: min(places)]
        keep = 0 if is_end else max((_overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
