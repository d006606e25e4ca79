"""The generator in its own process, before a small server that refuses, breaks off and dawdles as it is told."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mta_ray.population.load.rows import Row, RunSettings
from mta_ray.population.load.simulate import generate
from mta_ray.population.load.traffic import TrafficConfig, sessions

FIRST_S = 0.3
"""That every answer takes at least."""
TRAFFIC = TrafficConfig(
    seconds=5.0, sessions_per_s=10.0, flash_factor=1.0, diurnal=0.0, new_share=1.0, update_share=0.0, stack_share=0.0,
    delete_share=0.0, users=100, think_s=0.1, questions=1.5,
)  # fmt: skip
"""Everybody is new, so that a user's requests come one after the other."""


@dataclass
class Seen:
    tries: Counter[int] = field(default_factory=Counter)
    now: int = 0
    most: int = 0
    keys: set[str | None] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Moody(BaseHTTPRequestHandler):
    """By the user's number modulo 5: serves; refuses first; refuses always; fails; refuses in the stream at first."""

    protocol_version = "HTTP/1.1"
    seen: Seen

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self._say(200, {"anchors": [{"slot": 2, "weight": 1.0}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        user = int(body["user"].removeprefix("x-"))
        seen = self.seen
        with seen.lock:
            seen.tries[user] += 1
            is_first = seen.tries[user] % 2 == 1
            seen.now += 1
            seen.most = max(seen.most, seen.now)
            seen.keys.add(self.headers["authorization"])
        time.sleep(FIRST_S)
        with seen.lock:
            seen.now -= 1
        mood, is_stream, tokens = user % 5, body.get("stream", False), body["max_tokens"]
        if mood == 2 or (mood == 1 and is_first):
            self._say(503, {"error": {"code": "busy"}})
        elif mood == 3 and not is_stream:
            self._say(500, {"error": {"code": "internal_error"}})
        elif is_stream:
            self._stream(mood, is_first, tokens)
        else:
            usage = {"prompt_tokens": 7, "completion_tokens": tokens}
            self._say(200, {"choices": [{"text": "so " * tokens}], "usage": usage})

    def _stream(self, mood: int, is_first: bool, tokens: int) -> None:
        self.send_response(200)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for _ in range(tokens):
            self._event({"choices": [{"text": "so "}]})
            if mood == 3:
                self.close_connection = True
                return
            if mood == 4 and is_first:
                self._event({"error": {"code": "busy"}})
                self.wfile.write(b"0\r\n\r\n")
                return
        self._event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": tokens}})
        self._chunk(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def _event(self, event: dict) -> None:
        self._chunk(f"data: {json.dumps(event)}\n\n".encode())

    def _chunk(self, chunk: bytes) -> None:
        self.wfile.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")

    def _say(self, status: int, answer: dict) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        if status == 503:
            self.send_header("retry-after", "1")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[Row], dict[str, int], Seen]]:
    seen = Seen()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Moody,), {"seen": seen}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    settings = RunSettings(
        traffic=TRAFFIC, known=0, url=f"http://127.0.0.1:{server.server_port}", api_key="secret", model="mta",
        prefix="x-", tastes=("robots",), prompts=("go on",), timeout_s=30.0,
    )  # fmt: skip
    rows: list[Row] = []
    _, locust = generate(settings, rows, tmp_path_factory.mktemp("run") / "log")
    yield rows, locust, seen
    server.shutdown()


def asks(rows: list[Row], mood: int) -> list[Row]:
    found = [row for row in rows if row.kind == "ask" and row.user % 5 == mood]
    assert any(row.is_stream for row in found) and not all(row.is_stream for row in found)
    return found


def test_the_schedule_is_sent_whole_and_nobody_waits_for_others(outcome) -> None:  # noqa: ANN001
    rows, _, seen = outcome
    planned = [(session.user, request) for session in sessions(TRAFFIC) for request in session.requests]
    assert sorted((row.user, row.at_s, row.kind, row.is_stream, row.most_tokens) for row in rows) == sorted(
        (user, request.at_s, request.kind, request.is_stream, request.tokens) for user, request in planned
    )
    assert all(row.sent_s >= row.at_s - 0.01 for row in rows)
    assert seen.most >= 4  # ten a second, each of them 0.3 s: a closed loop would have one
    assert seen.keys == {"Bearer secret"}


def test_answers_are_read_whole_and_piece_by_piece(outcome) -> None:  # noqa: ANN001
    for row in asks(outcome[0], 0):
        assert (row.status, row.first_status, row.retried, row.error) == (200, 200, False, "")
        assert row.text == "so " * row.most_tokens and (row.prompt_tokens, row.tokens) == (7, row.most_tokens)
        assert row.total_ms >= FIRST_S * 1e3
        if row.is_stream:
            assert row.ttft_ms is not None and FIRST_S * 1e3 <= row.ttft_ms <= row.total_ms
            assert len(row.gaps_ms) == row.tokens - 1
        else:
            assert row.ttft_ms is None and row.gaps_ms == []
    assert all(row.anchors == [(2, 1.0)] for row in outcome[0] if row.kind == "history")


def test_a_refusal_is_retried_once_when_the_service_says(outcome) -> None:  # noqa: ANN001
    for row in asks(outcome[0], 1):
        assert (row.status, row.first_status, row.retried, row.error) == (200, 503, True, "")
        assert row.text == "so " * row.most_tokens and row.total_ms >= 1000 + 2 * FIRST_S * 1e3
        assert row.ttft_ms is None or row.ttft_ms >= 1000 + 2 * FIRST_S * 1e3
    for row in asks(outcome[0], 2):
        assert (row.status, row.first_status, row.retried, row.error) == (503, 503, True, "busy")
    for row in asks(outcome[0], 4):
        assert (row.status, row.first_status, row.retried) == (200, 503 if row.is_stream else 200, row.is_stream)
        assert row.text == "so " * row.most_tokens


def test_what_fails_is_not_retried_and_told(outcome) -> None:  # noqa: ANN001
    for row in asks(outcome[0], 3):
        assert (row.status, row.retried) == (0 if row.is_stream else 500, False) and row.error


def test_locust_counted_the_same_tries(outcome) -> None:  # noqa: ANN001
    rows, locust, seen = outcome
    assert locust["requests"] == len(rows) + sum(row.retried for row in rows)
    assert sum(seen.tries.values()) == locust["requests"] - sum(row.kind == "history" for row in rows)
    refusals = sum(row.retried + (row.status == 503) for row in rows)
    assert locust["failures"] == refusals + sum(bool(row.error) and row.status != 503 for row in rows)


def test_a_generator_that_fails_says_why(tmp_path: Path) -> None:
    settings = RunSettings(
        traffic=TRAFFIC, known=0, url="http://127.0.0.1:9", api_key=None, model="mta", prefix="x-", tastes=(),
        prompts=(), timeout_s=1.0,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="the load generator ended with 1(.|\n)*ZeroDivisionError"):
        generate(settings, [], tmp_path / "log")
