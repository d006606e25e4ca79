"""What of a request Ray Serve's proxy gets to see."""

from __future__ import annotations

import asyncio

import pytest

from mta_ray.serving.front import middlewares

HEADERS = [
    (b"authorization", b"Bearer key"),
    (b"x-name", "Zoë".encode()),
    (b"x-broken", b"\xff\xfe"),
    (b"serve_multiplexed_model_id", b"anybody"),
    (b"Serve-Multiplexed-Model-Id", b"somebody"),
]


@pytest.mark.parametrize("kind", ["http", "lifespan"])
def test_headers_that_the_proxy_must_not_read_are_dropped(kind: str) -> None:
    seen: list[dict] = []

    async def app(scope, receive, send) -> None:  # noqa: ANN001
        seen.append(scope)

    async def nothing(*_: object) -> None: ...

    (front,) = middlewares()
    scope = {"type": kind} | ({"headers": HEADERS} if kind == "http" else {})
    asyncio.run(front.cls(app, *front.args, **front.kwargs)(scope, nothing, nothing))
    assert seen == [{"type": kind} | ({"headers": HEADERS[:2]} if kind == "http" else {})]
