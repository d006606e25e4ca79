"""Banks as the store knows them: published, activated, dropped; anchors who left stay out."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import sqlalchemy as sa

from mta_ray.serving.banks import Banks, BankState, NewBank, UnknownBank
from mta_ray.serving.database import Database
from mta_ray.serving.identity import UserId
from mta_ray.serving.tables import anchors
from mta_ray.serving.user_store import UnknownUser, UserStore

ONE, TWO, THREE = (UserId(tenant="lamp", id=name) for name in ("one", "two", "three"))
BANK = NewBank(version="b1", path="/b1", hash="h1", base_fingerprint="f", encoder="e", anchors=(TWO, ONE))


@pytest.fixture
def banks(database: Database) -> Banks:
    return Banks(database)


def test_a_published_bank_is_read_with_its_anchors_in_slot_order(banks: Banks) -> None:
    assert banks.active() is None and banks.state() == BankState(active_version=None, generation=0)
    banks.publish(BANK)
    assert banks.active() is None
    banks.activate("b1")
    known = banks.active()
    assert known is not None and known.bank == BANK
    assert known.is_active and not known.needs_rebuild and known.retired_slots == frozenset()
    assert banks.state() == BankState(active_version="b1", generation=2)


def test_publishing_again_changes_the_place_at_most_and_other_content_is_refused(banks: Banks) -> None:
    banks.publish(BANK)
    state = banks.state()
    banks.publish(BANK)
    assert banks.state() == state
    banks.publish(replace(BANK, path="/moved"))
    assert banks.get("b1").bank == replace(BANK, path="/moved") and banks.versions() == ["b1"]
    with pytest.raises(ValueError, match="other content"):
        banks.publish(replace(BANK, hash="h2"))
    for wrong in ((), (ONE, ONE)):
        with pytest.raises(ValueError, match="different anchors"):
            replace(BANK, anchors=wrong)


def test_banks_share_anchors_and_each_can_be_taken_back_into_force(banks: Banks) -> None:
    banks.publish(BANK)
    banks.publish(replace(BANK, version="b2", hash="h2", anchors=(THREE, ONE)))
    banks.activate("b2")
    banks.activate("b1")
    assert banks.versions() == ["b1", "b2"]
    assert (banks.get("b1").is_active, banks.get("b2").is_active) == (True, False)

    banks.retire(ONE)
    assert (banks.get("b1").retired_slots, banks.get("b2").retired_slots) == ({1}, {1})
    banks.retire(THREE)
    assert (banks.get("b1").retired_slots, banks.get("b2").retired_slots) == ({1}, {0, 1})
    assert banks.get("b1").needs_rebuild and banks.get("b2").needs_rebuild


def test_only_banks_that_hold_the_anchor_need_rebuilding(banks: Banks) -> None:
    banks.publish(BANK)
    banks.publish(replace(BANK, version="b2", hash="h2", anchors=(THREE,)))
    assert banks.retire(THREE) is True
    assert banks.retire(THREE) is False and banks.retire(UserId(tenant="x", id="three")) is False
    assert (banks.get("b1").needs_rebuild, banks.get("b2").needs_rebuild) == (False, True)
    assert banks.is_retired(THREE) and not banks.is_retired(ONE)


def test_who_left_does_not_come_back_with_a_bank_built_before(banks: Banks, database: Database) -> None:
    """Deleted as a user of no bank, or retired from another bank: the next one is published without them."""
    banks.publish(BANK)
    banks.retire(ONE)
    with pytest.raises(UnknownUser):  # nobody of that name is there, so nothing is written down
        UserStore(database).delete(THREE)
    assert not banks.is_retired(THREE)
    banks.publish(replace(BANK, version="b2", hash="h2", anchors=(ONE, THREE)))
    assert banks.get("b2").retired_slots == {0} and banks.get("b2").needs_rebuild


def test_a_bank_is_dropped_with_the_names_that_nothing_else_needs(banks: Banks, database: Database) -> None:
    banks.publish(BANK)
    banks.publish(replace(BANK, version="b2", hash="h2", anchors=(THREE, ONE)))
    banks.activate("b2")
    with pytest.raises(ValueError, match="is active"):
        banks.drop("b2")
    banks.drop("b1")
    for act in (banks.get, banks.activate, banks.drop):
        with pytest.raises(UnknownBank):
            act("b1")
    with database.reading() as connection:
        assert set(connection.execute(sa.select(anchors.c.user_id)).scalars()) == {"three", "one"}
    banks.publish(BANK)
    assert banks.get("b1").bank == BANK


def test_a_bank_published_while_its_anchors_are_retired_misses_none(banks: Banks) -> None:
    for n in range(8):
        anchor = UserId(tenant="lamp", id=f"a{n}")
        bank = replace(BANK, version=f"v{n}", hash=f"h{n}", anchors=(ONE, anchor, TWO))
        threads = [
            threading.Thread(target=banks.publish, args=(bank,)),
            threading.Thread(target=banks.retire, args=(anchor,)),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert banks.get(f"v{n}").retired_slots == {1}
        assert banks.get(f"v{n}").needs_rebuild
