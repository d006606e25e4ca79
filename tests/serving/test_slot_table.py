"""The slot table against a slow model that keeps one plain list and looks through all of it."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mta_ray.serving.slot_table import NoFreeSlot, SlotTable, StackKey

SLOTS = 3
KEYS = st.builds(
    StackKey, tenant=st.sampled_from(["a", "b"]), user=st.sampled_from(["u", "v", "w"]), version=st.integers(1, 2)
)


class Slow:
    """Entries [key, slot, pins, forgotten], least recently used first."""

    def __init__(self) -> None:
        self.entries: list[list] = []

    def find(self, key):
        return next((e for e in self.entries if e[0] == key and not e[3]), None)

    def acquire(self, key):
        entry = self.find(key)
        if entry is not None:
            self.entries.remove(entry)
            self.entries.append(entry)
            entry[2] += 1
            return entry[1], False
        if len(self.entries) == SLOTS:
            idle = [e for e in self.entries if e[2] == 0]
            same_user = [e for e in idle if (e[0].tenant, e[0].user) == (key.tenant, key.user)]
            if not idle:
                return None
            self.entries.remove((same_user + idle)[0])
        slot = min(set(range(SLOTS)) - {e[1] for e in self.entries})
        self.entries.append([key, slot, 1, False])
        return slot, True

    def release(self, slot):
        entry = next(e for e in self.entries if e[1] == slot)
        entry[2] -= 1
        if entry[2] == 0 and entry[3]:
            self.entries.remove(entry)
            return True
        return False

    def forget(self, tenant, user):
        gone = [e for e in self.entries if (e[0].tenant, e[0].user) == (tenant, user) and not e[3]]
        for entry in gone:
            entry[3] = True
        self.entries = [e for e in self.entries if not (e[3] and e[2] == 0)]
        return sorted(e[1] for e in gone if e[2] == 0)


class Compare(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.slow, self.held = SlotTable(SLOTS), Slow(), []

    @rule(key=KEYS)
    def acquire(self, key):
        wanted = self.slow.acquire(key)
        if wanted is None:
            with pytest.raises(NoFreeSlot):
                self.table.acquire(key)
            return
        seat = self.table.acquire(key)
        assert (seat.slot, seat.is_new) == wanted
        self.held.append(seat.slot)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data):
        slot = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        assert self.table.release(slot) == self.slow.release(slot)

    @rule(key=KEYS)
    def forget(self, key):
        assert self.table.forget(key.tenant, key.user) == self.slow.forget(key.tenant, key.user)

    @rule(key=KEYS)
    def look(self, key):
        assert (key in self.table) == (self.slow.find(key) is not None)

    @invariant()
    def counts_agree(self):
        assert len(self.table) == len(self.slow.entries) <= SLOTS
        assert self.table.pinned == len(set(self.held)) == sum(1 for e in self.slow.entries if e[2])


Compare.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
test_the_table_is_the_slow_model = Compare.TestCase


def key(user: str, version: int = 1) -> StackKey:
    return StackKey(tenant="t", user=user, version=version)


def test_the_oldest_goes_and_never_one_in_use():
    table = SlotTable(2)
    first, second = table.acquire(key("a")), table.acquire(key("b"))
    with pytest.raises(NoFreeSlot):
        table.acquire(key("c"))
    assert not table.release(second.slot)
    third = table.acquire(key("c"))
    assert (third.slot, third.is_new) == (second.slot, True)
    assert key("a") in table and key("b") not in table
    assert table.acquire(key("a")).is_new is False
    assert (table.hits, table.misses, table.evictions) == (1, 3, 1)
    assert first.slot != third.slot


def test_an_old_version_is_never_taken_for_the_new():
    table = SlotTable(4)
    old = table.acquire(key("u"))
    new = table.acquire(key("u", version=2))
    assert new.is_new and new.slot != old.slot and key("u") != key("u", version=2)


def test_a_new_version_takes_the_place_of_the_old():
    table = SlotTable(2)
    table.release(table.acquire(key("b")).slot)
    old = table.acquire(key("a", 1))
    table.release(old.slot)
    assert table.acquire(key("a", 2)).slot == old.slot
    assert key("b") in table


def test_a_deleted_user_is_found_by_nobody_and_the_slot_comes_back():
    table = SlotTable(1)
    seat = table.acquire(key("a"))
    assert table.forget("t", "a") == []
    assert key("a") not in table
    with pytest.raises(NoFreeSlot):
        table.acquire(key("a"))
    assert table.release(seat.slot) is True
    assert table.acquire(key("a")).is_new


def test_misuse_is_said():
    with pytest.raises(ValueError, match="at least one"):
        SlotTable(0)
    table = SlotTable(1)
    with pytest.raises(ValueError, match="more often"):
        table.release(0)
    seat = table.acquire(key("a"))
    table.release(seat.slot)
    with pytest.raises(ValueError, match="more often"):
        table.release(seat.slot)
