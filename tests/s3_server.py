"""A real S3 server on loopback, for tests: moto's, in this process, so that what it holds outlives a stop."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server


class S3Server:
    """The server on one port, that can go away and come back, also in the middle of an upload."""

    def __init__(self) -> None:
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server: BaseWSGIServer | None = None
        self._thread: threading.Thread | None = None
        self.port = 0
        self.puts = 0
        """Uploads of whole objects since `watch`."""
        self._on_put: Callable[[int], None] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Answer, at the same port as ever."""
        self._server = make_server("127.0.0.1", self.port, self._answer, threaded=True, request_handler=_Silent)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Refuse every connection."""
        assert self._server is not None and self._thread is not None
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def watch(self, on_put: Callable[[int], None] | None) -> None:
        """Call this with 1, 2, ... as the next uploads arrive, before they are kept; ConnectionError breaks one."""
        self.puts, self._on_put = 0, on_put

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] == "PUT" and environ["PATH_INFO"].count("/") > 1:
            self.puts += 1
            try:
                if self._on_put is not None:
                    self._on_put(self.puts)
            except ConnectionError:
                environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
                raise
        return self._app(environ, start_response)


class _Silent(WSGIRequestHandler):
    def log(self, *_: Any) -> None:
        pass
