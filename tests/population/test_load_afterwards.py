"""Users are looked for when a run is over: a server that forgets, or does not do what it said, is told apart."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import asdict
from http.server import ThreadingHTTPServer

import httpx
import pytest
from small_server import SmallServer

from mta_ray.population.load.afterwards import Afterwards, leave
from mta_ray.population.load.rows import Row

KNOWN = 6
STUBBORN = 8


class Users(SmallServer):
    """Has some users, by number, with the state of their stack; one of them cannot be deleted."""

    there: dict[int, str]
    busy: list[int]

    def do_GET(self) -> None:
        number = self._number()
        if self.busy and self.busy.pop():
            return self.say(503, {})
        if number not in self.there:
            return self.say(404, {})
        state = self.there[number]
        self.say(200, ["odd"] if state == "odd" else {"stack_status": state})

    def do_DELETE(self) -> None:
        number = self._number()
        if number != STUBBORN:
            self.there.pop(number, None)
        self.say(200, {})

    def _number(self) -> int:
        return int(self.path.removeprefix("/v1/users/x-"))


@pytest.fixture
def server() -> Iterator[type[Users]]:
    handler = type("Handler", (Users,), {"there": {}, "busy": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    handler.url = f"http://127.0.0.1:{server.server_port}"
    yield handler
    server.shutdown()


def change(kind: str, user: int, sent_s: float, ended_s: float, status: int = 200, **more) -> Row:
    return Row(
        at_s=sent_s, kind=kind, user=user, is_stream=False, most_tokens=0, sent_s=sent_s, ended_s=ended_s,
        status=status, first_status=status, **more,
    )  # fmt: skip


ROWS = [
    change("delete", 1, 1.0, 1.1),
    change("stack", 3, 1.0, 1.1, status=202),
    change("stack", 4, 1.0, 1.1, status=202),
    change("delete", 5, 1.0, 1.1),
    change("history", 5, 2.0, 2.1),
    change("history", 6, 1.0, 2.0),
    change("delete", 6, 1.5, 1.6),  # beside it: who knows which came last
    change("delete", 7, 1.0, 3.0, status=0),  # without an answer
    change("history", STUBBORN, 1.0, 1.1),
    change("ask", 9, 1.0, 1.1),  # somebody without a history
    change("delete", 10, 1.0, 1.1, status=404),
    change("history", 11, 1.0, 1.1),
    change("stack", 11, 2.0, 2.1, status=202),
    change("delete", 11, 3.0, 3.1),  # takes the stack along
]
TRUE = {0: "none", 2: "none", 3: "training", 4: "ready", 5: "none", 6: "none", STUBBORN: "none"}
"""Who must be there, and one of whom it does not matter."""


def after(server: type[Users], there: dict[int, str]) -> Afterwards:
    server.there.update(there)
    told = Afterwards()
    with httpx.Client(base_url=server.url, trust_env=False) as http:
        leave(http, "x-", range(KNOWN), ROWS, told)
    assert set(server.there) <= {STUBBORN} or told.not_seen
    return told


@pytest.mark.parametrize(
    ("there", "wrong"),
    [
        (TRUE, {}),
        (TRUE | {1: "none"}, {"not_deleted": 1}),
        (TRUE | {1: "none", 9: "none", 11: "ready"}, {"not_deleted": 3}),
        ({n: state for n, state in TRUE.items() if n not in (2, 5)}, {"lost": 2}),
        (TRUE | {3: "none"}, {"stacks_unknown": 1}),
        (TRUE | {3: "odd"}, {"stacks_unknown": 1}),
        (TRUE | {7: "none"}, {}),
        ({n: state for n, state in TRUE.items() if n != 6}, {}),
    ],
)
def test_what_was_promised_and_is_not_so_is_counted(server: type[Users], there: dict, wrong: dict) -> None:
    told = after(server, there)
    assert asdict(told) == asdict(Afterwards(users=12, not_removed=1)) | wrong
    assert told.wrong == 1 + sum(wrong.values())


def test_who_is_busy_is_asked_again_and_who_is_gone_is_not_believed(server: type[Users]) -> None:
    server.busy.append(1)
    assert after(server, TRUE).not_seen == 0
    server.busy.extend([1] * 99)
    assert after(server, TRUE).not_seen == 12  # after a few tries of the first one
    told = Afterwards()
    with httpx.Client(base_url="http://127.0.0.1:9", trust_env=False) as http:
        leave(http, "x-", range(KNOWN), ROWS, told)
    assert told.not_seen == 12 and told.wrong == 0
