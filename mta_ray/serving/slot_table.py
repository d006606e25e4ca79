"""Whose stack sits in which slot of the bounded shelf: the least recently used one goes, never one that is in use.

Pure bookkeeping: no tensors, no Ray, no locks (one event loop owns a table). The caller loads a new seat's adapter into
its slot before it submits the request: `acquire`, `engine.load`, `engine.submit`, with no await in between, so that
whoever finds the key seated finds it loaded too.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StackKey:
    """Whose stack, and which one: a new version is another key, so nobody is ever served an old one by its name."""

    tenant: str
    user: str
    version: int


@dataclass(frozen=True, slots=True)
class Seat:
    """A slot that is the caller's until `release(slot)`."""

    slot: int
    is_new: bool
    """The stack has to be loaded into the slot; False: it is there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotStats:
    """A table at one moment, and since it was made."""

    held: int
    """Slots with a stack, in use or not."""
    pinned: int
    """Slots that requests in flight use."""
    hits: int
    misses: int


class NoFreeSlot(RuntimeError):
    """Every slot is in use by a request in flight; try again later, or serve the user without a stack."""


@dataclass(slots=True)
class _Occupant:
    key: StackKey
    pins: int = 0
    is_forgotten: bool = False
    """Found by nobody any more; its slot is free at its last release."""


class SlotTable:
    """A bounded LRU with pins. The same calls give the same slots."""

    def __init__(self, slots: int) -> None:
        if slots < 1:
            raise ValueError(f"a slot table needs at least one slot, got {slots}")
        self.slots = slots
        self.hits = self.misses = self.evictions = 0
        self._free = list(range(slots))  # a heap: the lowest free slot is taken first
        self._occupants: dict[int, _Occupant] = {}
        self._slot_of: dict[StackKey, int] = {}  # least recently used first

    def __contains__(self, key: StackKey) -> bool:
        """Whether the stack is in a slot; looking does not make it recent."""
        return key in self._slot_of

    def __len__(self) -> int:
        """Slots that hold a stack, in use or not."""
        return len(self._occupants)

    def keys(self) -> list[StackKey]:
        """What is in a slot, least recently used first."""
        return list(self._slot_of)

    @property
    def pinned(self) -> int:
        """Slots in use by requests in flight."""
        return sum(1 for occupant in self._occupants.values() if occupant.pins)

    def stats(self) -> SlotStats:
        return SlotStats(held=len(self), pinned=self.pinned, hits=self.hits, misses=self.misses)

    def acquire(self, key: StackKey) -> Seat:
        """The stack's slot, pinned until released as often as acquired. Raises NoFreeSlot; nothing was changed then."""
        slot = self._slot_of.pop(key, None)
        is_new = slot is None
        if slot is None:
            slot = self._room_for(key)
            self._occupants[slot] = _Occupant(key)
        self.hits, self.misses = self.hits + (not is_new), self.misses + is_new
        self._slot_of[key] = slot
        self._occupants[slot].pins += 1
        return Seat(slot, is_new)

    def release(self, slot: int) -> bool:
        """Undo one acquire. True: the stack was forgotten meanwhile and the slot is free now; wipe it."""
        occupant = self._occupants.get(slot)
        if occupant is None or occupant.pins == 0:
            raise ValueError(f"slot {slot} was released more often than acquired")
        occupant.pins -= 1
        if occupant.pins or not occupant.is_forgotten:
            return False
        self._vacate(slot)
        return True

    def forget(self, tenant: str, user: str) -> list[int]:
        """Drop every version of a user's stack. Returns the slots that are free now, to be wiped; those in use are not
        found any more and are free when released."""
        freed = []
        for key in [k for k in self._slot_of if (k.tenant, k.user) == (tenant, user)]:
            slot = self._slot_of.pop(key)
            if self._occupants[slot].pins:
                self._occupants[slot].is_forgotten = True
            else:
                self._vacate(slot)
                freed.append(slot)
        return sorted(freed)

    def _room_for(self, key: StackKey) -> int:
        if not self._free:
            idle = [k for k, slot in self._slot_of.items() if not self._occupants[slot].pins]
            if not idle:
                raise NoFreeSlot(f"all {self.slots} slots are in use by requests in flight")
            # An older version of the same user's stack will not be asked for again: it goes before the oldest.
            outdated = [k for k in idle if (k.tenant, k.user) == (key.tenant, key.user)]
            self._vacate(self._slot_of.pop((outdated or idle)[0]))
            self.evictions += 1
        return heapq.heappop(self._free)

    def _vacate(self, slot: int) -> None:
        del self._occupants[slot]
        heapq.heappush(self._free, slot)
