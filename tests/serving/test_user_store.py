"""Users in SQL, on SQLite and on PostgreSQL: what is written is read, by its tenant alone, whole or not at all."""

from __future__ import annotations

import hashlib
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from mta_ray.lamp.users import HistoryItem
from mta_ray.serving.banks import Banks, NewBank
from mta_ray.serving.database import Database, DatabaseConfig, open_database
from mta_ray.serving.identity import UserId
from mta_ray.serving.stack_queue import LeaseLost, StackQueue
from mta_ray.serving.tables import citations, metadata, users
from mta_ray.serving.user_state import ItemSum, UserRoute, UserStack, to_lines
from mta_ray.serving.user_store import Conflict, HistoryLimits, HistoryTooLong, NewUser, UnknownUser, UserStore

DIM = 8
ANA = UserId(tenant="acme", id="ana")
NEWEST = 2**62
"""A version after every history."""
NAMES = [
    "ana",
    "../../etc/passwd",
    "名前 😀",
    "'; DROP TABLE users; --",
    "e\u0301",
    "é",
    "%",
    " ",
    "a" * 256,
    "😀" * 256,
]


@pytest.fixture
def store(database: Database) -> UserStore:
    return UserStore(database)


def items(count: int, start: int = 0) -> list[HistoryItem]:
    return [HistoryItem(id=f"i{n}", content=f'film "{n}"\n\0', target="ça 😀") for n in range(start, start + count)]


def vectors(some: Sequence[HistoryItem], encoder: str = "e1") -> ItemSum:
    """The sum of one vector an item, each drawn from the item's id."""
    total = np.zeros(DIM, dtype=np.float32)
    for item in some:
        total += np.random.default_rng(int(item.id[1:])).standard_normal(DIM).astype(np.float32)
    return ItemSum(total=total, items=len(some), encoder=encoder)


def add(store: UserStore, user: UserId, some: Sequence[HistoryItem], **more: Any) -> Any:
    return store.append_history(user, some, vectors(some), **{"task": "movie_tagging", **more})


def anchors(count: int = 3) -> tuple[UserId, ...]:
    return tuple(UserId(tenant="lamp", id=f"anchor {n}") for n in range(count))


def publish(database: Database, version: str = "b1", names: Sequence[UserId] | None = None) -> None:
    names = anchors() if names is None else names
    new = NewBank(version=version, path="/b", hash=version, base_fingerprint="f", encoder="e1", anchors=tuple(names))
    Banks(database).publish(new)


def route(version: int, *names: UserId, bank: str = "b1") -> UserRoute:
    weights = tuple(float(np.float32(1 / (n + 2))) for n in range(len(names)))
    return UserRoute(anchors=names, weights=weights, bank_version=bank, history_version=version)


def stack(version: int = NEWEST, tensors: bytes = b"\0\xffsafe") -> UserStack:
    return UserStack(
        tensors=tensors,
        kind="lora",
        rank=1,
        scale=2.0,
        base_fingerprint="f",
        bank_version="b1",
        history_version=version,
    )


def rows_naming(database: Database, user: UserId) -> list[str]:
    """Tables that hold a row of the user's name."""
    found = []
    with database.reading() as connection:
        for table in metadata.tables.values():
            if "user_id" in table.c:
                is_users = (table.c.tenant == user.tenant) & (table.c.user_id == user.id)
                if connection.execute(sa.select(table).where(is_users)).first():
                    found.append(table.name)
    return sorted(found)


# ---- histories


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_read(store: UserStore, clock: Any, name: str) -> None:
    user = UserId(tenant="acme", id=name)
    wrote = add(store, user, items(3))
    clock.now_s += 5
    wrote = add(store, user, items(2, start=3))
    state = store.read(user)
    assert store.read_history(user) == tuple(items(5))
    assert (state.user, state.task, state.items, state.version) == (user, "movie_tagging", 5, wrote.version)
    assert state.history_bytes == sum(map(len, to_lines(items(5))))
    assert state.updated_at_s - state.created_at_s == 5
    assert state.route is None and state.stack_version is None and state.stack_bytes == 0
    assert [other.user for other in store.page("acme")] == [user]


def test_appending_in_parts_is_writing_at_once(store: UserStore) -> None:
    """The law of the running sum: the same mean and the same digest, whatever the parts."""
    whole, parts = UserId(tenant="t", id="whole"), UserId(tenant="t", id="parts")
    at_once = add(store, whole, items(7))
    for start, count in ((0, 1), (1, 4), (5, 0), (5, 2)):
        in_parts = add(store, parts, items(count, start))
    np.testing.assert_allclose(in_parts.item_sum.mean, at_once.item_sum.mean, rtol=1e-6)
    np.testing.assert_allclose(at_once.item_sum.mean, vectors(items(7)).total / 7, rtol=1e-6)
    assert in_parts.history_digest == at_once.history_digest
    assert store.read_history(parts) == store.read_history(whole)
    other = add(store, UserId(tenant="t", id="other order"), items(7)[::-1])
    assert other.history_digest != at_once.history_digest


def test_dated_items_come_oldest_first(store: UserStore) -> None:
    dated = [HistoryItem(id=f"i{n}", content="", target="", date=f"2024-01-0{n}") for n in (3, 1, 2)]
    add(store, ANA, dated)
    assert [item.id for item in store.read_history(ANA)] == ["i1", "i2", "i3"]
    add(store, ANA, [HistoryItem(id="i9", content="", target="")])
    assert [item.id for item in store.read_history(ANA)] == ["i3", "i1", "i2", "i9"]


def test_a_version_that_was_not_expected_is_a_conflict_and_changes_nothing(store: UserStore) -> None:
    with pytest.raises(Conflict):
        add(store, ANA, items(1), expected_version=7)
    with pytest.raises(UnknownUser):
        store.read(ANA)
    first = add(store, ANA, items(1), expected_version=0).version
    second = add(store, ANA, items(1, 1), expected_version=first).version
    assert second > first
    for version in (0, first):
        with pytest.raises(Conflict):
            add(store, ANA, items(1, 2), expected_version=version)
    assert store.read_history(ANA) == tuple(items(2))


def test_other_tasks_and_encoders_do_not_mix(store: UserStore) -> None:
    version = add(store, ANA, items(2)).version
    with pytest.raises(Conflict, match="task"):
        add(store, ANA, items(1, 2), task="product_rating")
    with pytest.raises(Conflict, match="encoder"):
        store.append_history(ANA, items(1, 2), vectors(items(1, 2), "e2"), task="movie_tagging")
    with pytest.raises(ValueError, match="one for each"):
        store.append_history(ANA, items(2, 2), vectors(items(1)), task="movie_tagging")

    store.reembed(ANA, vectors(items(2), "e2"), version=version)
    store.append_history(ANA, items(1, 2), vectors(items(1, 2), "e2"), task="movie_tagging")
    assert store.read(ANA).item_sum.encoder == "e2"
    with pytest.raises(Conflict):
        store.reembed(ANA, vectors(items(2)), version=version)
    with pytest.raises(UnknownUser):
        store.reembed(UserId(tenant="acme", id="bo"), vectors(items(2)), version=version)


def test_a_replaced_history_leaves_nothing_that_was_made_of_the_old_one(store: UserStore, database: Database) -> None:
    publish(database)
    version = add(store, ANA, items(2)).version
    store.set_route(ANA, route(version, *anchors()))
    store.put_stack(ANA, stack())
    kept = add(store, ANA, items(1, 2))  # appending keeps both
    assert kept.route is not None and kept.stack_version is not None
    assert not kept.has_route_for("b1")

    new = store.replace_history(ANA, items(1, 9), vectors(items(1, 9)), task="product_rating")
    assert (new.task, new.items, new.route, new.stack_version) == ("product_rating", 1, None, None)
    assert store.read_history(ANA) == tuple(items(1, 9))
    assert store.read_stack(ANA) is None
    assert rows_naming(database, ANA) == ["histories", "users"]
    np.testing.assert_allclose(new.item_sum.mean, vectors(items(1, 9)).total, rtol=1e-6)
    nothing = store.replace_history(ANA, [], vectors([]), task="product_rating")
    assert nothing.items == 0 and not nothing.item_sum.mean.any()
    assert store.read_history(ANA) == ()


def test_a_history_has_an_end(database: Database) -> None:
    store = UserStore(database, HistoryLimits(items_max=3, mib_max=1000 / 2**20))
    add(store, ANA, items(3))
    with pytest.raises(HistoryTooLong, match="4 items"):
        add(store, ANA, items(1, 3))
    large = [HistoryItem(id="i1", content="x" * 1000, target="")]
    with pytest.raises(HistoryTooLong, match="bytes"):
        store.replace_history(ANA, large, vectors(large), task="movie_tagging")
    assert store.read_history(ANA) == tuple(items(3))


# ---- tenants


def test_a_tenant_never_meets_another_tenants_user_of_the_same_name(store: UserStore, database: Database) -> None:
    publish(database)
    other = UserId(tenant="other", id=ANA.id)
    version = add(store, ANA, items(1)).version
    for read in (store.read, store.read_history, store.delete, StackQueue(database).enqueue):
        with pytest.raises(UnknownUser):
            read(other)
    with pytest.raises(UnknownUser):
        store.set_route(other, route(version, *anchors()))
    with pytest.raises(UnknownUser):
        store.put_stack(other, stack())
    assert store.read_stack(other) is None and store.page("other") == []
    assert rows_naming(database, other) == []

    add(store, other, items(2, 5))
    store.put_stack(other, stack(tensors=b"theirs"))
    store.delete(ANA)
    assert store.read_history(other) == tuple(items(2, 5))
    assert (store.counts("acme").users, store.counts("other").users, store.counts("other").stacks) == (0, 1, 1)


def test_pages_and_counts(store: UserStore, database: Database) -> None:
    for n in range(5):
        add(store, UserId(tenant="t", id=f"u{n}"), items(1))
    StackQueue(database).enqueue(UserId(tenant="t", id="u1"))
    assert [s.user.id for s in store.page("t", limit=2)] == ["u0", "u1"]
    assert [s.user.id for s in store.page("t", after="u1", limit=9)] == ["u2", "u3", "u4"]
    assert store.counts("t").users == 5 and store.counts("t").waiting_stacks == 1


@pytest.mark.parametrize("name", ["", "a" * 257, "a\0b", "\ud800", "a\udfff"])
def test_a_name_that_no_database_can_hold_is_refused_without_being_told(name: str) -> None:
    with pytest.raises(ValueError) as told:
        UserId(tenant="acme", id=name)
    assert not name or name not in str(told.value)


# ---- routes


def test_a_route_is_read_by_name_and_turned_round(store: UserStore, database: Database) -> None:
    publish(database)
    first, second, third = anchors()
    version = add(store, ANA, items(1)).version
    wanted = route(version, third, first)
    store.set_route(ANA, wanted)
    state = store.read(ANA)
    assert state.route == wanted
    assert state.has_route_for("b1") and not state.has_route_for("b2")
    assert [s.user for s in store.citing(third)] == [ANA] and store.citing(second) == []
    store.set_route(ANA, route(version, second))
    assert store.citing(third) == [] and [s.user for s in store.citing(second)] == [ANA]
    # another store, which has read no anchor yet, reads the same
    assert UserStore(database).read(ANA).route == route(version, second)


def test_a_route_of_an_old_history_or_an_unknown_anchor_is_refused(store: UserStore, database: Database) -> None:
    publish(database)
    version = add(store, ANA, items(1)).version
    add(store, ANA, items(1, 1))
    with pytest.raises(Conflict):
        store.set_route(ANA, route(version, *anchors()))
    with pytest.raises(ValueError, match="no published bank"):
        store.set_route(ANA, route(store.read(ANA).version, UserId(tenant="lamp", id="nobody")))
    for wrong in ({"weights": (0.5,)}, {"weights": (0.5, float("nan"))}, {"anchors": (ANA, ANA)}):
        with pytest.raises(ValueError):
            UserRoute(
                **{"anchors": anchors(2), "weights": (0.5, 0.5), "bank_version": "b", "history_version": 1} | wrong
            )
    assert store.read(ANA).route is None and rows_naming(database, ANA) == ["histories", "users"]


def test_users_who_cite_a_retired_anchor_are_routed_anew_in_pages(store: UserStore, database: Database) -> None:
    publish(database)
    gone, *rest = anchors()
    cite = [UserId(tenant=f"t{n % 3}", id=f"u{n}") for n in range(11)]
    for n, user in enumerate(cite):
        names = (gone, rest[0]) if n % 2 == 0 else (rest[0], rest[1])
        store.set_route(user, route(add(store, user, items(1)).version, *names))
    assert Banks(database).retire(gone)

    seen = []
    for page in store.pages_citing(gone, size=2):
        seen += [state.user for state in page]
        assert store.set_routes([(s.user, route(s.version, *rest)) for s in page]) == len(page)
    assert seen == sorted(cite[::2])
    assert store.citing(gone) == []
    assert all(gone not in store.read(user).route.anchors for user in cite)


def test_a_route_through_a_retired_anchor_is_refused_with_its_whole_batch(store: UserStore, database: Database) -> None:
    publish(database)
    gone, other, _ = anchors()
    bo = UserId(tenant="acme", id="bo")
    versions = {user: add(store, user, items(1)).version for user in (ANA, bo)}
    Banks(database).retire(gone)
    with pytest.raises(Conflict, match="retired"):
        store.set_routes([(ANA, route(versions[ANA], other)), (bo, route(versions[bo], gone, other))])
    assert store.read(ANA).route is None and store.read(bo).route is None
    stale = route(versions[bo] - 1, other)
    assert store.set_routes([(ANA, route(versions[ANA], other)), (bo, stale)]) == 1
    assert store.set_routes([]) == 0


def test_a_bulk_load_is_adding_one_by_one_and_passes_over_who_is_there(store: UserStore, database: Database) -> None:
    publish(database)
    histories = {f"u{n}": items(n % 4 + 1, 10 * n) for n in range(50)}
    routes = {name: route(0, *anchors()[: n % 4]) for n, name in enumerate(histories) if n % 4}
    add(store, UserId(tenant="bulk", id="u7"), items(2, 900))  # there before, and untouched
    new = [
        NewUser(
            user=UserId(tenant="bulk", id=name),
            task="movie_tagging",
            history=some,
            item_sum=vectors(some),
            route=routes.get(name),
        )
        for name, some in histories.items()
    ]
    with pytest.raises(ValueError, match="twice"):
        store.add_users([*new[:3], new[1]])
    assert (store.add_users([]), store.add_users(new[:20]), store.add_users(new)) == (0, 19, 30)

    for name, some in histories.items():
        one = UserId(tenant="single", id=name)
        state = add(store, one, some)
        if name in routes:
            store.set_route(one, replace(routes[name], history_version=state.version))
        found = store.read(UserId(tenant="bulk", id=name))
        if name == "u7":
            assert (found.items, found.route) == (2, None)
            continue
        wanted = store.read(one)
        assert found.has_route_for("b1") == wanted.has_route_for("b1") == (name in routes)
        moments = {"user": one, "version": 0, "created_at_s": 0.0, "updated_at_s": 0.0}
        routed = {"route": found.route and replace(found.route, history_version=wanted.version)}
        assert repr(replace(found, **moments, **routed)) == repr(replace(wanted, **moments))
        np.testing.assert_array_equal(found.item_sum.total, wanted.item_sum.total)
        assert store.read_history(found.user) == store.read_history(one)
    for anchor in anchors():
        citing = [state.user for state in store.citing(anchor)]
        cited = {tenant: {user.id for user in citing if user.tenant == tenant} for tenant in ("bulk", "single")}
        assert cited["bulk"] == cited["single"] - {"u7"} and cited["bulk"]


def test_a_bulk_load_through_a_retired_anchor_adds_nobody(store: UserStore, database: Database) -> None:
    publish(database)
    store.delete(anchors()[1])
    some = items(1)
    new = [
        NewUser(user=UserId(tenant="t", id=f"u{n}"), task="x", history=some, item_sum=vectors(some), route=route(0, a))
        for n, a in enumerate(anchors())
    ]
    with pytest.raises(Conflict, match="retired"):
        store.add_users(new)
    assert store.counts("t").users == 0


def test_routes_and_their_reverse_agree_after_anything(store: UserStore, database: Database) -> None:
    publish(database)
    dice = random.Random(0)
    some = [UserId(tenant=tenant, id=f"u{n}") for tenant in "ab" for n in range(3)]
    for step in range(80):
        user = dice.choice(some)
        act = dice.choice(["append", "route", "route", "replace", "delete"])
        try:
            if act == "append":
                add(store, user, items(1, step))
            elif act == "replace":
                store.replace_history(user, items(1), vectors(items(1)), task="movie_tagging")
            elif act == "delete":
                store.delete(user)
            else:
                names = dice.sample(anchors(), dice.randint(1, 3))
                store.set_route(user, route(store.read(user).version, *names))
        except UnknownUser:
            pass
    states = [state for tenant in "ab" for state in store.page(tenant)]
    for anchor in anchors():
        cite = sorted(s.user for s in states if s.route and anchor in s.route.anchors)
        assert [s.user for s in store.citing(anchor)] == cite
    with database.reading() as connection:
        count = connection.execute(sa.select(sa.func.count()).select_from(citations)).scalar()
    assert count == sum(len(s.route.anchors) for s in states if s.route)


# ---- stacks


def test_a_stack_is_kept_byte_for_byte_under_a_version_that_never_repeats(store: UserStore, clock: Any) -> None:
    version = add(store, ANA, items(1)).version
    assert store.read_stack(ANA) is None
    first = store.put_stack(ANA, stack(version))
    read = store.read_stack(ANA)
    assert read is not None and (read.tensors, read.version, read.scale, read.rank) == (b"\0\xffsafe", first, 2.0, 1)
    assert (store.read(ANA).stack_version, store.read(ANA).stack_bytes) == (first, 6)
    second = store.put_stack(ANA, stack(version, b"new"))
    assert second > first and store.read_stack(ANA).tensors == b"new"
    store.drop_stack(ANA)
    assert store.read(ANA).stack_version is None

    clock.now_s += 1e-5
    store.delete(ANA)
    clock.now_s += 1e-5
    again = add(store, ANA, items(1)).version
    assert again > version
    assert store.put_stack(ANA, stack(again)) > second


def test_a_stack_that_is_sent_ends_the_training_of_another(store: UserStore, database: Database) -> None:
    version = add(store, ANA, items(2)).version
    queue = StackQueue(database)
    queue.enqueue(ANA)
    (job,) = queue.claim(1)
    sent = store.put_stack(ANA, stack(version, b"sent"))
    with pytest.raises(LeaseLost):
        queue.finish(job, stack(version, b"trained"))
    found = store.read_stack(ANA)
    assert (found.tensors, found.version, queue.status(ANA)) == (b"sent", sent, "none")


def test_stacks_of_one_user_at_once_are_kept_one_after_the_other(store: UserStore) -> None:
    version = add(store, ANA, items(2)).version
    with ThreadPoolExecutor(8) as pool:
        versions = list(pool.map(lambda n: store.put_stack(ANA, stack(version, bytes([n]))), range(40)))
    found = store.read_stack(ANA)
    assert len(set(versions)) == 40
    assert (found.version, found.tensors) == (max(versions), bytes([versions.index(max(versions))]))


def test_a_stack_of_items_that_are_gone_is_refused(store: UserStore, clock: Any) -> None:
    first = add(store, ANA, items(2)).version
    grown = add(store, ANA, items(1, 2)).version
    store.put_stack(ANA, stack(first))  # items were only added since
    replaced = store.replace_history(ANA, items(1, 5), vectors(items(1, 5)), task="movie_tagging").version
    with pytest.raises(Conflict, match="replaced"):
        store.put_stack(ANA, stack(grown))
    store.put_stack(ANA, stack(replaced))
    clock.now_s += 1
    store.delete(ANA)
    add(store, ANA, items(1))
    with pytest.raises(Conflict):  # trained on the history of somebody who had this name before
        store.put_stack(ANA, stack(replaced))
    assert store.read(ANA).stack_version is None


# ---- the end


def test_a_deleted_user_is_gone_from_everywhere(store: UserStore, database: Database) -> None:
    publish(database)
    version = add(store, ANA, items(3)).version
    store.set_route(ANA, route(version, *anchors()))
    store.put_stack(ANA, stack())
    StackQueue(database).enqueue(ANA)
    assert rows_naming(database, ANA) == ["citations", "histories", "stack_jobs", "stacks", "users"]
    assert store.delete(ANA) is False
    assert rows_naming(database, ANA) == []
    for act in (store.read, store.read_history, store.delete, StackQueue(database).enqueue):
        with pytest.raises(UnknownUser):
            act(ANA)
    with pytest.raises(UnknownUser):
        store.put_stack(ANA, stack())  # a stack that was being trained does not bring the user back
    assert store.read_stack(ANA) is None and StackQueue(database).claim(9) == []


def test_a_deleted_user_is_gone_from_the_file_too(tmp_path: Path) -> None:
    database = open_database(DatabaseConfig(url=str(tmp_path / "users.db")))
    store = UserStore(database)
    secret = "my very own words"
    user = UserId(tenant="acme", id="somebody-by-name")
    add(store, user, [HistoryItem(id=f"i{n}", content=f"{n} {secret}" * 50, target="") for n in range(50)])
    store.put_stack(user, stack(tensors=b"the weights" * 999))
    traces = (secret.encode(), b"somebody-by-name", b"the weights")
    assert all(trace in on_disk(tmp_path) for trace in traces)
    store.delete(user)
    assert not any(trace in on_disk(tmp_path) for trace in traces)
    database.close()


def on_disk(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.iterdir()))


def test_the_file_is_its_owners_alone(tmp_path: Path) -> None:
    database = open_database(DatabaseConfig(url=str(tmp_path / "users.db")))
    add(UserStore(database), ANA, items(1))
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
    database.close()


def test_an_anchor_who_is_deleted_leaves_the_bank(store: UserStore, database: Database) -> None:
    anchor = anchors()[1]
    publish(database)
    Banks(database).activate("b1")
    version = add(store, ANA, items(1)).version
    store.set_route(ANA, route(version, *anchors()))
    before = Banks(database).state().generation

    assert store.delete(anchor) is True  # known to the bank alone: its history came from elsewhere
    bank = Banks(database).active()
    assert bank is not None and bank.retired_slots == {1} and bank.needs_rebuild
    assert Banks(database).state().generation > before
    assert [state.user for state in store.citing(anchor)] == [ANA]
    with pytest.raises(UnknownUser):
        store.delete(anchor)


def test_an_error_tells_nothing_of_what_a_user_wrote(store: UserStore, database: Database) -> None:
    with pytest.raises(sa.exc.DBAPIError) as told, database.writing() as connection:
        connection.execute(sa.insert(users), {"tenant": "acme", "user_id": "a secret name"})
    assert "secret" not in str(told.value)


# ---- many at once


def test_appends_of_many_threads_and_processes_are_all_kept(
    store: UserStore, database: Database, run_python: Callable[..., Any]
) -> None:
    code = """
import sys; sys.path.insert(0, sys.argv[2])
from test_user_store import *
store = UserStore(open_database(DatabaseConfig(url=sys.argv[1], busy_timeout_s=60.0)))
for n in range(10):
    add(store, ANA, items(1, int(sys.argv[3]) + n))
"""
    processes = [run_python(code, str(Path(__file__).parent), str(start)) for start in (100, 200)]
    threads = [
        threading.Thread(target=lambda start=start: [add(store, ANA, items(1, start + n)) for n in range(10)])
        for start in (300, 400, 500)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for process in processes:
        assert process.wait(timeout=600) == 0, process.stderr.read()

    history = store.read_history(ANA)
    assert sorted(item.id for item in history) == sorted(f"i{s + n}" for s in range(100, 501, 100) for n in range(10))
    for start in range(100, 501, 100):  # and each writer's own are in its order
        own = [item.id for item in history if item.id.startswith(f"i{start // 100}")]
        assert own == [f"i{start + n}" for n in range(10)]
    check_whole(store, ANA)


def test_one_of_two_who_expect_the_same_version_wins(store: UserStore) -> None:
    version = add(store, ANA, items(1)).version
    outcomes = []

    def write(n: int) -> None:
        try:
            add(store, ANA, items(1, n), expected_version=version)
            outcomes.append("kept")
        except Conflict:
            outcomes.append("conflict")

    threads = [threading.Thread(target=write, args=(n,)) for n in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["conflict"] * 5 + ["kept"]
    assert store.read(ANA).items == 2


def test_routing_and_deleting_at_once_neither_blocks_nor_leaves_a_trace(store: UserStore, database: Database) -> None:
    """Batches of routes, deletions of anchors who are routed themselves, and retirements, against each other."""
    names = [UserId(tenant="lamp", id=f"a{n}") for n in range(8)]
    publish(database, names=names)
    for name in names:
        add(store, name, items(1))
    errors = []

    def work(seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(15):
            try:
                states = [state for state in store.page("lamp") if dice.random() < 0.8]
                dice.shuffle(states)
                store.set_routes([(s.user, route(s.version, *dice.sample(names, 3))) for s in states])
            except Conflict:
                pass
            except Exception as error:  # noqa: BLE001
                errors.append(error)

    def remove(some: list[UserId]) -> None:
        for name in some:
            try:
                time.sleep(0.02)
                store.delete(name)
            except Exception as error:  # noqa: BLE001
                errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    threads += [threading.Thread(target=remove, args=(some,)) for some in (names[:3], names[3:5])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    assert errors == []
    assert not any(thread.is_alive() for thread in threads)
    assert Banks(database).get("b1").retired_slots == {0, 1, 2, 3, 4}
    for name in names[:5]:
        assert rows_naming(database, name) == ["anchors"]


def test_a_route_set_while_its_anchor_is_retired_does_not_slip_through(store: UserStore, database: Database) -> None:
    """Whoever asks who cites the anchor after `retire` returned sees every route that was ever kept."""
    names = [UserId(tenant="lamp", id=f"a{n}") for n in range(12)]
    publish(database, names=names)
    version = add(store, ANA, items(1)).version
    for name in names:
        kept = []

        def write(name: UserId = name, kept: list[bool] = kept) -> None:
            try:
                store.set_route(ANA, route(version, name))
                kept.append(True)
            except Conflict:
                kept.append(False)

        thread = threading.Thread(target=write)
        thread.start()
        Banks(database).retire(name)
        found = [state.user for state in store.citing(name)]
        thread.join()
        assert found == ([ANA] if kept == [True] else [])


# ---- kill -9


@pytest.mark.parametrize("seed", range(3))
def test_a_writer_that_is_killed_leaves_a_whole_store(
    store: UserStore, database: Database, run_python: Callable[..., Any], seed: int
) -> None:
    publish(database)
    code = """
import sys; sys.path.insert(0, sys.argv[2])
from test_user_store import *
database = open_database(DatabaseConfig(url=sys.argv[1], busy_timeout_s=60.0))
store = UserStore(database)
print("ready", flush=True)
for n in range(100_000):
    user = UserId(tenant="t", id=f"u{n % 3}")
    state = add(store, user, items(20, n))
    store.set_route(user, route(state.version, *anchors()[n % 2:]))
    store.put_stack(user, stack(state.version, bytes([n % 251]) * 300_000))
    if n % 7 == 6:
        store.delete(user)
    print(n, flush=True)
"""
    process = run_python(code, str(Path(__file__).parent))
    assert process.stdout.readline() == "ready\n"
    process.stdout.readline()
    time.sleep(random.Random(seed).uniform(0.05, 0.3))
    process.kill()
    done = process.stdout.read().split()
    process.wait()

    if database.is_sqlite:
        with sqlite3.connect(database.engine.url.database) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
    for state in store.page("t"):
        check_whole(store, state.user)
        kept = store.read_stack(state.user)
        assert kept is None or (len(kept.tensors) == 300_000 and len(set(kept.tensors)) == 1)
    cited = {anchor: {s.user for s in store.page("t") if s.route and anchor in s.route.anchors} for anchor in anchors()}
    assert cited == {anchor: {s.user for s in store.citing(anchor)} for anchor in anchors()}
    last = int(done[-1]) if done else 0
    if last % 7 != 6:  # what was acknowledged is there
        assert f"i{last}" in {item.id for item in store.read_history(UserId(tenant="t", id=f"u{last % 3}"))}
    add(store, UserId(tenant="t", id="u0"), items(1))  # and nobody waits for the dead


def check_whole(store: UserStore, user: UserId) -> None:
    """The row of a user fits the history, bit by bit."""
    state, lines = store.read(user), to_lines(store.read_history(user))
    digest = b""
    for line in lines:
        digest = hashlib.sha256(digest + line).digest()
    assert (state.items, state.history_bytes, state.history_digest) == (len(lines), sum(map(len, lines)), digest.hex())
    assert state.item_sum.items == len(lines)
    np.testing.assert_allclose(state.item_sum.total, vectors(store.read_history(user)).total, rtol=1e-4, atol=1e-4)


# ---- no full scans

USERS = 100_000
MANY = {"users", "histories", "stacks", "stack_jobs", "citations", "retired_anchors", "keys"}
"""Tables that grow with users. The banks' are small, and a planner may well read them through."""


def test_no_hot_query_scans_a_table_of_100_000_users(store: UserStore, database: Database) -> None:
    names = anchors(50)
    publish(database, names=names)
    Banks(database).activate("b1")
    fill(database)
    user, gone = UserId(tenant="t3", id="u00503"), names[0]
    queue, bank_list = StackQueue(database), Banks(database)
    seen: list[tuple[str, Any]] = []

    def record(connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        seen.append((statement, parameters[0] if many else parameters))

    sa.event.listen(database.engine, "before_cursor_execute", record)
    version = store.read(user).version
    version = add(store, user, items(1)).version
    store.set_routes([(user, route(version, *names[1:5]))])
    store.put_stack(user, stack(version))
    store.read_stack(user)
    store.read_history(user)
    store.page("t3", after="u00503", limit=10)
    cited = store.citing(gone, limit=10)
    store.citing(gone, after=cited[-1].user, limit=10)
    queue.enqueue(user)
    queue.status(user)
    job, *_ = queue.claim(8)
    queue.renew(job)
    queue.finish(job, stack(version))
    bank_list.state()
    bank_list.active()
    store.delete(user)
    bank_list.retire(names[2])
    bank_list.is_retired(gone)
    sa.event.remove(database.engine, "before_cursor_execute", record)

    assert len(cited) == 10 and len(seen) > 40
    told = {}
    with database.reading() as connection:
        for statement, parameters in seen:
            if statement.split()[0] in ("SELECT", "INSERT", "UPDATE", "DELETE"):
                how = "EXPLAIN QUERY PLAN " if database.is_sqlite else "EXPLAIN "
                for row in connection.exec_driver_sql(how + statement, parameters):
                    told.setdefault(statement, []).append(str(row[-1]))
    scans = [(table, statement) for statement, plan in told.items() for line in plan for table in scanned(line)]
    assert [scan for scan in scans if scan[0] in MANY] == []
    assert any("SELECT" in statement for statement in told)


def test_the_check_of_plans_sees_a_scan(store: UserStore, database: Database) -> None:
    add(store, ANA, items(1))
    how = "EXPLAIN QUERY PLAN " if database.is_sqlite else "EXPLAIN "
    with database.reading() as connection:
        plan = connection.exec_driver_sql(how + "SELECT * FROM users WHERE task = 'x'").all()
    assert "users" in {table for row in plan for table in scanned(str(row[-1]))}


def scanned(line: str) -> list[str]:
    """Tables that a line of a query plan reads from end to end, or sorts."""
    words = line.replace("->", " ").split()
    if words[0] == "SCAN":
        return [words[1]]
    if "Seq Scan on" in line:
        return [words[words.index("on") + 1]]
    return []


def fill(database: Database) -> None:
    """USERS users of ten tenants, each citing four of 50 anchors, each tenth with a job and a stack; analysed."""
    n, user = (
        f"WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < {USERS - 1})",
        "'t' || (i % 10)",
    )
    user += ", 'u' || substr('' || (100000 + i), 2)"
    empty = "x''" if database.is_sqlite else "''::bytea"
    zeros = f"x'{'00' * 4 * DIM}'" if database.is_sqlite else f"decode('{'00' * 4 * DIM}', 'hex')"
    random_bytes = "randomblob(32)" if database.is_sqlite else "sha256(('' || i)::bytea)"
    users_of_ten = (
        "tenant, user_id, task, version, valid_from, items, history_bytes, history_digest, encoder, sum_items, item_sum"
    )
    statements = [
        f"INSERT INTO users ({users_of_ten}, created_at_s, updated_at_s) "
        f"{n} SELECT {user}, 'movie_tagging', 1, 1, 0, 0, {empty}, 'e1', 0, {zeros}, 0, 0 FROM n",
        f"INSERT INTO histories {n} SELECT {user}, {empty} FROM n",
        *(
            f"INSERT INTO citations {n} SELECT {user}, (i * 7 + {k} * 11) % 50 + 1 FROM n"  # its four anchors differ
            for k in range(4)
        ),
        "INSERT INTO stack_jobs (tenant, user_id, history_version, asked_at_s, ready_at_s, attempts) "
        f"{n} SELECT {user}, 1, 0, i, 0 FROM n WHERE i % 10 = 3",
        "INSERT INTO stacks (tenant, user_id, version, kind, rank, scale, base_fingerprint, bank_version, "
        "history_version, bytes, created_at_s, tensors) "
        f"{n} SELECT {user}, 1, 'lora', 1, 1, 'f', 'b1', 1, 1, 0, {empty} FROM n WHERE i % 10 = 3",
        f"INSERT INTO retired_anchors {n} SELECT {random_bytes}, 0 FROM n WHERE i < 10000",
    ]
    with database.engine.connect() as connection:
        if not database.is_sqlite:
            connection.exec_driver_sql("SET LOCAL session_replication_role = replica")  # foreign keys are not checked
        for statement in statements:
            connection.execute(sa.text(statement.replace(":", "\\:")))
        connection.commit()
        connection.exec_driver_sql("ANALYZE")
        connection.commit()
