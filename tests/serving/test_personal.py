"""Routes through the bank that is served: kept, computed anew when anything they depend on changes, never stale."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mta_ray.lamp.users import HistoryItem
from mta_ray.lora.adapter import Adapter, Factors
from mta_ray.lora.bank import Bank, assemble
from mta_ray.lora.fusion_config import FusionConfig
from mta_ray.serving.banks import Banks, NewBank
from mta_ray.serving.database import Database, DatabaseConfig, open_database
from mta_ray.serving.identity import UserId
from mta_ray.serving.personal import OtherEncoder, Personaliser
from mta_ray.serving.schema import FREE_TEXT
from mta_ray.serving.served_bank import ServedBank
from mta_ray.serving.user_store import Conflict, UserStore
from mta_ray.similarity.embedding import Encoder

ANCHORS = tuple(UserId(tenant="acme", id=name) for name in ("anna", "bert", "cleo"))
USER = UserId(tenant="acme", id="u")


class Words(Encoder):
    """Texts by how often three words stand in them: an encoder whose vectors can be written down."""

    def __init__(self, source: str = "words") -> None:
        self.source = source

    def encode(self, texts):  # noqa: ANN001, ANN201
        return np.array([[t.count(w) + 1e-3 for w in ("red", "green", "blue")] for t in texts], np.float32)

    @property
    def dim(self) -> int:
        return 3


def make_bank() -> Bank:
    adapter = Adapter(factors={"m.0.q": Factors(down=torch.ones(1, 4), up=torch.ones(4, 1))}, scale=1.0)
    return assemble(
        [adapter] * 3,
        anchor_ids=tuple(anchor.id for anchor in ANCHORS),
        embeddings=np.eye(3, dtype=np.float32),
        center=np.zeros(3, np.float32),
        base_fingerprint="b",
        encoder="words",
    )


@pytest.fixture
def opened(tmp_path: Path) -> Database:
    return open_database(DatabaseConfig(url=str(tmp_path / "users.db")))


@pytest.fixture
def make(opened: Database) -> Callable[..., Personaliser]:
    """A function (version, encoder) -> a personaliser that serves the bank of that version, now in force."""

    def personaliser(version: str = "1", encoder: str = "words") -> Personaliser:
        banks = Banks(opened)
        banks.publish(
            NewBank(version=version, path="", hash=version, base_fingerprint="b", encoder="words", anchors=ANCHORS)
        )
        banks.activate(version)
        served = ServedBank(
            version=version,
            bank=make_bank(),
            anchors=ANCHORS,
            retired=frozenset(),
            fusion=FusionConfig(k=2, temperature=0.5),
        )
        made = Personaliser(UserStore(opened), banks, Words(encoder), served, words=64)
        made.follow()
        return made

    return personaliser


def write(personaliser: Personaliser, *texts: str, replaces: bool = False) -> None:
    items = [HistoryItem(id=str(n), content="", target=text) for n, text in enumerate(texts)]
    personaliser.put_history(USER, items, task=FREE_TEXT, replaces=replaces, expected_version=None)


def weights(personaliser: Personaliser, user: UserId | None = USER) -> dict[int, float]:
    route = personaliser.model_of(user).route
    return {} if route is None else dict(zip(route.slots, route.weights, strict=True))


def softmax(*cosines: float) -> list[float]:
    shares = np.exp(np.array(cosines) / 0.5)
    return (shares / shares.sum()).tolist()


def test_a_route_is_the_formula_and_is_kept(make: Callable[..., Personaliser]) -> None:
    personaliser = make()
    write(personaliser, "red", "green", "red")
    length = np.hypot(2, 1)
    expected = dict(zip((0, 1), softmax(2 / length, 1 / length), strict=True))
    assert weights(personaliser) == pytest.approx(expected, abs=2e-3)
    kept = personaliser.store.read(USER)
    assert kept.has_route_for("1") and kept.route.anchors == ANCHORS[:2]
    assert weights(personaliser) == dict(zip((0, 1), kept.route.weights, strict=True))


def test_nobody_and_whoever_has_no_history_are_cold_starts(make: Callable[..., Personaliser]) -> None:
    personaliser = make()
    write(personaliser)
    third = pytest.approx({0: 1 / 3, 1: 1 / 3, 2: 1 / 3})
    assert weights(personaliser) == weights(personaliser, None) == third
    assert weights(personaliser, UserId(tenant="other", id="u")) == third
    assert personaliser.store.read(USER).route is None


def test_history_bank_and_anchors_each_make_a_new_route(make: Callable[..., Personaliser]) -> None:
    personaliser = make()
    write(personaliser, "red green")
    assert set(weights(personaliser)) == {0, 1}
    write(personaliser, "blue", "blue", "blue green")
    assert set(weights(personaliser)) == {1, 2}
    assert personaliser.store.delete(ANCHORS[2])
    assert personaliser.follow() is None
    assert set(weights(personaliser)) == {0, 1}  # the next nearest takes its place
    second = make("2")
    assert personaliser.follow().bank.version == "2"
    assert set(weights(personaliser)) == {0, 1}  # served on until the new bank is loaded
    assert second.served.retired == {2} and set(weights(second)) == {0, 1}
    assert second.store.read(USER).route.bank_version == "2"
    for anchor in ANCHORS[:2]:
        second.store.delete(anchor)
    second.follow()
    assert weights(second) == weights(second, None) == {}  # the base model alone


def test_whoever_cites_a_deleted_anchor_is_routed_anew(make: Callable[..., Personaliser]) -> None:
    personaliser = make()
    write(personaliser, "red green")
    before = weights(personaliser)
    assert personaliser.store.delete(ANCHORS[1])
    assert personaliser.reroute(ANCHORS[1]) == 1
    kept = personaliser.store.read(USER).route
    assert set(kept.anchors) == {ANCHORS[0], ANCHORS[2]} and set(before) == {0, 1}
    assert personaliser.reroute(ANCHORS[1]) == 0


def test_another_encoder_reads_the_whole_history_again(make: Callable[..., Personaliser]) -> None:
    old = make()
    write(old, "red")
    new = make("2", encoder="other words")
    with pytest.raises(OtherEncoder):  # a question's thread does not stop for it
        new.model_of(USER, encodes=False)
    assert set(weights(new)) == {0, 1}  # a question is enough
    assert new.store.read(USER).item_sum.encoder == "other words"
    newest = make("3", encoder="yet others")
    write(newest, "green", "green")  # and so is new history
    state = newest.store.read(USER)
    assert state.item_sum.encoder == "yet others" and state.item_sum.items == state.items == 3
    assert state.item_sum.total.argmax() == 1


def test_another_task_is_refused(make: Callable[..., Personaliser]) -> None:
    personaliser = make()
    write(personaliser, "red")
    item = HistoryItem(id="1", content="a film", target="comedy")
    with pytest.raises(Conflict):
        personaliser.put_history(USER, [item], task="movie_tagging", replaces=False, expected_version=None)
