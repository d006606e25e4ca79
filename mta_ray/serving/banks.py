"""Which banks there are, which one is in force, and which of their anchors have been taken out of service.

Anchors are users: whoever asks to be forgotten leaves every bank at once, and may not come back with a bank that was
built before.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from mta_ray.serving.database import Database
from mta_ray.serving.identity import TENANT_CHARS_MAX, UserId, check_name
from mta_ray.serving.tables import anchors, bank_anchors, bank_state, banks, citations, retired_anchors


@dataclass(frozen=True, slots=True, kw_only=True)
class NewBank:
    """A bank artifact that is to be served."""

    version: str
    path: str
    """Folder or URL of the artifact."""
    hash: str
    """Of the artifact."""
    base_fingerprint: str
    encoder: str
    anchors: tuple[UserId, ...]
    """In the order of the bank's slots."""

    def __post_init__(self) -> None:
        check_name(self.version, "bank version", TENANT_CHARS_MAX)
        if not self.anchors or len(set(self.anchors)) != len(self.anchors):
            raise ValueError(f"bank {self.version} needs different anchors, at least one; got {len(self.anchors)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedBank:
    """A bank as the store knows it now."""

    bank: NewBank
    retired_slots: frozenset[int]
    """Not to be used by any route, though the artifact holds them."""
    needs_rebuild: bool
    """Whether an anchor of it was retired."""
    is_active: bool
    published_at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BankState:
    """What a replica compares to know whether its picture of the banks is old."""

    active_version: str | None
    generation: int
    """Grows with everything that happens to a bank or an anchor."""


class UnknownBank(ValueError):
    """No bank of that version is published."""


class Banks:
    """The published banks, for every tenant alike."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def publish(self, bank: NewBank) -> None:
        """Make a bank known, or the place that it has moved to. Another one under its version is a ValueError.

        An anchor that was deleted or retired since the bank was built is out of service from the start.
        """
        with self.database.writing() as connection:
            if not self.database.is_sqlite:  # deletions under way end first, later ones see this bank's anchors
                connection.execute(sa.text("LOCK TABLE retired_anchors IN SHARE MODE"))
            row = {f: getattr(bank, f) for f in ("version", "path", "hash", "base_fingerprint", "encoder")}
            row |= {"needs_rebuild": False, "published_at_s": self.database.clock()}
            if not self.database.insert_missing(connection, banks, row):
                one = banks.c.version == bank.version
                known = connection.execute(sa.select(banks.c.hash, banks.c.path).where(one)).one()
                if known.hash != bank.hash:
                    raise ValueError(
                        f"bank version {bank.version} is published already, with other content; take another"
                    )
                if known.path != bank.path:  # it has moved
                    connection.execute(sa.update(banks).where(one).values(path=bank.path))
                return

            keys = self._keys(connection, bank.anchors)
            slots = [
                {"bank_version": bank.version, "slot": slot, "anchor_key": keys[anchor]}
                for slot, anchor in enumerate(bank.anchors)
            ]
            connection.execute(sa.insert(bank_anchors), slots)
            if _retired_slots(connection, bank.version):
                connection.execute(sa.update(banks).where(banks.c.version == bank.version).values(needs_rebuild=True))
            _next_generation(connection)

    def activate(self, version: str) -> None:
        """Serve this bank from now on."""
        with self.database.writing() as connection:
            if connection.execute(sa.select(banks.c.version).where(banks.c.version == version)).first() is None:
                raise UnknownBank(f"no bank of version {version} is published; publish it first")
            connection.execute(sa.update(bank_state).values(active_version=version))
            _next_generation(connection)

    def drop(self, version: str) -> None:
        """Forget a bank that is not active, and the names of anchors that neither a bank nor a route needs any more."""
        with self.database.writing() as connection:
            if connection.execute(sa.select(bank_state.c.active_version)).scalar() == version:
                raise ValueError(f"bank {version} is active; activate another one first")
            if not connection.execute(sa.delete(banks).where(banks.c.version == version)).rowcount:
                raise UnknownBank(f"no bank of version {version} is published")
            in_bank = sa.exists().where(bank_anchors.c.anchor_key == anchors.c.anchor_key)
            in_route = sa.exists().where(citations.c.anchor_key == anchors.c.anchor_key)
            connection.execute(sa.delete(anchors).where(~in_bank, ~in_route))
            _next_generation(connection)

    def state(self) -> BankState:
        """Which bank is active, and the generation: one row, for every request to look at."""
        with self.database.reading() as connection:
            row = connection.execute(sa.select(bank_state.c.active_version, bank_state.c.generation)).one()
        return BankState(active_version=row.active_version, generation=row.generation)

    def get(self, version: str) -> PublishedBank:
        """The bank of that version, with what is retired of it."""
        with self.database.reading() as connection:
            active = sa.select(bank_state.c.active_version).scalar_subquery().label("active_version")
            row = connection.execute(sa.select(banks, active).where(banks.c.version == version)).first()
            if row is None:
                raise UnknownBank(f"no bank of version {version} is published")
            slots = connection.execute(
                sa.select(anchors.c.tenant, anchors.c.user_id, anchors.c.is_retired)
                .join(bank_anchors, bank_anchors.c.anchor_key == anchors.c.anchor_key)
                .where(bank_anchors.c.bank_version == version)
                .order_by(bank_anchors.c.slot)
            ).all()
        bank = NewBank(
            version=version,
            path=row.path,
            hash=row.hash,
            base_fingerprint=row.base_fingerprint,
            encoder=row.encoder,
            anchors=tuple(UserId(tenant=slot.tenant, id=slot.user_id) for slot in slots),
        )
        return PublishedBank(
            bank=bank,
            retired_slots=frozenset(number for number, slot in enumerate(slots) if slot.is_retired),
            needs_rebuild=row.needs_rebuild,
            is_active=row.active_version == version,
            published_at_s=row.published_at_s,
        )

    def active(self) -> PublishedBank | None:
        """The bank in force; none before the first is activated."""
        version = self.state().active_version
        return None if version is None else self.get(version)

    def known_as(self, digest: str) -> str | None:
        """The version under which the bank of that hash is published, if it is."""
        with self.database.reading() as connection:
            query = sa.select(banks.c.version).where(banks.c.hash == digest).order_by(banks.c.published_at_s)
            version = connection.execute(query.limit(1)).scalar()
        return None if version is None else str(version)

    def versions(self) -> list[str]:
        """All published versions, oldest first."""
        with self.database.reading() as connection:
            query = sa.select(banks.c.version).order_by(banks.c.published_at_s, banks.c.version)
            return list(connection.execute(query).scalars())

    def retire(self, anchor: UserId) -> bool:
        """Take an anchor out of service in every bank, for good; whether it stood in one.

        Users who cite it are found, in pages, by `UserStore.citing`.
        """
        with self.database.writing() as connection:
            return retire_within(self.database, connection, anchor)

    def is_retired(self, anchor: UserId) -> bool:
        """Whether this user was deleted or retired, so that a bank may not be built on it."""
        with self.database.reading() as connection:
            return _is_barred(connection, anchor)

    def _keys(self, connection: sa.Connection, names: Sequence[UserId]) -> dict[UserId, int]:
        """Each anchor's key; rows are made for anchors that no bank held before."""
        found = {}
        for anchor in sorted(set(names)):
            row = {"tenant": anchor.tenant, "user_id": anchor.id, "is_retired": _is_barred(connection, anchor)}
            self.database.insert_missing(connection, anchors, row)
            found[anchor] = connection.execute(sa.select(anchors.c.anchor_key).where(_is(anchor))).scalar_one()
        return found


def retire_within(database: Database, connection: sa.Connection, anchor: UserId) -> bool:
    """Retire an anchor within the caller's transaction; whether it was in service. For any other user: bar it only."""
    database.insert_missing(connection, retired_anchors, {"digest": anchor.digest, "retired_at_s": database.clock()})
    key = connection.execute(
        sa.update(anchors)
        .where(_is(anchor), anchors.c.is_retired.is_(False))
        .values(is_retired=True)
        .returning(anchors.c.anchor_key)
    ).scalar()
    if key is None:
        return False
    holding = sa.select(bank_anchors.c.bank_version).where(bank_anchors.c.anchor_key == key)
    connection.execute(sa.update(banks).where(banks.c.version.in_(holding)).values(needs_rebuild=True))
    _next_generation(connection)
    return True


class AnchorNames:
    """Anchor key to anchor and back, remembered: a key is never used twice, so what was read stays right."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._names: dict[int, UserId] = {}
        self._lock = threading.Lock()

    def names(self, keys: Iterable[int]) -> dict[int, UserId]:
        """The anchors of some keys; at most one query, and none for keys seen before.

        A key is left out when its bank was dropped between the caller's read and this one.
        """
        wanted = set(keys)
        with self._lock:
            missing = wanted - self._names.keys()
        if missing:
            query = sa.select(anchors.c.anchor_key, anchors.c.tenant, anchors.c.user_id)
            with self._database.reading() as connection:
                rows = connection.execute(query.where(anchors.c.anchor_key.in_(missing))).all()
            with self._lock:
                self._names |= {row.anchor_key: UserId(tenant=row.tenant, id=row.user_id) for row in rows}
        with self._lock:
            return {key: self._names[key] for key in wanted if key in self._names}


def _is(anchor: UserId) -> sa.ColumnElement[bool]:
    return sa.and_(anchors.c.tenant == anchor.tenant, anchors.c.user_id == anchor.id)


def _is_barred(connection: sa.Connection, anchor: UserId) -> bool:
    query = sa.select(retired_anchors.c.digest).where(retired_anchors.c.digest == anchor.digest)
    return connection.execute(query).first() is not None


def _retired_slots(connection: sa.Connection, version: str) -> list[int]:
    query = (
        sa.select(bank_anchors.c.slot)
        .join(anchors, anchors.c.anchor_key == bank_anchors.c.anchor_key)
        .where(bank_anchors.c.bank_version == version, anchors.c.is_retired)
    )
    return list(connection.execute(query).scalars())


def _next_generation(connection: sa.Connection) -> None:
    connection.execute(sa.update(bank_state).values(generation=bank_state.c.generation + 1))
