"""What stands before Ray Serve's HTTP proxy: headers that it must not read are dropped.

It answers 500 to one that is no UTF-8, and keeps a request for good that names a model of its multiplexing.

Ray Serve finds it by RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH, one of `local.SERVE_SETTINGS`.
"""

from __future__ import annotations

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send


def middlewares() -> list[Middleware]:
    """What Ray Serve asks for."""
    return [Middleware(ReadableHeaders)]


MULTIPLEXED = b"serve_multiplexed_model_id"
"""A header by which anybody could choose, before any key is asked for, what the proxy's router remembers."""


class ReadableHeaders:
    """Drops headers whose value is no UTF-8, and the one of Ray Serve's multiplexing, however it is spelt."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if "headers" in scope:
            scope["headers"] = [
                (name, value)
                for name, value in scope["headers"]
                if _is_utf8(value) and name.lower().replace(b"-", b"_") != MULTIPLEXED
            ]
        await self._app(scope, receive, send)


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True
