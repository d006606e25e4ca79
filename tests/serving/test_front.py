"""What of a request Ray Serve's proxy gets to see."""

from __future__ import annotations

import asyncio
import json

import pytest

from mta_ray.serving.answers import error_answer
from mta_ray.serving.front import middlewares

HEADERS = [
    (b"authorization", b"Bearer key"),
    (b"x-name", "Zoë".encode()),
    (b"x-broken", b"\xff\xfe"),
    (b"serve_multiplexed_model_id", b"anybody"),
    (b"Serve-Multiplexed-Model-Id", b"somebody"),
    (b"x-request-disconnect-disabled", b"?1"),
    (b"X-Request-Timeout-Seconds", b"0.001"),
    (b"x_request_id", b"somebody's name"),
    (b"x-session-id", b"1"),
]


@pytest.mark.parametrize("kind", ["http", "lifespan"])
def test_headers_that_the_proxy_must_not_read_are_dropped(kind: str) -> None:
    seen: list[dict] = []

    async def app(scope, receive, send) -> None:  # noqa: ANN001
        seen.append(scope)

    async def nothing(*_: object) -> None: ...

    (front,) = middlewares()
    scope = {"type": kind} | ({"headers": HEADERS, "path": "/v1/models"} if kind == "http" else {})
    asyncio.run(front.cls(app, *front.args, **front.kwargs)(scope, nothing, nothing))
    assert seen == [scope | ({"headers": HEADERS[:2]} if kind == "http" else {})]


@pytest.mark.parametrize(
    ("path", "status", "body", "told"),
    [
        ("/v1/models", 404, b"Path '/v1/models' not found. Ping http://.../-/routes for available routes.", 503),
        ("/other", 404, b"Path '/other' not found. Ping http://.../-/routes for available routes.", 404),
        ("/v1/users/x", 404, b'{"error": {"message": "no such user"}}', 404),
        ("/v1/users/x", 404, b"", 404),
        ("/v1/completions", 200, b"Path 'x' is a fine answer", 200),
    ],
)
def test_a_path_that_nobody_serves_yet_is_no_404(path: str, status: int, body: bytes, told: int) -> None:
    async def app(scope, receive, send) -> None:  # noqa: ANN001
        await send(
            {"type": "http.response.start", "status": status, "headers": [(b"content-length", b"%d" % len(body))]}
        )
        await send({"type": "http.response.body", "body": body[:20], "more_body": True})
        await send({"type": "http.response.body", "body": body[20:]})

    sent: list[dict] = []

    async def send(message: dict) -> None:
        sent.append(message)

    (front,) = middlewares()
    asyncio.run(front.cls(app, *front.args, **front.kwargs)({"type": "http", "headers": [], "path": path}, None, send))
    assert [message["type"] for message in sent[:2]] == ["http.response.start", "http.response.body"]
    assert sent[0]["status"] == told
    whole = b"".join(message.get("body", b"") for message in sent[1:])
    headers = dict(sent[0]["headers"])
    assert int(headers[b"content-length"]) == len(whole)
    if told == 503:
        fields = json.loads(whole)["error"]
        assert int(headers[b"retry-after"]) > 0 and fields["code"] == "busy"
        assert fields == json.loads(error_answer(503, fields["message"], code="busy").body())["error"]
    else:
        assert whole == body
