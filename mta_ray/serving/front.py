"""What stands before Ray Serve's HTTP proxy, which answers 500 to a header that it reads and that is no UTF-8.

Ray Serve finds it by RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH, one of `local.SERVE_SETTINGS`.
"""

from __future__ import annotations

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send


def middlewares() -> list[Middleware]:
    """What Ray Serve asks for."""
    return [Middleware(ReadableHeaders)]


class ReadableHeaders:
    """Drops headers whose value is no UTF-8."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if "headers" in scope:
            scope["headers"] = [(name, value) for name, value in scope["headers"] if _is_utf8(value)]
        await self._app(scope, receive, send)


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True
