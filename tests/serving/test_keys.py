"""API keys: what opens, what does not, what is kept of them, and how fast they may be used."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from mta_ray.cli import BAD_INPUT, OK, main
from mta_ray.serving.args import ServingArgs
from mta_ray.serving.database import Database, DatabaseConfig, open_database
from mta_ray.serving.keys import ApiKey, Bucket, InvalidKey, Keys, ListKeysConfig, MakeKeyConfig, full_bucket, take
from mta_ray.serving.tables import keys as table


@pytest.fixture
def keys(database: Database) -> Keys:
    return Keys(database)


def test_a_key_opens_its_tenant(keys: Keys) -> None:
    assert not keys.are_configured()
    first, second = keys.make("acme", label="ana", requests_per_minute=7), keys.make("other")
    assert keys.are_configured()
    opened = keys.verify(first)
    assert (opened.tenant, opened.label, opened.requests_per_minute, opened.revoked_at_s) == ("acme", "ana", 7, None)
    assert keys.verify(second).tenant == "other"
    assert first.startswith(f"mta_{opened.key_id}_") and len(first) == 60


def test_what_is_not_exactly_a_key_opens_nothing(keys: Keys) -> None:
    first, second = keys.make("acme"), keys.make("other")
    swapped = first[:17] + second[17:]
    last = "A" if first[-1] != "A" else "B"
    for wrong in ("", "mta_", swapped, first[:-1], first[:-1] + last, first + "A", f" {first}", f"{first}\n",
                  first.upper(), "mta_000000000000_" + first[17:], "sk-" + first, "é" * 60, "\ud800" * 60):  # fmt: skip
        with pytest.raises(InvalidKey) as told:
            keys.verify(wrong)
        assert str(told.value) == "invalid API key"


def test_a_revoked_key_opens_nothing_and_is_still_listed(keys: Keys, clock: Any) -> None:
    one, two = keys.make("acme"), keys.make("acme")
    key_id = keys.verify(one).key_id
    clock.now_s += 10
    keys.revoke(key_id)
    with pytest.raises(InvalidKey):
        keys.verify(one)
    assert keys.verify(two).tenant == "acme"
    clock.now_s += 10
    keys.revoke(key_id)
    revoked = {key.key_id: key.revoked_at_s for key in keys.list("acme")}
    assert revoked[key_id] == clock.now_s - 10 and list(revoked.values()).count(None) == 1
    with pytest.raises(ValueError, match="mta keys list"):
        keys.revoke("000000000000")


def test_the_list_is_by_tenant_and_tells_no_secret(keys: Keys) -> None:
    made = [keys.make(tenant) for tenant in ("b", "a", "b")]
    assert [key.tenant for key in keys.list()] == ["a", "b", "b"]
    assert [key.tenant for key in keys.list("b")] == ["b", "b"] and keys.list("c") == []
    assert {field.name for field in fields(ApiKey)}.isdisjoint({"secret", "secret_digest", "key"})
    assert not any(key.split("_", 2)[2] in repr(keys.list()) for key in made)


def test_no_secret_is_at_rest(keys: Keys, database: Database) -> None:
    made = keys.make("acme")
    with database.reading() as connection:
        row = connection.execute(sa.select(table)).one()
    assert made[17:] not in str(row) and made[17:].encode() not in row.secret_digest
    assert len(row.secret_digest) == 32
    if database.is_sqlite:
        folder = Path(str(database.engine.url.database)).parent
        kept = b"".join(path.read_bytes() for path in folder.iterdir())
        assert made[4:16].encode() in kept and made[17:].encode() not in kept


@pytest.mark.parametrize(
    "wrong", [{"tenant": ""}, {"tenant": "a\0"}, {"tenant": "a" * 65}, {"label": "\ud800"}, {"requests_per_minute": 0}]
)
def test_a_key_that_could_not_be_kept_or_used_is_not_made(keys: Keys, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        keys.make(**{"tenant": "acme"} | wrong)
    assert not keys.are_configured()


# ---- limits


def test_a_minute_of_requests_at_once_and_then_one_by_one() -> None:
    bucket = full_bucket(3, 100.0)
    for _ in range(3):
        bucket, wait_s = take(bucket, 3, 100.0)
        assert wait_s == 0.0
    empty, wait_s = take(bucket, 3, 100.0)
    assert wait_s == pytest.approx(20.0) and empty == bucket
    _, wait_s = take(empty, 3, 119.0)
    assert wait_s == pytest.approx(1.0)
    refilled, wait_s = take(empty, 3, 120.0)
    assert wait_s == 0.0 and refilled.tokens == pytest.approx(0.0, abs=1e-6)


def test_a_refusal_costs_nothing_and_a_clock_set_back_gives_nothing() -> None:
    bucket = Bucket(tokens=0.0, at_s=100.0)
    for tenth in range(1, 200):
        bucket, wait_s = take(bucket, 3, 100.0 + tenth / 10)
        assert wait_s > 0
    assert take(bucket, 3, 120.1)[1] == 0.0
    back, wait_s = take(Bucket(tokens=0.0, at_s=100.0), 3, 10.0)
    assert wait_s == pytest.approx(20.0) and back.tokens == 0.0


@given(st.integers(1, 1000), st.lists(st.floats(0, 30), min_size=1, max_size=200))
def test_never_more_than_the_rate_and_waiting_as_told_is_enough(per_minute: int, gaps: list[float]) -> None:
    """Over any span: at most the burst and what came in meanwhile, counted by the slow obvious way."""
    now_s, bucket, served = 0.0, full_bucket(per_minute, 0.0), 0
    for gap in gaps:
        now_s += gap
        bucket, wait_s = take(bucket, per_minute, now_s)
        if wait_s:
            assert take(bucket, per_minute, now_s + wait_s)[1] == 0.0
            assert take(bucket, per_minute, now_s + wait_s * 0.9)[1] > 0.0
        else:
            served += 1
        assert served <= per_minute + now_s * per_minute / 60 + 1e-6
        assert 0 <= bucket.tokens <= per_minute


# ---- the command


def test_keys_are_made_listed_and_revoked_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = ["--database.url", str(tmp_path / "users.db")]
    assert main(["keys", "make", "--tenant", "acme", "--label", "Ana's laptop", *at]) == OK
    told = capsys.readouterr()
    key = told.out.strip()
    assert key.startswith("mta_") and told.out.count("\n") == 1 and "a new database" in told.err
    database = open_database(DatabaseConfig(url=at[1]))
    assert Keys(database).verify(key).label == "Ana's laptop"

    assert main(["keys", "list", *at]) == OK
    listed = capsys.readouterr().out
    assert key[4:16] in listed and "acme" in listed and "open" in listed and key[17:] not in listed
    assert main(["keys", "revoke", "--key-id", key[4:16], *at]) == OK
    assert "revoked" in capsys.readouterr().out
    with pytest.raises(InvalidKey):
        Keys(database).verify(key)
    database.close()
    assert main(["keys", "list", "--tenant", "acme", *at]) == OK
    assert "revoked" in capsys.readouterr().out
    assert {path.name.split("-")[0] for path in tmp_path.iterdir()} == {"users.db"}  # no settings are left beside it

    assert main(["keys", "revoke", "--key-id", "nothing", *at]) == BAD_INPUT
    assert capsys.readouterr().err.startswith("mta keys revoke: no key has this id")
    for command in (["list"], ["revoke", "--key-id", key[4:16]]):
        elsewhere = str(tmp_path / "folder" / "mistyped.db")
        assert main(["keys", *command, "--database.url", elsewhere]) == BAD_INPUT
        assert "no database is at" in capsys.readouterr().err and not Path(elsewhere).parent.exists()
    assert main(["keys", "mak"]) == BAD_INPUT
    assert "did you mean 'keys make'" in capsys.readouterr().err
    assert main(["keys"]) == BAD_INPUT
    assert "keys list" in capsys.readouterr().err


def test_keys_are_made_where_the_service_looks_for_them() -> None:
    assert MakeKeyConfig(tenant="a").database.url == ListKeysConfig().database.url == ServingArgs().store
