"""LaMP files in, a stream of users and rejects out, in memory that does not grow with the file.

Reads LaMP's own form (a list of questions with profiles, the answers in a second file) and the processed form of OPPU
and Per-Pcs (a list of users with profile and queries), each as one JSON array or as JSON Lines; tells them by content.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from decimal import Decimal
from functools import cache, lru_cache
from hashlib import blake2b
from itertools import islice
from typing import Any, Literal

import numpy as np

from mta_ray.lamp.records import Unreadable, describe, is_file, open_bytes, read_records, writable
from mta_ray.lamp.tasks import TASKS, Task, distinct_labels, goes_by, normalise_label
from mta_ray.lamp.users import HistoryItem, Query, User

FIRST_RECORDS = 16
"""So many records are looked at to tell what a file is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reject:
    """A record that is left out, and why."""

    file: str
    position: int
    """0-based place of the record in its file (of the line, blank ones not counted, in JSON Lines)."""
    id: str
    """As far as it could be read; may be empty."""
    reason: str
    """What is wrong: a fixed phrase, then, after a colon, where."""

    @property
    def kind(self) -> str:
        """The reason without the place: what rejects are counted by."""
        return self.reason.partition(":")[0]


class LampFile:
    """One file of a task: iterate over it for its users and rejects, in the file's order.

    A file that is no LaMP file, or not this task's, is a ValueError when opened; one that breaks off, or whose labels
    cannot be told apart, while iterating.
    A file of questions gives one `User` a question; where questions name a user (time-based splits), several of them
    carry the same id: `join` makes one user of those.
    """

    def __init__(self, file: str, task: Task, *, outputs: str | None = None, labels: Sequence[str] = ()) -> None:
        """`outputs`: where the answers lie; by default X_outputs.json beside X_questions.json. `labels`: the allowed
        answers where no input lists them; by default those of all the file's inputs, else the task's."""
        self.file = file
        self.task = task
        self.labels: tuple[str, ...] = ()
        """Labels that the inputs list, in the order and spelling in which they first stand in the file; complete after
        iterating."""
        self.bytes_read = 0
        """How far the reading is: position in the file."""
        self.names_user = False
        """Whether the question read last names its user; else the user goes by the question's id."""
        self._default_labels = tuple(distinct_labels(tuple(labels) or task.labels, file).values())
        self._is_looked_ahead = "labels" not in _pattern(task).groupindex
        first = list(islice(read_records(file), FIRST_RECORDS))
        self.form = _form(file, first)
        _check_task(file, task, [record for record in first if isinstance(record, dict)])
        self.outputs = _find_outputs(file, task, outputs) if self.form == "questions" else None

    def __iter__(self) -> Iterator[User | Reject]:
        golds = _Golds(self.outputs) if self.outputs else None
        seen = _SeenIds()
        id_field = "user_id" if golds is None else "id"
        for position, record in enumerate(read_records(self.file, self._tell)):
            key = _lenient_id(record, id_field)
            try:
                # 1. a record, not met before
                if isinstance(record, Unreadable):
                    raise _Broken(record.reason)
                key = _text(_dict(record, "record"), id_field, "")
                if key in seen:
                    raise _Broken("duplicate id")

                # 2. what is asked, who asks, what is known of the user
                queries = self._queries(record, golds)
                self.names_user = golds is not None and record.get("user_id") is not None
                user_id = _text(record, "user_id", "") if self.names_user else key
                history = self._history(_list(record, "profile", ""))
            except _Broken as broken:
                yield Reject(file=self.file, position=position, id=key, reason=str(broken))
            else:
                seen.add(key)
                yield User(id=user_id, task=self.task.name, history=history, queries=queries)

    def _tell(self, position: int) -> None:
        self.bytes_read = position

    def _queries(self, record: dict[str, Any], golds: _Golds | None) -> tuple[Query, ...]:
        if golds is not None:
            gold = golds.of(_text(record, "id", ""))
            if gold is None:
                raise _Broken("no answer in the outputs file")
            return (self._query({**record, "gold": gold}, ""),)
        asked = _list(record, "query", "")
        queries = tuple(self._query(_dict(q, f"query[{n}]"), f"query[{n}].") for n, q in enumerate(asked))
        asked_ids: set[str] = set()
        for n, query in enumerate(queries):
            if query.id in asked_ids:  # methods are compared query by query
                raise _Broken("duplicate id", f"query[{n}].id")
            asked_ids.add(query.id)
        return queries

    def _query(self, asked: dict[str, Any], where: str) -> Query:
        match = _pattern(self.task).fullmatch(_text(asked, "input", where))
        if match is None:
            raise _Broken("unknown wording", f"{where}input")
        found = {name: text.strip() for name, text in match.groupdict(default="").items()}
        if not found["content"]:
            raise _Broken("missing field", f"{where}input has no text to ask about")
        options = (found["option_1"], found["option_2"]) if "option_1" in found else ()
        listed = self._add_labels(_split_labels(found.get("labels", "")))
        gold = _text(asked, "gold", where)
        if self.task.kind != "text":
            gold = _label(gold, listed, f"{where}gold") if listed else self._label(gold, f"{where}gold")
        return Query(id=_text(asked, "id", where), content=found["content"], target=gold, options=options)

    def _history(self, profile: list[Any]) -> tuple[HistoryItem, ...]:
        if not profile:
            raise _Broken("empty profile")
        items = [self._item(_dict(item, f"profile[{n}]"), n) for n, item in enumerate(profile)]
        if all(item.date for item in items):
            items.sort(key=lambda item: item.date or "")
        return tuple(items)

    def _item(self, item: dict[str, Any], number: int) -> HistoryItem:
        where = f"profile[{number}]."
        contents = (_text(item, name, where, is_optional=True) for name in self.task.content_fields)
        content = next((text for text in contents if text), "")
        if self.task.content_fields and not content:
            raise _Broken("missing field", where + " or ".join(self.task.content_fields))
        target = _text(item, self.task.target_field, where, is_optional=self.task.is_target_optional)
        if self.task.has_label_targets:
            target = self._label(target, where + self.task.target_field)
        item_id = _text(item, "id", where, is_optional=True) or str(number)
        return HistoryItem(id=item_id, content=content, target=target, date=_date(item.get("date"), f"{where}date"))

    def _label(self, text: str, where: str) -> str:
        """A label of the file: what inputs further on list counts too, whatever the order of the records."""
        try:
            if not self.labels and not self._is_looked_ahead:
                self._look_ahead()
            return _label(text, self.labels or self._default_labels, where)
        except _Broken:
            if self._is_looked_ahead:
                raise
        self._look_ahead()
        return _label(text, self.labels or self._default_labels, where)

    def _look_ahead(self) -> None:
        """All labels that the file's inputs list: one more reading of it, for the few files that need it."""
        self._is_looked_ahead = True
        for record in read_records(self.file):
            if isinstance(record, dict):
                for text in _inputs(record):
                    match = _pattern(self.task).fullmatch(text)
                    self._add_labels(_split_labels(match["labels"] or "") if match else ())

    def _add_labels(self, listed: tuple[str, ...]) -> tuple[str, ...]:
        """The listed labels in the file's spelling."""
        if listed == self.labels:
            return listed
        spellings = distinct_labels(self.labels + listed, self.file)
        self.labels = tuple(spellings.values())
        return tuple(spellings[normalise_label(label)] for label in listed)


def join(users: Sequence[User]) -> User:
    """One user of several questions of the same user: all queries, and the longest history (the first of equals).

    Items that a query asks about are left out: a later question's profile may hold the earlier ones with their answers.
    The history is empty where every item of every user is asked about.
    """
    queries = tuple(query for user in users for query in user.queries)
    longest_first = sorted(users, key=lambda user: len(user.history), reverse=True)
    told = (unasked(replace(user, queries=queries)) for user in longest_first)
    return next((user for user in told if user.history), replace(users[0], history=(), queries=queries))


def unasked(user: User) -> User:
    """The user without the history items that are asked about: the same normalised content, in tweets the answer."""
    asked = {normalise_label(query.content) for query in user.queries}
    answers = {normalise_label(query.target or "") for query in user.queries} - {""}
    kept = (i for i in user.history if not _is_one_of(i.content or i.target, asked if i.content else answers))
    return replace(user, history=tuple(kept))


def leaked_items(user: User) -> int:
    """How many history items are also asked about: their answers stand in the history, so a test on them is void."""
    return len(user.history) - len(unasked(user).history)


def _is_one_of(text: str, normalised: set[str]) -> bool:
    start = normalise_label(text[:32])  # most texts differ here already
    return any(known.startswith(start) for known in normalised) and normalise_label(text) in normalised


# ---- what a file is


def _form(file: str, records: list[Any]) -> Literal["questions", "users"]:
    has = [set(record) for record in records if isinstance(record, dict)]
    users = sum({"profile", "query"} <= keys for keys in has)
    questions = sum({"profile", "input"} <= keys for keys in has)
    if users or questions:
        return "users" if users >= questions else "questions"
    records = [record for record in records if not isinstance(record, Unreadable)]
    found = "no records" if not records else "records that are " + describe(records[0])
    raise ValueError(
        f"{file} is JSON, but not LaMP: it holds {found}; wanted records with id, input, profile (LaMP's questions) or "
        "user_id, profile, query (OPPU, Per-Pcs)"
    )


def _check_task(file: str, task: Task, records: list[dict[str, Any]]) -> None:
    """The first questions must be worded as this task's; if none is, the file is of another task."""
    inputs = [text for record in records for text in _inputs(record)]
    if not inputs or any(_pattern(task).fullmatch(text) for text in inputs):
        return
    for other in TASKS.values():
        if any(_pattern(other).fullmatch(text) for text in inputs):
            raise ValueError(
                f"{file} holds questions of {other.name}, not of {task.name}; name {other.name} as the task"
            )
    raise ValueError(
        f"{file} holds questions in no LaMP task's wording; wanted, for {task.name}: {task.question!r}; word them so"
    )


def _inputs(record: dict[str, Any]) -> list[str]:
    """The texts of a record's questions, as far as they can be read."""
    queries = record.get("query")
    asked = [record, *(queries if isinstance(queries, list) else ())]
    return [query["input"] for query in asked if isinstance(query, dict) and isinstance(query.get("input"), str)]


def _find_outputs(file: str, task: Task, given: str | None) -> str:
    folder, slash, name = file.rpartition("/")
    beside = folder + slash + "outputs".join(name.rsplit("questions", 1))
    outputs = given or beside
    if outputs == file or not is_file(outputs):
        wanted = given or (beside if beside != file else "a file NAME_outputs.json beside a NAME_questions.json")
        raise ValueError(f"{file} holds LaMP questions without their answers; wanted {wanted}: put it there")
    with open_bytes(outputs) as stream:
        head = stream.read(1 << 16)
    stated = re.match(rb'[\s\xef\xbb\xbf]*\{\s*"task"\s*:\s*"([\w -]{1,40})"', head)
    if stated and not goes_by(task, stated[1].decode()):
        raise ValueError(f"{outputs} says that it is of task {stated[1].decode()}, not of {task.name} ({task.lamp_id})")
    return outputs


class _Golds:
    """Answers by question id, out of an outputs file that is read alongside.

    LaMP's two files are in the same order: then nothing is held. Answers that are passed over wait in memory.
    """

    def __init__(self, file: str) -> None:
        self._file = file
        self._waiting: dict[str, Any] = {}
        self._answers = self._read()

    def of(self, question: str) -> Any:
        """The answer, or None where the file has none."""
        if question in self._waiting:
            return self._waiting.pop(question)
        for key, answer in self._answers:
            if key == question:
                return answer
            self._waiting[key] = answer
        return None

    def _read(self) -> Iterator[tuple[str, Any]]:
        for record in self._rows():
            if not isinstance(record, dict) or "id" not in record or "output" not in record:
                raise ValueError(
                    f"{self._file} holds {describe(record)} where answers should be; wanted LaMP's outputs: "
                    '{"task": ..., "golds": [{"id": ..., "output": ...}]}'
                )
            yield str(record["id"]).strip(), record["output"]

    def _rows(self) -> Iterator[Any]:
        with open_bytes(self._file) as stream:
            is_lines = b'"golds"' not in stream.read(1 << 16)
        rows = read_records(self._file, within=None if is_lines else "golds")
        return (row for row in rows if not isinstance(row, Unreadable))  # then its question has no answer: a reject


class _SeenIds:
    """A set of texts that only grows, at 8 bytes each: their hashes, sorted, and a few recent ones."""

    RECENT = 65_536

    def __init__(self) -> None:
        self._sorted = np.empty(0, dtype=np.uint64)
        self._recent: set[int] = set()

    def __contains__(self, text: str) -> bool:
        key = _hash(text)
        place = int(np.searchsorted(self._sorted, np.uint64(key)))
        return key in self._recent or (place < len(self._sorted) and int(self._sorted[place]) == key)

    def add(self, text: str) -> None:
        """Add a text that is not in the set."""
        self._recent.add(_hash(text))
        if len(self._recent) >= self.RECENT:
            fresh = np.fromiter(self._recent, dtype=np.uint64, count=len(self._recent))
            self._sorted = np.sort(np.concatenate([self._sorted, fresh]))
            self._recent.clear()


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest())


# ---- fields of a record


def _lenient_id(record: Any, name: str) -> str:
    """The id, for a reject, of a record of which nothing is certain."""
    value = record.value if isinstance(record, Unreadable) else record
    found = value.get(name) if isinstance(value, dict) else None
    return writable(str(found))[:100] if isinstance(found, str | int) else ""


class _Broken(Exception):
    """This record cannot be used; the text is the reject's reason."""

    def __init__(self, reason: str, where: str = "") -> None:
        super().__init__(f"{reason}: {where}" if where else reason)


def _dict(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Broken("wrong type", where)
    return value


def _list(record: dict[str, Any], name: str, where: str) -> list[Any]:
    value = record.get(name)
    if value is None:
        raise _Broken("missing field", where + name)
    if not isinstance(value, list):
        raise _Broken("wrong type", where + name)
    return value


def _text(record: dict[str, Any], name: str, where: str, *, is_optional: bool = False) -> str:
    """A field as text; numbers are welcome (ids, scores, dates), NaN and Infinity, which JSON has not, are none."""
    value: Any = record.get(name)
    if isinstance(value, float) and not math.isfinite(value):
        raise _Broken("wrong type", where + name)
    if isinstance(value, (Decimal, float)) and -(2**53) < value < 2**53 and value == int(value):
        value = int(value)
    if value is not None and (isinstance(value, bool) or not isinstance(value, str | int | float | Decimal)):
        raise _Broken("wrong type", where + name)
    text = "" if value is None else str(value).strip()
    if not text and not is_optional:
        raise _Broken("missing field", where + name)
    return text


def _label(text: str, labels: tuple[str, ...], where: str) -> str:
    """The label, in the list's own spelling."""
    try:
        return _spellings(labels)[normalise_label(text)]
    except KeyError:
        raise _Broken("unknown label", where) from None


@lru_cache(maxsize=64)
def _spellings(labels: tuple[str, ...]) -> dict[str, str]:
    spellings = {normalise_label(label): label for label in labels}
    return spellings | {f"{label} 0": label for label in spellings if label.isdigit()}  # a score told as "4.0"


@lru_cache(maxsize=64)
def _split_labels(text: str) -> tuple[str, ...]:
    return tuple(label for part in text.split(",") if (label := part.strip().strip("\"'")))


@cache
def _pattern(task: Task) -> re.Pattern[str]:
    pattern = task.input_pattern.replace(" ", r"\s+")
    return re.compile(rf"\s*{pattern}\s*", re.IGNORECASE | re.DOTALL)


def _date(value: Any, where: str) -> str | None:
    """ISO 8601 of the dates that LaMP's files hold: ISO, a year, seconds since 1970, or a tweet's."""
    if value is None or value == "":
        return None
    text = _text({"": value}, "", where)
    try:
        if re.fullmatch(r"[0-9]{4}(-(0[1-9]|1[0-2]))?", text):
            return text
        if re.fullmatch(r"[0-9]{9,13}", text):
            seconds = int(text) / (1000 if len(text) > 11 else 1)
            return datetime.fromtimestamp(seconds, UTC).replace(tzinfo=None).isoformat(timespec="seconds")
        words = text.split()
        if len(words) == 6 and text.isascii():  # Mon May 11 03:17:40 UTC 2009
            return datetime.strptime(" ".join(words[1:4] + words[5:]), "%b %d %H:%M:%S %Y").isoformat()
        time = datetime.fromisoformat(text)
        if time.tzinfo is not None:
            time = time.astimezone(UTC).replace(tzinfo=None)
    except (ValueError, OverflowError, OSError):
        raise _Broken("wrong type", where) from None
    return time.date().isoformat() if len(text) <= 10 else time.isoformat()
