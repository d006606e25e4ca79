"""Sends a schedule's requests to an endpoint, each at its time, and writes a line for each that came back.

    python -m mta_ray.population.load.generator < SETTINGS > LINES

A program of its own, for locust patches the whole process (gevent). It knows no expected answer and judges nothing.
The first line of the output says when time 0 is, the last one what locust itself counted.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import gevent
from locust.contrib.fasthttp import FAILURE_EXCEPTIONS, FastHttpSession, ResponseContextManager
from locust.env import Environment

from mta_ray.population.load.rows import Row, RunSettings, settings_from
from mta_ray.population.load.traffic import Planned, Session, sessions

SOCKETS = 4096
"""More than are ever open at once: a request that waits for a socket would be a closed loop."""
HEAD_START_S = 1.0
"""From the first line to time 0."""
BUSY_AFTER_S = 1.0
"""Before the second try where a refusal does not say when: a stream that broke off with 503 has no header to say it."""


NO_ANSWER = (*FAILURE_EXCEPTIONS, ValueError, TypeError, AttributeError, LookupError, RecursionError)
"""What comes of a lost answer, or of one that is not as it should be: the request failed, and the run goes on."""


class Generator:
    """One run."""

    def __init__(self, settings: RunSettings) -> None:
        self._settings = settings
        environment = Environment()
        environment.create_local_runner()  # it is what keeps locust's statistics
        self.stats = environment.stats
        headers = {"Authorization": f"Bearer {settings.api_key}"} if settings.api_key else {}
        self._http = FastHttpSession(
            settings.url,
            environment.events.request,
            None,
            insecure=False,
            concurrency=SOCKETS,
            connection_timeout=settings.timeout_s,
            network_timeout=settings.timeout_s,
            headers=headers,
        )
        self._histories: Counter[int] = Counter()
        self._began_s = 0.0

    def run(self) -> None:
        """Every session as a greenlet, begun at its time whatever became of the others."""
        self._began_s = time.monotonic() + HEAD_START_S
        _tell({"began_s": self._began_s})
        under_way: set[gevent.Greenlet] = set()
        broken: list[gevent.Greenlet] = []
        for session in sessions(self._settings.traffic, known=self._settings.known):
            self._sleep_until(session.requests[0].at_s)
            if broken:
                break
            greenlet = gevent.spawn(self._run_session, session)
            under_way.add(greenlet)
            greenlet.link(under_way.discard)
            greenlet.link_exception(broken.append)
        gevent.joinall(list(under_way))
        for greenlet in broken:  # a fault of this program, not of an answer
            greenlet.get()
        total = self.stats.total
        _tell({"locust": {"requests": total.num_requests, "failures": total.num_failures}})

    def _run_session(self, session: Session) -> None:
        free_s = 0.0
        for planned in session.requests:
            due_s = max(planned.at_s, free_s)
            self._sleep_until(due_s)
            row = Row(
                at_s=planned.at_s,
                kind=planned.kind,
                user=session.user,
                is_stream=planned.is_stream,
                most_tokens=planned.tokens,
                waited_ms=(due_s - planned.at_s) * 1e3,
                lag_ms=max(0.0, self._now_s() - due_s) * 1e3,
            )
            self._send(planned, row)
            free_s = row.ended_s
            _tell(asdict(row))

    def _send(self, planned: Planned, row: Row) -> None:
        """The request, and once more after a 503, when the service says."""
        method, path, body = self._request(planned, row.user)
        if body is not None and planned.kind == "history":
            row.item = body["items"][0]
        row.sent_s = self._now_s()
        for is_second in (False, True):
            row.retried = is_second
            wait_s = self._try(method, path, body, row)
            row.ended_s = self._now_s()
            if not is_second:
                row.first_status = row.status
                if row.status != 503:
                    break
                gevent.sleep(wait_s)
        row.total_ms = (row.ended_s - row.sent_s) * 1e3

    def _request(self, planned: Planned, user: int) -> tuple[str, str, Mapping[str, Any] | None]:
        settings = self._settings
        name = f"{settings.prefix}{user}"
        if planned.kind == "history":
            turn = self._histories[user] + (1 if user < settings.known else 0)
            self._histories[user] += 1
            taste = settings.tastes[(user + turn) % len(settings.tastes)]
            # appended to, not replaced: with its old items a user would lose the stack
            return "PUT", f"/v1/users/{name}/history", {"items": [f"{taste} {user} {turn}"]}
        if planned.kind == "stack":
            return "POST", f"/v1/users/{name}/stack", None
        if planned.kind == "delete":
            return "DELETE", f"/v1/users/{name}", None
        body: dict[str, Any] = {
            "model": settings.model,
            "user": name,
            "prompt": settings.prompts[user % len(settings.prompts)],
            "max_tokens": planned.tokens,
            "temperature": 0,
        }
        if planned.is_stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return "POST", "/v1/completions", body

    def _try(self, method: str, path: str, body: Mapping[str, Any] | None, row: Row) -> float:
        """One try; seconds to wait before the next. What came of it stands in `row`."""
        row.status, row.error, row.text, row.gaps_ms, row.ttft_ms = 0, "", "", [], None
        most_s = self._settings.timeout_s
        wait_s = min(BUSY_AFTER_S, most_s)
        # of the whole try: a stream that is kept alive and says nothing would be read for ever
        deadline = gevent.Timeout.start_new(most_s, TimeoutError)
        try:
            asked = self._http.request(
                method, path, name=row.kind, json=body, stream=row.is_stream, catch_response=True
            )
        except NO_ANSWER as error:  # such as an error's page in no known encoding, which locust reads at once
            deadline.close()
            row.error = type(error).__name__
            return wait_s
        with asked as answer:
            row.status = answer.status_code or 0
            try:
                if row.status == 503:
                    wait_s = _wait_s(answer.headers.get("retry-after"), most_s)
                    row.error = "busy"
                elif not 200 <= row.status < 300:
                    row.error = f"status {row.status}" if row.status else type(answer.error).__name__
                elif row.is_stream:
                    self._read_stream(answer, row)
                elif answer.request_meta["exception"] is not None:  # cut off in its text
                    raise answer.request_meta["exception"]
                else:
                    _read_whole(json.loads(answer.content), row)
            except NO_ANSWER as error:
                row.status, row.error = 0, type(error).__name__
            finally:
                deadline.close()
            if row.is_stream and answer._response is not None:
                answer._response.release()  # a stream that broke off keeps its socket
            if row.error:
                answer.failure(row.error)
            else:
                answer.success()
        return wait_s

    def _read_stream(self, answer: ResponseContextManager, row: Row) -> None:
        last_s: float | None = None
        for event in _events(answer):
            if event is None:
                return
            if "error" in event:
                # the status has been sent already; a 503 is told by its code
                row.status = 503 if event["error"].get("code") == "busy" else 0
                row.error = "busy" if row.status else "broken stream"
                return
            if event.get("usage"):
                _read_usage(event["usage"], row)
            for choice in event["choices"]:
                text = _text(choice["text"])
                now_s = self._now_s()
                if last_s is None:
                    row.ttft_ms = (now_s - row.sent_s) * 1e3
                else:
                    row.gaps_ms.append(round((now_s - last_s) * 1e3, 3))
                last_s = now_s
                row.text += text
        row.status, row.error = 0, "stream without an end"

    def _now_s(self) -> float:
        return time.monotonic() - self._began_s

    def _sleep_until(self, at_s: float) -> None:
        if (rest_s := at_s - self._now_s()) > 0:
            gevent.sleep(rest_s)


def _events(answer: ResponseContextManager) -> Iterator[dict[str, Any] | None]:
    """A stream's events as they come; None is its proper end."""
    # locust's own iter_lines waits for a kilobyte before it tells anything
    while line := answer._response.readline(b"\n"):  # type: ignore[union-attr]
        if line.startswith(b"data: [DONE]"):
            yield None
        elif line.startswith(b"data: "):
            yield json.loads(line[6:])


def _read_whole(answer: dict[str, Any], row: Row) -> None:
    if row.kind == "ask":
        row.text = _text(answer["choices"][0]["text"])
        _read_usage(answer["usage"], row)
    elif row.kind == "history":
        row.anchors = [_anchor(anchor["slot"], anchor["weight"]) for anchor in answer["anchors"]]


def _read_usage(usage: dict[str, Any], row: Row) -> None:
    row.prompt_tokens, row.tokens = (_count(usage[name]) for name in ("prompt_tokens", "completion_tokens"))


def _text(said: Any) -> str:
    if not isinstance(said, str):
        raise TypeError("no text")
    return said


def _count(said: Any) -> int:
    if type(said) is not int:
        raise TypeError("no number")
    if not 0 <= said < 2**31:  # as requests.parquet keeps it
        raise ValueError("no number of tokens")
    return said


def _anchor(slot: Any, weight: Any) -> tuple[int, float]:
    if not math.isfinite(weight):
        raise ValueError("no weight")
    return _count(slot), float(weight)


def _wait_s(said: Any, most_s: float) -> float:
    """Seconds that a refusal asks for, from 0 to so many; BUSY_AFTER_S where it does not say, or says no number."""
    try:
        asked_s = float(said)
    except (TypeError, ValueError):
        asked_s = math.nan
    return min(max(BUSY_AFTER_S if math.isnan(asked_s) else asked_s, 0.0), most_s)


def _tell(line: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    Generator(settings_from(sys.stdin.read())).run()
