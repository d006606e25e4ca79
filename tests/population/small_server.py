"""What the small HTTP servers of these tests have in common."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler


class SmallServer(BaseHTTPRequestHandler):
    """Answers whole, and keeps silent otherwise."""

    def say(self, status: int, answer: object, retry_after: str | None = None) -> None:
        """Bytes as they are, anything else as JSON."""
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        if retry_after is not None:
            self.send_header("retry-after", retry_after)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass
