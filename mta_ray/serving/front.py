"""What stands before Ray Serve's HTTP proxy: headers that it must not obey are dropped, and its 404 is told as ours.

Ray Serve finds it by RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH, one of `local.SERVE_SETTINGS`. It runs in the proxy's
process, and imports nothing that makes that one larger.
"""

from __future__ import annotations

import json

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

NOT_FOR_CLIENTS = {
    b"serve-multiplexed-model-id",  # kept for good by the proxy's router
    b"x-request-disconnect-disabled",  # decodes on for a client that is gone
    b"x-request-timeout-seconds",  # answers in the proxy's words
    b"x-request-id",  # written into its log, whatever it is
    b"x-session-id",
}
"""Headers by which anybody could steer the proxy, before any key is asked for; `_` is as good as `-`."""
NO_APPLICATION = b"Path '"
"""How the proxy's own 404 begins: there is no application yet, or no more."""
OURS = ("/v1/", "/healthz", "/readyz", "/openapi.json")
"""Paths of which that is said; others may be those of other applications."""
STARTED_AFTER_S = 15
STARTING = {"message": "the service is starting, or ends; send the request again", "type": "server_error"}
BODY = json.dumps({"error": {**STARTING, "param": None, "code": "busy"}}).encode()
"""OpenAI's error shape, as `answers.error_answer` makes it."""


def middlewares() -> list[Middleware]:
    """What Ray Serve asks for."""
    return [Middleware(Front)]


class Front:
    """Drops headers that the proxy must not read (it answers 500 to a value that is no UTF-8), and tells 503 where it
    would say that there is no such path, while the service starts or ends."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if "headers" in scope:
            scope["headers"] = [
                (name, value)
                for name, value in scope["headers"]
                if _is_utf8(value) and name.lower().replace(b"_", b"-") not in NOT_FOR_CLIENTS
            ]
        is_ours = scope["type"] == "http" and scope["path"].startswith(OURS)
        await self._app(scope, receive, _Told(send) if is_ours else send)


class _Told:
    """One answer on its way out. A 404 is held until its body shows whose it is."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._held: Message | None = None
        self._is_replaced = False

    async def __call__(self, message: Message) -> None:
        if self._is_replaced:
            return
        if message["type"] == "http.response.start" and message["status"] == 404:
            self._held = message
            return
        if self._held is not None:
            start, self._held = self._held, None
            if message.get("body", b"").startswith(NO_APPLICATION):
                self._is_replaced = True
                await self._tell_503()
                return
            await self._send(start)
        await self._send(message)

    async def _tell_503(self) -> None:
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(BODY)).encode()),
            (b"retry-after", str(STARTED_AFTER_S).encode()),
        ]
        await self._send({"type": "http.response.start", "status": 503, "headers": headers})
        await self._send({"type": "http.response.body", "body": BODY})


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True
