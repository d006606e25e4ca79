"""The state of users in SQL: histories in, states, routes and stacks out. One user is one row; nothing is scanned.

Every query names the tenant, but for those that go by anchor: a bank is everybody's. `ray` is not known here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import sqlalchemy as sa

from mta_ray.lamp.users import HistoryItem
from mta_ray.serving.banks import AnchorNames, retire_within
from mta_ray.serving.database import Database
from mta_ray.serving.identity import UserId
from mta_ray.serving.tables import anchors, citations, histories, stack_jobs, stacks, users
from mta_ray.serving.user_state import ItemSum, UserRoute, UserStack, UserState, from_lines, to_lines


class UnknownUser(LookupError):
    """The tenant has no such user (any more)."""


class Conflict(ValueError):
    """What the write was made from has changed since; read again and repeat."""


class HistoryTooLong(ValueError):
    """The history would outgrow its limits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryLimits:
    """How much may be kept of one user."""

    items_max: int = 5000
    """History items."""
    mib_max: float = 4.0
    """Text of the whole history, as JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """How much a tenant has stored."""

    users: int
    stacks: int
    waiting_stacks: int
    """Asked for and not finished, those that failed among them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewUser:
    """A user as `UserStore.add_users` takes one."""

    user: UserId
    task: str
    history: Sequence[HistoryItem]
    item_sum: ItemSum
    """Of the whole history."""
    route: UserRoute | None = None
    """Its `history_version` is set by the store."""


class UserStore:
    """Users by name. Methods are transactions, safe to call from many threads and processes at once."""

    def __init__(self, database: Database, limits: HistoryLimits | None = None) -> None:
        self.database = database
        self.limits = limits or HistoryLimits()
        self._names = AnchorNames(database)

    # ---- histories

    def append_history(
        self,
        user: UserId,
        items: Sequence[HistoryItem],
        added: ItemSum,
        *,
        task: str,
        expected_version: int | None = None,
    ) -> UserState:
        """The user with new items at the end; `added` is the sum of their vectors alone. Made if not there.

        Appends commute, so no version need be expected; 0 expects that there is no such user yet. Raises Conflict where
        the version, the task or the encoder is another one (for the encoder: `reembed` first). The route stays until a
        new one is set; see UserState.has_route_for.
        """
        return self._write_history(user, items, added, task, expected_version, "append")

    def replace_history(
        self,
        user: UserId,
        items: Sequence[HistoryItem],
        total: ItemSum,
        *,
        task: str,
        expected_version: int | None = None,
    ) -> UserState:
        """The user with these items alone; route and stack go, for they were made of items that are gone."""
        return self._write_history(user, items, total, task, expected_version, "replace")

    def add_users(self, new: Sequence[NewUser]) -> int:
        """Many users in one transaction; those who are there already are passed over. How many were added.

        A bulk load that was stopped is simply run again. Raises Conflict, and adds none, where an anchor of a route is
        out of service, and ValueError for a user who stands there twice.
        """
        if not new:
            return 0
        new = sorted(new, key=lambda one: one.user)
        if len({one.user for one in new}) < len(new):
            raise ValueError("a user stands twice among the new ones")
        with self.database.writing() as connection:
            # 1. users first, anchors second, each in order, as in set_routes
            now_s = self.database.clock()
            version = next_version(0, now_s)
            keys = self._anchor_keys(connection, {anchor for one in new if one.route for anchor in one.route.anchors})
            rows = [_new_row(one, version, now_s, keys) for one in new]
            for one, row in zip(new, rows, strict=True):
                if one.item_sum.items != len(one.history):
                    raise ValueError(f"a sum is of {one.item_sum.items} vectors, its history of {len(one.history)}")
                self._check_size(row["items"], row["history_bytes"])
            added = self.database.insert_new(connection, users, rows, (users.c.tenant, users.c.user_id))
            found = {UserId(tenant=row.tenant, id=row.user_id) for row in added}
            fresh = [one for one in new if one.user in found]
            self._hold(connection, keys.values())

            # 2. what belongs to those who were not there
            lines = [{**_key(one.user), "lines": b"".join(to_lines(one.history))} for one in fresh]
            cited = [{**_key(o.user), "anchor_key": keys[a]} for o in fresh if o.route for a in o.route.anchors]
            for table, some in ((histories, lines), (citations, cited)):
                if some:
                    connection.execute(sa.insert(table), some)
        return len(fresh)

    def reembed(self, user: UserId, total: ItemSum, *, version: int) -> None:
        """Put another encoder's sum in place of the old one; `version` says of which history."""
        with self.database.writing() as connection:
            change = sa.update(users).where(_is(users, user), users.c.version == version).values(**_sum_row(total))
            if not connection.execute(change).rowcount:
                raise self._gone_or_changed(connection, user)

    # ---- reading

    def read(self, user: UserId) -> UserState:
        """The user's state; one statement, one row by its key."""
        with self.database.reading() as connection:
            row = connection.execute(_STATE.where(_is(users, user))).first()
        if row is None:
            raise UnknownUser("no such user")
        return self._states([row])[0]

    def stack_versions(self, some: Collection[UserId]) -> dict[UserId, int]:
        """The versions of the stacks of those of these users who have one; one statement."""
        key = sa.tuple_(stacks.c.tenant, stacks.c.user_id)
        query = sa.select(stacks.c.tenant, stacks.c.user_id, stacks.c.version)
        query = query.where(key.in_([(user.tenant, user.id) for user in some]))
        with self.database.reading() as connection:
            return {UserId(tenant=row.tenant, id=row.user_id): row.version for row in connection.execute(query)}

    def read_history(self, user: UserId) -> tuple[HistoryItem, ...]:
        """All items; oldest first where they are dated."""
        with self.database.reading() as connection:
            lines = connection.execute(sa.select(histories.c.lines).where(_is(histories, user))).scalar()
        if lines is None:
            raise UnknownUser("no such user")
        return from_lines(lines)

    def page(self, tenant: str, *, after: str = "", limit: int = 100) -> list[UserState]:
        """The tenant's users by id, those after `after`."""
        query = _STATE.where(users.c.tenant == tenant, users.c.user_id > after).order_by(users.c.user_id).limit(limit)
        with self.database.reading() as connection:
            return self._states(connection.execute(query).all())

    def counts(self, tenant: str) -> Counts:
        """How much the tenant has; walks the tenant's part of the indexes, so not for every request."""
        with self.database.reading() as connection:
            found = [
                connection.execute(sa.select(sa.func.count()).select_from(table).where(table.c.tenant == tenant))
                for table in (users, stacks, stack_jobs)
            ]
            return Counts(
                **dict(zip(("users", "stacks", "waiting_stacks"), (f.scalar_one() for f in found), strict=True))
            )

    # ---- routes

    def set_route(self, user: UserId, route: UserRoute) -> None:
        """Keep a route. Raises Conflict where the history has changed since, or an anchor of it was retired."""
        if not self.set_routes([(user, route)]):
            with self.database.reading() as connection:
                raise self._gone_or_changed(connection, user)

    def set_routes(self, routes: Sequence[tuple[UserId, UserRoute]]) -> int:
        """Keep many routes in one transaction; users who are gone or whose history changed are passed over.

        How many were kept. Raises Conflict, and keeps none, where an anchor of one was retired meanwhile.
        """
        with self.database.writing() as connection:
            # 1. users first, anchors second, each in order: nobody waits in a circle
            names = {anchor for _, route in routes for anchor in route.anchors}
            keys = self._anchor_keys(connection, names)
            kept = []
            for user, route in sorted(routes, key=lambda pair: pair[0]):
                row = _route_row(route, keys)
                change = sa.update(users).where(_is(users, user), users.c.version == route.history_version).values(row)
                if connection.execute(change).rowcount:
                    kept.append((user, route))

            # 2. no anchor of these is retired before we are done
            self._hold(connection, (keys[anchor] for _, route in kept for anchor in route.anchors))

            # 3. the same, turned round
            for user, route in kept:
                connection.execute(sa.delete(citations).where(_is(citations, user)))
                rows = [{**_key(user), "anchor_key": keys[anchor]} for anchor in route.anchors]
                connection.execute(sa.insert(citations), rows)
        return len(kept)

    def citing(self, anchor: UserId, *, after: UserId | None = None, limit: int = 1000) -> list[UserState]:
        """Users of any tenant whose route names the anchor, in order, those after `after`: to be routed anew."""
        query = _STATE.join(
            citations, sa.and_(citations.c.tenant == users.c.tenant, citations.c.user_id == users.c.user_id)
        ).where(citations.c.anchor_key == sa.select(anchors.c.anchor_key).where(_is(anchors, anchor)).scalar_subquery())
        if after is not None:
            query = query.where(sa.tuple_(citations.c.tenant, citations.c.user_id) > (after.tenant, after.id))
        query = query.order_by(citations.c.tenant, citations.c.user_id).limit(limit)
        with self.database.reading() as connection:
            return self._states(connection.execute(query).all())

    def pages_citing(self, anchor: UserId, *, size: int = 1000) -> Iterator[list[UserState]]:
        """`citing`, page after page; pages may be routed anew while they come."""
        page = self.citing(anchor, limit=size)
        while page:
            yield page
            page = self.citing(anchor, after=page[-1].user, limit=size)

    # ---- stacks

    def put_stack(self, user: UserId, stack: UserStack) -> int:
        """Keep a stack in place of any older one; its version.

        A user who was deleted meanwhile is not made again. Raises Conflict where the stack was trained on items that
        are gone: on a history that was replaced since, or that of a deleted user of the same name.
        """
        with self.database.writing() as connection:
            version = put_stack_within(self.database, connection, user, stack)
            # One that is being trained would take its place: it is not wanted any more.
            connection.execute(sa.delete(stack_jobs).where(_is(stack_jobs, user)))
            return version

    def read_stack(self, user: UserId) -> UserStack | None:
        """The user's stack with its tensors; none where there is none, or no such user."""
        names = ("tensors", "kind", "rank", "scale", "base_fingerprint", "bank_version", "history_version", "version")
        with self.database.reading() as connection:
            row = connection.execute(sa.select(*(stacks.c[name] for name in names)).where(_is(stacks, user))).first()
        return None if row is None else UserStack(**row._mapping)

    def drop_stack(self, user: UserId) -> None:
        """Take the stack off; nothing where there is none."""
        with self.database.writing() as connection:
            connection.execute(sa.delete(stacks).where(_is(stacks, user)))

    # ---- the end

    def delete(self, user: UserId) -> bool:
        """Everything of the user gone, in one transaction; whether the user was an anchor, now out of service.

        A hash of the name stays, so that a bank that is being built does not bring the user back as an anchor.
        """
        with self.database.writing() as connection:
            was_there = connection.execute(sa.delete(users).where(_is(users, user))).rowcount  # the rest cascades
            was_anchor = retire_within(self.database, connection, user)
            if not was_there and not was_anchor:
                raise UnknownUser("no such user")
        self.database.forget_pages()
        return was_anchor

    # ---- how

    def _write_history(
        self,
        user: UserId,
        items: Sequence[HistoryItem],
        sums: ItemSum,
        task: str,
        expected_version: int | None,
        mode: Literal["append", "replace"],
    ) -> UserState:
        if sums.items != len(items):
            raise ValueError(f"the sum is of {sums.items} vectors, wanted one for each of the {len(items)} items")
        lines = to_lines(items)
        with self.database.writing() as connection:
            # 1. the row, ours until the end
            now_s = self.database.clock()
            row = None
            while row is None:  # PostgreSQL's insert that finds a row does not hold it: a deletion may be faster
                self.database.insert_missing(connection, users, {**_key(user), **_EMPTY, "task": task, **_made(now_s)})
                row = connection.execute(sa.select(users).where(_is(users, user)).with_for_update()).first()
            if expected_version is not None and expected_version != row.version:
                raise Conflict(f"the history has version {row.version}, expected {expected_version}; read it again")

            # 2. old and new
            old, digest, total, count = b"", b"", sums.total, 0
            if mode == "append" and row.items:
                if (row.task, row.encoder) != (task, sums.encoder):
                    raise Conflict(
                        f"the history is of task {row.task} and encoder {row.encoder}, the new items of {task} and "
                        f"{sums.encoder}; replace the history, or encode it again"
                    )
                old = connection.execute(sa.select(histories.c.lines).where(_is(histories, user))).scalar_one()
                digest, count = row.history_digest, row.items
                total = _vector(row.item_sum) + sums.total
            new = old + b"".join(lines)
            self._check_size(count + len(items), len(new))

            # 3. write
            version = next_version(row.version, now_s)
            values = {
                "task": task,
                "version": version,
                "valid_from": version if mode == "replace" or row.version == 0 else row.valid_from,
                "items": count + len(items),
                "history_bytes": len(new),
                "history_digest": _digest(digest, lines),
                "updated_at_s": now_s,
                **_sum_row(ItemSum(total=total, items=count + len(items), encoder=sums.encoder)),
            }
            if mode == "replace":
                values |= _NO_ROUTE
                connection.execute(sa.delete(citations).where(_is(citations, user)))
                connection.execute(sa.delete(stacks).where(_is(stacks, user)))
            connection.execute(sa.update(users).where(_is(users, user)).values(values))
            if not self.database.insert_missing(connection, histories, {**_key(user), "lines": new}):
                connection.execute(sa.update(histories).where(_is(histories, user)).values(lines=new))
            state = connection.execute(_STATE.where(_is(users, user))).one()
        return self._states([state])[0]

    def _check_size(self, items: int, size: int) -> None:
        if items > self.limits.items_max or size > self.limits.mib_max * 2**20:
            raise HistoryTooLong(
                f"the history would have {items} items and {size} bytes, allowed are {self.limits.items_max} items and "
                f"{self.limits.mib_max:g} MiB; replace it with fewer"
            )

    def _gone_or_changed(self, connection: sa.Connection, user: UserId) -> Exception:
        version = connection.execute(sa.select(users.c.version).where(_is(users, user))).scalar()
        return UnknownUser("no such user") if version is None else Conflict(f"the history has version {version} now")

    def _anchor_keys(self, connection: sa.Connection, names: set[UserId]) -> dict[UserId, int]:
        query = sa.select(anchors.c.anchor_key, anchors.c.tenant, anchors.c.user_id)
        pairs = [(name.tenant, name.id) for name in names]
        rows = connection.execute(query.where(sa.tuple_(anchors.c.tenant, anchors.c.user_id).in_(pairs))).all()
        found = {UserId(tenant=row.tenant, id=row.user_id): row.anchor_key for row in rows}
        if len(found) != len(names):
            raise ValueError(
                f"{len(names) - len(found)} anchors of the route stand in no published bank; publish it first"
            )
        return found

    def _hold(self, connection: sa.Connection, keys: Iterable[int]) -> None:
        """Keep these anchors in service until the transaction ends; Conflict where one is not."""
        held = sorted(set(keys))
        query = sa.select(anchors.c.anchor_key).where(anchors.c.anchor_key.in_(held), anchors.c.is_retired.is_(False))
        in_service = connection.execute(query.order_by(anchors.c.anchor_key).with_for_update(read=True)).scalars()
        if len(list(in_service)) != len(held):
            raise Conflict("an anchor of the route was retired; compute the route again")

    def _states(self, rows: Sequence[sa.Row[Any]]) -> list[UserState]:
        keys = [np.frombuffer(row.route_anchors or b"", "<i4").tolist() for row in rows]
        names = self._names.names(key for some in keys for key in some)
        return [_state(row, [names.get(key) for key in some]) for row, some in zip(rows, keys, strict=True)]


def put_stack_within(database: Database, connection: sa.Connection, user: UserId, stack: UserStack) -> int:
    """`UserStore.put_stack` within the caller's transaction."""
    lock = sa.select(users.c.valid_from).where(_is(users, user)).with_for_update(key_share=True)  # one at a time
    valid_from = connection.execute(lock).scalar()
    if valid_from is None:
        raise UnknownUser("no such user")
    if stack.history_version < valid_from:
        raise Conflict("the stack was trained on a history that was replaced since; train it again")
    now_s = database.clock()
    old = connection.execute(sa.delete(stacks).where(_is(stacks, user)).returning(stacks.c.version)).scalar()
    row = {name: getattr(stack, name) for name in _STACK_FIELDS}
    row |= {"version": next_version(old or 0, now_s), "bytes": len(stack.tensors), "created_at_s": now_s}
    connection.execute(sa.insert(stacks), {**_key(user), **row})
    return int(row["version"])


def next_version(last: int, now_s: float) -> int:
    """More than the last one and, being the time in microseconds, than any of a user of that name who was deleted."""
    return max(last + 1, int(now_s * 1e6))


_STACK_FIELDS = ("tensors", "kind", "rank", "scale", "base_fingerprint", "bank_version", "history_version")
_EMPTY = {
    "version": 0,
    "valid_from": 0,
    "items": 0,
    "history_bytes": 0,
    "history_digest": b"",
    "encoder": "",
    "sum_items": 0,
    "item_sum": b"",
}
_NO_ROUTE = {"route_bank": None, "route_version": None, "route_anchors": None, "route_weights": None}
_STATE = sa.select(users, stacks.c.version.label("stack_version"), stacks.c.bytes.label("stack_bytes")).select_from(
    users.outerjoin(stacks, sa.and_(stacks.c.tenant == users.c.tenant, stacks.c.user_id == users.c.user_id))
)


def _key(user: UserId) -> dict[str, str]:
    return {"tenant": user.tenant, "user_id": user.id}


def _is(table: sa.Table, user: UserId) -> sa.ColumnElement[bool]:
    return sa.and_(table.c.tenant == user.tenant, table.c.user_id == user.id)


def _new_row(new: NewUser, version: int, now_s: float, keys: dict[UserId, int]) -> dict[str, Any]:
    lines = to_lines(new.history)
    return {
        **_key(new.user),
        "task": new.task,
        "version": version,
        "valid_from": version,
        "items": len(lines),
        "history_bytes": sum(map(len, lines)),
        "history_digest": _digest(b"", lines),
        **_sum_row(new.item_sum),
        **(_NO_ROUTE if new.route is None else _route_row(new.route, keys) | {"route_version": version}),
        **_made(now_s),
    }


def _made(now_s: float) -> dict[str, float]:
    return {"created_at_s": now_s, "updated_at_s": now_s}


def _digest(before: bytes, lines: Sequence[bytes]) -> bytes:
    """A chain over the items: appending needs none of those before."""
    for line in lines:
        before = hashlib.sha256(before + line).digest()
    return before


def _vector(packed: bytes) -> np.ndarray:
    return np.frombuffer(packed, "<f4").astype(np.float32)


def _sum_row(total: ItemSum) -> dict[str, Any]:
    return {
        "item_sum": np.asarray(total.total, "<f4").tobytes(),
        "sum_items": total.items,
        "encoder": total.encoder,
    }


def _route_row(route: UserRoute, keys: dict[UserId, int]) -> dict[str, Any]:
    return {
        "route_bank": route.bank_version,
        "route_version": route.history_version,
        "route_anchors": np.array([keys[anchor] for anchor in route.anchors], "<i4").tobytes(),
        "route_weights": np.array(route.weights, "<f4").tobytes(),
    }


def _state(row: sa.Row[Any], names: list[UserId | None]) -> UserState:
    known = [name for name in names if name is not None]
    route = None
    if known and len(known) == len(names):
        route = UserRoute(
            anchors=tuple(known),
            weights=tuple(np.frombuffer(row.route_weights, "<f4").tolist()),
            bank_version=row.route_bank,
            history_version=row.route_version,
        )
    return UserState(
        user=UserId(tenant=row.tenant, id=row.user_id),
        task=row.task,
        version=row.version,
        items=row.items,
        history_bytes=row.history_bytes,
        history_digest=row.history_digest.hex(),
        item_sum=ItemSum(total=_vector(row.item_sum), items=row.sum_items, encoder=row.encoder),
        route=route,
        stack_version=row.stack_version,
        stack_bytes=row.stack_bytes or 0,
        created_at_s=row.created_at_s,
        updated_at_s=row.updated_at_s,
    )
