"""After a run: is what the service said done? Whoever was deleted is gone, who has a history is there, a stack that was
asked for is known; then the run's users are removed, and looked for once more.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass

import httpx

from mta_ray.population.load.patience import patient
from mta_ray.population.load.rows import Row

log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class Afterwards:
    """Users of whom the service had said something that was not so."""

    users: int = 0
    """Who were looked for."""
    not_deleted: int = 0
    """Still there after a deletion that was confirmed."""
    lost: int = 0
    """Not there, though a history was confirmed and nobody deleted it."""
    stacks_unknown: int = 0
    """Whose request for a stack was accepted, and who have none, nor is one on its way."""
    not_removed: int = 0
    """Still there after the run's own deletion at its end, or that deletion failed."""
    not_seen: int = 0
    """Of whom the service said nothing."""

    @property
    def wrong(self) -> int:
        """All of them but those of whom nothing is known."""
        return self.not_deleted + self.lost + self.stacks_unknown + self.not_removed


def leave(http: httpx.Client, prefix: str, known: Collection[int], rows: Sequence[Row], told: Afterwards) -> None:
    """Look at every user of the run, then remove them; `told` is filled in. The `known` had a history before it."""
    changes: dict[int, list[Row]] = {user: [] for user in known}
    for row in sorted(rows, key=lambda row: row.sent_s):
        mine = changes.setdefault(row.user, [])
        if row.kind != "ask":
            mine.append(row)
    for place, (user, mine) in enumerate(changes.items()):
        try:
            _look(http, f"/v1/users/{prefix}{user}", _expected(mine, user in known), told)
        except (httpx.HTTPError, _Busy):  # nobody answers: to ask for each of the others would take a timeout each
            told.not_seen += len(changes) - place
            break
    if any(count for name, count in asdict(told).items() if name != "users"):
        log.warning("load: after the run: %s; the users' names begin with %s", asdict(told), prefix)


class _Busy(Exception):
    """The service refuses again and again."""


def _look(http: httpx.Client, path: str, expected: tuple[bool | None, bool], told: Afterwards) -> None:
    is_there, has_stack = expected
    told.users += 1
    view = _ask(http, "GET", path)
    if view.status_code not in (200, 404):
        told.not_seen += 1
    elif is_there is False and view.status_code == 200:
        told.not_deleted += 1
    elif is_there and view.status_code == 404:
        told.lost += 1
    elif is_there and has_stack and not _knows_a_stack(view):
        told.stacks_unknown += 1
    if _ask(http, "DELETE", path).status_code not in (200, 404) or _ask(http, "GET", path).status_code != 404:
        told.not_removed += 1


def _knows_a_stack(view: httpx.Response) -> bool:
    try:
        return bool(view.json().get("stack_status", "none") != "none")
    except (ValueError, AttributeError):  # no JSON, or no object
        return False


def _ask(http: httpx.Client, method: str, path: str) -> httpx.Response:
    answer = patient(http, method, path)
    if answer.status_code != 503:
        return answer
    raise _Busy


def _expected(changes: Sequence[Row], is_known: bool) -> tuple[bool | None, bool]:
    """Whether the user must be there (none: who knows), and whether a stack must be there or on its way."""
    is_there: bool | None = is_known
    has_stack, ended_s = False, 0.0
    for change in changes:
        is_done = 200 <= change.status < 300
        # beside another change, sent twice, or without an answer: it may have been done or not, before or after
        if change.sent_s < ended_s or change.retried or (not is_done and change.status != 404):
            return None, False
        ended_s = change.ended_s
        if not is_done:
            continue
        if change.kind == "delete":
            is_there, has_stack = False, False
        elif change.kind == "history":
            is_there = True
        else:
            has_stack = True
    return is_there, has_stack
