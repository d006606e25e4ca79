"""A request outside the load itself: asked again for a while where the service is busy."""

from __future__ import annotations

import time
from typing import Any

import httpx

TRIES, PATIENCE_S = 5, 10.0
"""Of a request that is refused, and how long to wait in between at most."""


def patient(http: httpx.Client, method: str, path: str, **sent: Any) -> httpx.Response:
    """The first answer that is no 503, or the last 503."""
    for left in reversed(range(TRIES)):
        answer = http.request(method, path, **sent)
        if answer.status_code != 503 or not left:
            return answer
        asked_s = answer.headers.get("retry-after", "")
        time.sleep(min(float(asked_s), PATIENCE_S) if asked_s.isdigit() else 1.0)
    raise AssertionError
