"""The generator before a small server whose answers are odd: each of them is a failed request, and the run goes on."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from small_server import SmallServer

from mta_ray.artifacts import open_artifact
from mta_ray.population.load.rows import Row, RunSettings
from mta_ray.population.load.simulate import SimulateLoadConfig, generate, simulate_load
from mta_ray.population.load.traffic import TrafficConfig

TIMEOUT_S = 1.5
USAGE = {"prompt_tokens": 1, "completion_tokens": 1}
RIGHT = {"choices": [{"text": "a"}], "usage": USAGE}
WHOLE = [
    b"<html>", b"\xff", b"[]", b'"text"', b"[" * 100_000,
    {}, {"choices": []}, {"choices": [{"text": None}], "usage": USAGE}, {"choices": [{"text": "a"}], "usage": [1]},
    {"choices": [{"text": "a"}], "usage": {"prompt_tokens": 1, "completion_tokens": 10**12}},
]  # fmt: skip
"""Bodies for a question that is not streamed."""
EVENTS = [
    [], "text", {"error": "text"}, {"error": None}, {"choices": None}, {"choices": [{"text": None}]},
    {"choices": [], "usage": [1]}, {"choices": [], "usage": {"prompt_tokens": "1", "completion_tokens": None}},
]  # fmt: skip
"""In a stream, after a proper first one."""
STATES = [
    {"anchors": None}, {"anchors": [[0, 1.0]]}, {"anchors": [{"slot": "0", "weight": 1.0}]},
    {"anchors": [{"slot": -1, "weight": 1.0}]}, {"anchors": [{"slot": 0, "weight": float("nan")}]},
]  # fmt: skip
"""For a history."""
WAITS = [("86400", TIMEOUT_S), ("inf", TIMEOUT_S), ("nan", 1.0), ("-5", 0.0), ("Wed, 21 Oct 2026 07:28:00 GMT", 1.0)]
"""Retry-After of a refusal, and the seconds that are waited."""
USERS = 20
TRAFFIC = TrafficConfig(
    seconds=4.0, sessions_per_s=10.0, flash_factor=1.0, diurnal=0.0, new_share=1.0, update_share=0.0, stack_share=0.0,
    delete_share=0.0, users=USERS, think_s=0.05, questions=2.5, seed=3,
)  # fmt: skip
"""Everybody is new."""


class Odd(SmallServer):
    """By the user's number, which begins with USERS: an odd answer of each kind in turn; never one where `is_right`."""

    protocol_version = "HTTP/1.1"
    mood = ""
    refused: set[str]

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        user = int(self.path.split("/")[3].rsplit("-", 1)[1])
        is_odd = self.mood == "odd" and user % 2
        self.say(200, STATES[user // 2 % len(STATES)] if is_odd else {"anchors": [{"slot": 0, "weight": 1.0}]})

    def do_DELETE(self) -> None:
        self.say(200, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        user, is_stream = int(body["user"].rsplit("-", 1)[1]), body.get("stream", False)
        if self.mood == "dead":
            self.say(500, b"\xff\xfe")  # not even text
        elif self.mood == "waits":
            if body["user"] in self.refused:
                self._whole_or_stream(is_stream)
            else:
                self.refused.add(body["user"])
                self.say(503, {"error": {}}, WAITS[user % len(WAITS)][0])
        elif self.mood == "drip":
            self._drip(is_stream)
        elif is_stream:
            self._stream([{"choices": [{"text": "a"}]}, EVENTS[user % len(EVENTS)]])
        else:
            self.say(200, WHOLE[user % len(WHOLE)])

    def _whole_or_stream(self, is_stream: bool) -> None:
        if is_stream:
            self._stream([RIGHT, {"choices": [], "usage": USAGE}])
        else:
            self.say(200, RIGHT)

    def _drip(self, is_stream: bool) -> None:
        """A comment again and again, or a right answer whose end never comes."""
        self._chunked()
        try:
            self._chunk(b": ping\n\n" if is_stream else json.dumps(RIGHT).encode())
            while True:
                self._chunk(b": ping\n\n" if is_stream else b" ")
                time.sleep(0.2)
        except OSError:
            self.close_connection = True

    def _stream(self, events: list) -> None:
        self._chunked()
        for event in events:
            self._chunk(f"data: {json.dumps(event)}\n\n".encode())
        self._chunk(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def _chunked(self) -> None:
        self.send_response(200)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()

    def _chunk(self, chunk: bytes) -> None:
        self.wfile.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")


@pytest.fixture
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    """Of a server in the mood that the test names."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Odd,), {"mood": request.param, "refused": set()}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def rows_of(url: str, folder: Path, traffic: TrafficConfig = TRAFFIC) -> list[Row]:
    settings = RunSettings(
        traffic=traffic, known=0, url=url, api_key=None, model="mta", prefix="x-", tastes=("robots",),
        prompts=("go on",), timeout_s=TIMEOUT_S,
    )  # fmt: skip
    rows: list[Row] = []
    generate(settings, rows, folder / "log")
    return rows


@pytest.mark.parametrize("url", ["odd"], indirect=True)
def test_an_odd_answer_is_a_failed_request(url: str, tmp_path: Path) -> None:
    rows = rows_of(url, tmp_path)
    asks = [row for row in rows if row.kind == "ask"]
    assert {row.user % len(WHOLE) for row in asks if not row.is_stream} == set(range(len(WHOLE)))
    assert {row.user % len(EVENTS) for row in asks if row.is_stream} == set(range(len(EVENTS)))
    for row in asks:
        assert (row.status, row.first_status, row.retried) == (0, 0, False) and row.error, row
    histories = [row for row in rows if row.kind == "history"]
    assert len(histories) > 2 * len(STATES)
    for row in histories:
        assert (row.status, bool(row.error)) == ((0, True) if row.user % 2 else (200, False)), row
        assert row.anchors == (None if row.user % 2 else [(0, 1.0)])


@pytest.mark.parametrize("url", ["waits"], indirect=True)
def test_nobody_waits_longer_than_a_request_may_take(url: str, tmp_path: Path) -> None:
    first: dict[int, Row] = {}
    for row in sorted(rows_of(url, tmp_path), key=lambda row: row.sent_s):
        if row.kind == "ask":
            first.setdefault(row.user, row)
    assert {user % len(WAITS) for user in first} == set(range(len(WAITS)))
    for user, row in first.items():
        if row.first_status != 503:  # of a user's two at once the other one was refused
            continue
        waited_s = WAITS[user % len(WAITS)][1]
        assert (row.status, row.retried, row.error) == (200, True, ""), row
        assert waited_s <= row.total_ms / 1e3 < waited_s + 1.0, row


@pytest.mark.parametrize("url", ["drip"], indirect=True)
def test_an_answer_without_an_end_is_given_up(url: str, tmp_path: Path) -> None:
    rows = rows_of(url, tmp_path, replace(TRAFFIC, seconds=2.0, questions=1.0))
    asks = [row for row in rows if row.kind == "ask"]
    assert {row.is_stream for row in asks} == {False, True}
    for row in asks:
        assert (row.status, row.error) == (0, "TimeoutError") and TIMEOUT_S <= row.total_ms / 1e3 < TIMEOUT_S + 1.0


@pytest.mark.parametrize("url", ["dead"], indirect=True)
def test_a_run_without_an_answer_fails(url: str, tmp_path: Path) -> None:
    config = SimulateLoadConfig(
        url=url, marked=2, traffic=replace(TRAFFIC, seconds=2.0), timeout_s=TIMEOUT_S, out=str(tmp_path / "load")
    )
    for _ in range(2):  # when it is made, and when it lies there
        with pytest.raises(ValueError, match="none of [0-9]+ questions was answered: .* --force"):
            simulate_load(config)
    facts = open_artifact(tmp_path / "load", kind="load").facts
    assert facts["answered"] == facts["wrong"] == 0 and facts["failed"] == facts["questions"] > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="timeout_s must be above 0 and finite"):
        SimulateLoadConfig(url="http://x", timeout_s=value)
    for name in ("questions", "zipf", "think_s", "new_share", "diurnal"):
        with pytest.raises(ValueError, match="finite|between|together"):
            TrafficConfig(**{name: value})
