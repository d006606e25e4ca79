"""Who may come in, how often, and with how much: from a request to its tenant and its body."""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections import Counter
from urllib.parse import urlsplit

from fastapi import Request
from starlette.requests import ClientDisconnect

from mta_ray.serving.keys import ApiKey, Bucket, InvalidKey, Keys, full_bucket, has_form, take
from mta_ray.serving.schema import BadRequest, Limits

FORWARDED = ("forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-real-ip")
"""What proxies add for those whom they ask for."""
LOOKED_AT_S = 1.0
"""The first key is noticed within this time, or at once where it is shown."""


class Doorkeeper:
    """One ingress process's; each of them counts a key's requests by itself."""

    def __init__(self, keys: Keys, limits: Limits, *, local_tenant: str) -> None:
        """`local_tenant`: whose requests come from this machine while there are no keys."""
        self._keys, self._limits, self._local_tenant = keys, limits, local_tenant
        self._has_keys = False
        self._look_again_s = 0.0
        self._buckets: dict[str, Bucket] = {}
        self._uploads: Counter[str] = Counter()

    async def tenant(self, request: Request) -> str:
        """Whose users the request may name. Raises BadRequest: 401, 403 or 429."""
        scheme, _, secret = request.headers.get("authorization", "").partition(" ")
        secret = secret.strip()
        if not self._has_keys and (has_form(secret) or time.monotonic() >= self._look_again_s):
            self._has_keys = await asyncio.to_thread(self._keys.are_configured)
            self._look_again_s = time.monotonic() + LOOKED_AT_S
        if not self._has_keys:
            if not _is_local(request):
                message = (
                    "no API key is configured, so only this machine is served, by the name of localhost; make one with "
                    "`mta keys make`"
                )
                raise BadRequest(message, status=403, code="no_key_configured")
            return self._local_tenant
        if scheme.lower() != "bearer" or not secret:
            message = "no API key was given; send Authorization: Bearer KEY"
            raise BadRequest(message, status=401, code="no_api_key")
        try:
            key = await asyncio.to_thread(self._keys.verify, secret)
        except InvalidKey:
            raise BadRequest("invalid API key", status=401, code="invalid_api_key") from None
        self._spend(key)
        return key.tenant

    def _spend(self, key: ApiKey) -> None:
        now_s = time.monotonic()
        bucket = self._buckets.get(key.key_id) or full_bucket(key.requests_per_minute, now_s)
        self._buckets[key.key_id], wait_s = take(bucket, key.requests_per_minute, now_s)
        if wait_s:
            error = BadRequest("too many requests for this key", status=429, code="rate_limit_exceeded")
            error.retry_after_s = max(1, round(wait_s + 0.5))
            raise error

    async def body(self, request: Request, tenant: str) -> bytes:
        """The body, read no further and no longer than is allowed, of so many of a tenant's requests at once.

        Raises BadRequest: 408, 413 or 429.
        """
        if self._uploads[tenant] >= self._limits.uploads:
            error = BadRequest("too many bodies are under way for this tenant", status=429, code="rate_limit_exceeded")
            error.retry_after_s = 1
            raise error
        self._uploads[tenant] += 1
        try:
            async with asyncio.timeout(self._limits.upload_s):
                return await self._read(request)
        except TimeoutError:
            message = f"the body did not come within {self._limits.upload_s:g} s"
            raise BadRequest(message, status=408, code="timeout") from None
        except ClientDisconnect:
            raise BadRequest("the client is gone") from None
        finally:
            self._uploads[tenant] -= 1
            if not self._uploads[tenant]:
                del self._uploads[tenant]

    async def _read(self, request: Request) -> bytes:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self._limits.body_mib * 2**20:
                message = f"the body is larger than {self._limits.body_mib:g} MiB"
                raise BadRequest(message, status=413, code="body_too_large")
        return bytes(body)


def _is_local(request: Request) -> bool:
    """Whether this machine asks itself: no proxy that others reach, no web page of elsewhere (DNS rebinding too).

    A proxy that passes on neither the name it was asked by nor whom it asks for cannot be told from a local client.
    """
    origin = request.headers.get("origin")
    return (
        request.client is not None
        and not any(header in request.headers for header in FORWARDED)
        and _is_loopback(request.client.host)
        and _is_loopback(_host_of(f"//{request.headers.get('host', '')}"))
        and (origin is None or _is_loopback(_host_of(origin)))
    )


def _host_of(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
