"""API keys: each opens one tenant, is shown once, is kept as a hash, and has a rate that is a pure function of time."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import sys
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from mta_ray.console import table
from mta_ray.serving.database import Database, DatabaseConfig, is_there, open_database, open_existing
from mta_ray.serving.identity import TENANT_CHARS_MAX, check_name
from mta_ray.serving.tables import keys

LABEL_CHARS_MAX = 200
_KEY = re.compile(r"mta_([0-9a-f]{12})_([0-9A-Za-z_-]{43})")
"""The key's public id, and 256 random bits in base64."""


class InvalidKey(ValueError):
    """This opens nothing: no key, an unknown one, a wrong secret, or a revoked one. Which of them is not told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """A key without its secret."""

    key_id: str
    tenant: str
    label: str
    requests_per_minute: int
    created_at_s: float
    revoked_at_s: float | None


class Keys:
    """The keys of all tenants."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def make(self, tenant: str, *, label: str = "", requests_per_minute: int = 600) -> str:
        """A new key, complete: the only time that anybody sees it."""
        check_name(tenant, "tenant", TENANT_CHARS_MAX)
        if label:
            check_name(label, "label", LABEL_CHARS_MAX)
        if requests_per_minute < 1:
            raise ValueError(
                f"requests_per_minute is {requests_per_minute}, wanted at least 1; revoke a key to stop it"
            )
        # 256 random bits cannot be guessed, so that a plain hash of them is as good as a slow one
        key_id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
        row = {
            "key_id": key_id,
            "tenant": tenant,
            "secret_digest": _digest(secret),
            "label": label,
            "requests_per_minute": requests_per_minute,
            "created_at_s": self.database.clock(),
        }
        with self.database.writing() as connection:
            connection.execute(sa.insert(keys), row)
        return f"mta_{key_id}_{secret}"

    def verify(self, key: str) -> ApiKey:
        """The key's tenant and limits; one row by its id. Raises InvalidKey."""
        match = _KEY.fullmatch(key)
        if match is None:
            raise InvalidKey("invalid API key")
        with self.database.reading() as connection:
            row = connection.execute(sa.select(keys).where(keys.c.key_id == match[1])).first()
        is_secret = hmac.compare_digest(_digest(match[2]), _NOBODY if row is None else row.secret_digest)
        if row is None or not is_secret or row.revoked_at_s is not None:
            raise InvalidKey("invalid API key")
        return _api_key(row)

    def list(self, tenant: str | None = None) -> list[ApiKey]:
        """All keys, or those of a tenant, revoked ones too, oldest first."""
        query = sa.select(keys).order_by(keys.c.tenant, keys.c.created_at_s, keys.c.key_id)
        if tenant is not None:
            query = query.where(keys.c.tenant == tenant)
        with self.database.reading() as connection:
            return [_api_key(row) for row in connection.execute(query)]

    def revoke(self, key_id: str) -> None:
        """Stop a key at once, for good. Revoking twice changes nothing; an id that is no key's is a ValueError."""
        with self.database.writing() as connection:
            is_open = keys.c.key_id == key_id, keys.c.revoked_at_s.is_(None)
            stop = sa.update(keys).where(*is_open).values(revoked_at_s=self.database.clock())
            was_open = connection.execute(stop).rowcount
            known = connection.execute(sa.select(keys.c.key_id).where(keys.c.key_id == key_id)).first()
            if not was_open and known is None:
                raise ValueError("no key has this id; `mta keys list` shows the ids (the 12 characters after mta_)")

    def are_configured(self) -> bool:
        """Whether any key was ever made: without one, nobody is to be let in but from this machine."""
        with self.database.reading() as connection:
            return connection.execute(sa.select(keys.c.key_id).limit(1)).first() is not None


def has_form(text: str) -> bool:
    """Whether it looks like a key."""
    return _KEY.fullmatch(text) is not None


# ---- limits


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """What is left of a key's allowance at a time."""

    tokens: float
    at_s: float


def full_bucket(requests_per_minute: int, now_s: float) -> Bucket:
    """The bucket of a key that has not been used: a minute's requests may come at once."""
    return Bucket(tokens=float(requests_per_minute), at_s=now_s)


def take(bucket: Bucket, requests_per_minute: int, now_s: float) -> tuple[Bucket, float]:
    """The bucket after one more request, and 0; or, where it is empty, as it was, and the seconds to wait.

    Semantics:
      tokens(now) = min(per_minute, tokens(then) + (now - then) * per_minute / 60); a request needs one whole token.
    """
    per_s = requests_per_minute / 60
    passed_s = max(now_s - bucket.at_s, 0.0)  # clocks are set back
    tokens = min(float(requests_per_minute), bucket.tokens + passed_s * per_s)
    if tokens < 1 - _ROUNDING:
        return Bucket(tokens=tokens, at_s=now_s), (1 - tokens) / per_s
    return Bucket(tokens=max(tokens - 1, 0.0), at_s=now_s), 0.0


# ---- the command line


@dataclass(frozen=True, slots=True, kw_only=True)
class MakeKeyConfig:
    """A new API key."""

    tenant: str
    """Whose users it opens; made by being named."""
    label: str = ""
    """What the list shows beside it, such as who holds it."""
    requests_per_minute: int = 600
    """Its limit; that many may come at once."""
    database: DatabaseConfig = field(default_factory=DatabaseConfig)
    """Where the service keeps its state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ListKeysConfig:
    """The API keys there are."""

    tenant: str | None = None
    """Only this tenant's."""
    database: DatabaseConfig = field(default_factory=DatabaseConfig)
    """Where the service keeps its state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RevokeKeyConfig:
    """The end of an API key."""

    key_id: str
    """The 12 characters after `mta_`; a whole key does as well."""
    database: DatabaseConfig = field(default_factory=DatabaseConfig)
    """Where the service keeps its state."""


def make_key(config: MakeKeyConfig) -> str:
    """The new key. It is not shown again."""
    if not is_there(config.database):
        print(f"a new database: {config.database.url}", file=sys.stderr)
    with closing(open_database(config.database)) as database:
        return Keys(database).make(config.tenant, label=config.label, requests_per_minute=config.requests_per_minute)


def list_keys(config: ListKeysConfig) -> str:
    """One line a key: id, tenant, limit, day, state and label."""
    with closing(open_existing(config.database)) as database:
        found = Keys(database).list(config.tenant)
    rows = [("key id", "tenant", "per minute", "made", "state", "label")]
    for key in found:
        state = "open" if key.revoked_at_s is None else f"revoked {_day(key.revoked_at_s)}"
        made = _day(key.created_at_s)
        rows.append((key.key_id, key.tenant, str(key.requests_per_minute), made, state, key.label))
    return table(rows)


def revoke_key(config: RevokeKeyConfig) -> str:
    """The id of the key that opens nothing any more."""
    match = _KEY.fullmatch(config.key_id)
    key_id = match[1] if match else config.key_id
    with closing(open_existing(config.database)) as database:
        Keys(database).revoke(key_id)
    return f"{key_id} is revoked"


_NOBODY = bytes(32)
_ROUNDING = 1e-9


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def _api_key(row: sa.Row[Any]) -> ApiKey:
    return ApiKey(
        key_id=row.key_id,
        tenant=row.tenant,
        label=row.label,
        requests_per_minute=row.requests_per_minute,
        created_at_s=row.created_at_s,
        revoked_at_s=row.revoked_at_s,
    )


def _day(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).date().isoformat()
