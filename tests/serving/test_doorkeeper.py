"""Who is let in from where, without a network: requests as Starlette hands them over."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
from fastapi import Request

from mta_ray.serving.database import DatabaseConfig, open_database
from mta_ray.serving.doorkeeper import Doorkeeper
from mta_ray.serving.keys import Keys
from mta_ray.serving.schema import BadRequest, Limits


def request(
    client: str | None,
    *,
    key: str = "",
    host: str | None = "localhost:8000",
    origin: str | None = None,
    more: dict[str, str] | None = None,
    chunks: Sequence[bytes] = (),
) -> Request:
    left = list(chunks)

    async def receive() -> dict:
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    told = {"authorization": f"Bearer {key}" if key else None, "host": host, "origin": origin, **(more or {})}
    headers = [(name.encode(), value.encode()) for name, value in told.items() if value is not None]
    scope = {"type": "http", "client": client and (client, 1), "headers": headers}
    return Request(scope, receive)


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(open_database(DatabaseConfig(url=str(tmp_path / "users.db"))))


def test_without_keys_only_this_machine_comes_in_and_with_one_nobody_without(keys: Keys) -> None:
    door = Doorkeeper(keys, Limits(), local_tenant="home")
    for local in ("127.0.0.1", "127.8.8.8", "::1"):
        assert asyncio.run(door.tenant(request(local, key="anything"))) == "home"
    for stranger in ("10.0.0.1", "203.0.113.9", "2001:db8::1", "not-an-address", None):
        with pytest.raises(BadRequest) as refused:
            asyncio.run(door.tenant(request(stranger)))
        assert refused.value.status == 403

    key = keys.make("acme")
    assert asyncio.run(door.tenant(request("203.0.113.9", key=key))) == "acme"
    for wrong in ("", "anything", key[:-1] + "A" * (key[-1] != "A") + "B" * (key[-1] == "A")):
        with pytest.raises(BadRequest) as refused:
            asyncio.run(door.tenant(request("127.0.0.1", key=wrong)))
        assert refused.value.status == 401
    keys.revoke(key.split("_")[1])
    with pytest.raises(BadRequest):
        asyncio.run(door.tenant(request("127.0.0.1", key=key)))


def test_without_keys_neither_a_proxy_nor_a_web_page_of_elsewhere_comes_in(keys: Keys) -> None:
    door = Doorkeeper(keys, Limits(), local_tenant="home")
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:8000", "[::1]:8000"):
        for origin in (None, "http://localhost:3000", "https://127.0.0.1", "http://[::1]:1"):
            assert asyncio.run(door.tenant(request("127.0.0.1", host=host, origin=origin))) == "home"
    for host in ("api.example.com", "localhost.example.com", "evil@example.com", "0.0.0.0:8000", "[::1", "", None):
        with pytest.raises(BadRequest) as refused:
            asyncio.run(door.tenant(request("127.0.0.1", host=host)))
        assert refused.value.status == 403
    for origin in ("https://example.com", "null", "", "http://localhost.example.com", "http://[::1"):
        with pytest.raises(BadRequest) as refused:
            asyncio.run(door.tenant(request("127.0.0.1", origin=origin)))
        assert refused.value.status == 403

    for header in ("forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-real-ip"):
        with pytest.raises(BadRequest) as refused:
            asyncio.run(door.tenant(request("127.0.0.1", more={header: "127.0.0.1"})))
        assert refused.value.status == 403

    key = keys.make("acme")
    assert (
        asyncio.run(door.tenant(request("10.0.0.1", key=key, host="x.example", origin="https://x.example"))) == "acme"
    )


def test_a_key_is_limited_and_another_one_is_not(keys: Keys) -> None:
    door = Doorkeeper(keys, Limits(), local_tenant="home")
    slow, other = keys.make("acme", requests_per_minute=2), keys.make("acme", requests_per_minute=2)
    for _ in range(2):
        asyncio.run(door.tenant(request("127.0.0.1", key=slow)))
    with pytest.raises(BadRequest) as refused:
        asyncio.run(door.tenant(request("127.0.0.1", key=slow)))
    assert refused.value.status == 429 and 1 <= refused.value.retry_after_s <= 31
    assert asyncio.run(door.tenant(request("127.0.0.1", key=other))) == "acme"


def test_a_body_is_read_no_further_than_allowed(keys: Keys) -> None:
    door = Doorkeeper(keys, Limits(body_mib=1 / 1024), local_tenant="home")
    assert asyncio.run(door.body(request(None, chunks=[b"a" * 1000, b"b" * 24]), "t")) == b"a" * 1000 + b"b" * 24
    chunks = [b"a" * 1000] * 50
    with pytest.raises(BadRequest) as refused:
        asyncio.run(door.body(request(None, chunks=chunks), "t"))
    assert refused.value.status == 413


def test_bodies_that_do_not_come_hold_up_nobody_else(keys: Keys) -> None:
    door = Doorkeeper(keys, Limits(upload_s=0.2, uploads=3), local_tenant="home")

    async def never() -> dict:
        await asyncio.Event().wait()
        raise AssertionError

    async def outcome(tenant: str, *, comes: bool) -> object:
        asked = request(None, chunks=[b"{}"]) if comes else Request({"type": "http", "headers": []}, never)
        try:
            return await door.body(asked, tenant)
        except BadRequest as error:
            return error.status

    async def all_at_once() -> list[object]:
        return await asyncio.gather(
            *(outcome("slow", comes=False) for _ in range(5)), outcome("slow", comes=True), outcome("other", comes=True)
        )

    assert asyncio.run(all_at_once()) == [408, 408, 408, 429, 429, 429, b"{}"]
    assert asyncio.run(outcome("slow", comes=True)) == b"{}"
