"""The rules by which groups get adapters, lose them, and get them again."""

from __future__ import annotations

from collections import deque

import pytest

from mta_ray.pipeline.bank.foreman import Roster


def test_groups_take_their_share_in_order_and_no_adapter_twice() -> None:
    roster = Roster(deque(range(5)))
    roster.join(0)
    assert roster.take(0, 2) == [0, 1]
    roster.join(1)
    assert roster.take(1, 8) == [2, 3]  # two groups share three: at most two for one
    assert roster.take(0, 8) == [4]
    assert roster.take(1, 8) == []
    assert not roster.is_done
    for group, numbers in ((0, (0, 1, 4)), (1, (2, 3))):
        for number in numbers:
            roster.finish(group, number)
    assert roster.is_done and roster.finished == set(range(5)) and roster.progress == 5


def test_what_a_dead_group_had_waits_again_first_in_line_and_in_order() -> None:
    roster = Roster(deque(range(6)))
    roster.join(0)
    roster.join(1)
    assert roster.take(0, 3) == [0, 1, 2]
    roster.finish(0, 1)
    assert roster.leave(0) == [0, 2]
    assert list(roster.waiting) == [0, 2, 3, 4, 5]
    assert roster.take(1, 2) == [0, 2]
    assert roster.join(1) == [0, 2]  # it came again without a word that it had died
    assert list(roster.waiting) == [0, 2, 3, 4, 5]
    assert roster.leave(7) == []  # one that had not come yet


def test_a_failed_adapter_is_not_given_again() -> None:
    roster = Roster(deque([0]))
    roster.join(0)
    roster.take(0, 1)
    roster.fail(0, 0, "its loss is not finite")
    assert roster.is_done and roster.failed == {0: "its loss is not finite"} and roster.take(0, 1) == []
    with pytest.raises(KeyError):
        roster.finish(0, 0)
