"""Whether each user was told what AnswerBook says, though users come, change and go while they ask.

A user's answers are known as long as anchors, weights and stack are: of users who were marked before the run, and of
those who come, change or go in it. The anchors are computed from the history that was sent; only where it cannot be
known what of it is stored are they those that the service told. A user whose stack is trained by the service is not
judged from then on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mta_ray.population.load.answers import Anchors, AnswerBook
from mta_ray.population.load.rows import Row


def judge(rows: Sequence[Row], book: AnswerBook | None) -> list[str]:
    """Of each row: ok, wrong, wrong_user (what another user must be told), 503, failed, or unchecked.

    A history is wrong where it was told to lead to other anchors than it does; what else is not a question is ok by its
    status. A question that met a change of its user may have been answered by the user as before or as after.
    """
    rows, misled = (rows, set()) if book is None else _rightly_routed(rows, book)
    if book is not None:
        for user, anchors in book.marked.items():
            book.expected(user, anchors)
    changes: dict[int, list[Row]] = {}
    for row in rows:
        if row.kind != "ask":
            changes.setdefault(row.user, []).append(row)
    verdicts = [_verdict(row, changes.get(row.user, []), book) for row in rows]

    for place in misled:
        verdicts[place] = "wrong"

    # only now does the book know what everybody else must be told
    for place, row in enumerate(rows):
        if book is None or verdicts[place] != "wrong" or row.kind != "ask":
            continue
        if book.is_anothers(row.text.strip(), row.most_tokens, row.user):
            verdicts[place] = "wrong_user"
    return verdicts


def telling(rows: Sequence[Row], verdicts: Sequence[str], book: AnswerBook) -> float | None:
    """Of the right answers to marked users who did not change: the share that no other marked user would have got."""
    changed = {row.user for row in rows if row.kind != "ask"}
    told = [
        book.tells_apart(row.user, row.most_tokens)
        for row, verdict in zip(rows, verdicts, strict=True)
        if row.kind == "ask" and verdict == "ok" and row.user in book.marked and row.user not in changed
    ]
    return sum(told) / len(told) if told else None


def _rightly_routed(rows: Sequence[Row], book: AnswerBook) -> tuple[list[Row], set[int]]:
    """The rows, each history with the anchors that it leads to, and the places of those that were told others."""
    changes: dict[int, list[Row]] = {}
    for row in rows:
        if row.kind in ("history", "delete"):
            changes.setdefault(row.user, []).append(row)
    found, misled = list(rows), set()
    for place, row in enumerate(rows):
        if row.kind != "history" or not _is_done(row) or row.anchors is None:
            continue
        items, told = _items(row, changes[row.user], book), tuple(row.anchors)
        if items:
            anchors: Anchors | None = book.anchors_of(items, told)
        else:
            anchors = told if book.has(told) else None
        if anchors != told:
            misled.add(place)
            found[place] = replace(row, anchors=None if anchors is None else list(anchors))
    return found, misled


def _items(row: Row, changes: Sequence[Row], book: AnswerBook) -> list[str] | None:
    """The user's history when that one was stored; none where it cannot be known."""
    items = [book.items[row.user]] if row.user in book.items else []
    ended_s = 0.0
    for change in sorted(changes, key=lambda change: change.sent_s):
        if change.sent_s >= row.ended_s:
            break
        # one beside another, or sent twice, or lost: who knows what is stored, and in which order
        if change.sent_s < ended_s or change.retried or not _is_done(change):
            return None
        if change.kind == "history" and not change.item:
            return None
        ended_s = change.ended_s
        items = [*items, change.item] if change.kind == "history" else []
    return items


def _verdict(row: Row, changes: Sequence[Row], book: AnswerBook | None) -> str:
    if row.status == 503:
        return "503"
    if row.status == 404 and row.kind in ("stack", "delete") and not _is_certain_to_be_there(row, changes):
        return "unchecked"
    if not 200 <= row.status < 300 or row.error:
        return "failed"
    if row.kind != "ask":
        return "ok"
    if book is None:
        return "unchecked"

    states = _states(row, changes, book)
    if states is None:
        return "unchecked"
    text = row.text.strip()
    agrees = [book.agrees(text, book.expected(row.user, anchors), row.most_tokens) for anchors in states]
    if True in agrees:
        return "ok"
    return "unchecked" if None in agrees else "wrong"


def _states(row: Row, changes: Sequence[Row], book: AnswerBook) -> list[Anchors] | None:
    """The anchors that the user may have had when the question was read; none where they cannot be known."""
    begun = [change for change in changes if change.sent_s <= row.ended_s]
    over = [change for change in begun if _is_done(change) and change.ended_s <= row.sent_s]
    states = []
    if not over:
        states.append(book.marked.get(row.user, ()))
    for change in begun:
        # a stack outlives a new history, but no deletion
        enders = ("delete",) if change.kind == "stack" else ("delete", "history")
        if any(later.kind in enders and later.sent_s >= change.ended_s for later in over):
            continue
        if change.kind == "stack":
            return None
        if change.kind == "delete":
            states.append(())
            if not _is_done(change):
                return None
        elif change.anchors is None or (change.retried and change.ended_s > row.sent_s):
            return None  # refused or lost, it may be stored or not; sent twice, it may be there once so far
        else:
            states.append(tuple(change.anchors))
    return states


def _is_done(change: Row) -> bool:
    return 200 <= change.status < 300


def _is_certain_to_be_there(row: Row, changes: Sequence[Row]) -> bool:
    """Whether the user's last change before that request put them there, and none was under way."""
    begun = [change for change in changes if change is not row and change.sent_s <= row.ended_s]
    if any(change.kind == "delete" for change in begun):
        return False
    return any(change.kind == "history" and _is_done(change) and change.ended_s <= row.sent_s for change in begun)
