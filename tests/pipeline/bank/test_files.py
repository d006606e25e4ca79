"""The adapters of a bank under construction: each set of settings by itself, one builder at a time."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from mta_ray.artifacts import publish
from mta_ray.lamp.users import HistoryItem, User, to_table
from mta_ray.lora.adapter import Adapter, Factors
from mta_ray.personalize.engines import SlotState
from mta_ray.personalize.lanes import Checkpoint
from mta_ray.pipeline.bank.files import AdapterFiles
from mta_ray.pipeline.bank.histories import KIND, open_histories, read_history

KEYS = ("a" * 64, "b" * 64)


def adapter(value: float) -> Adapter:
    return Adapter(factors={"m": Factors(down=torch.full((1, 2), value), up=torch.ones(2, 1))}, scale=2.0)


def test_other_settings_neither_see_nor_touch_what_is_finished(tmp_path: Path) -> None:
    one, other = (AdapterFiles(root=str(tmp_path / "bank.adapters"), key=key) for key in KEYS)
    one.publish(0, adapter(1.0), [0.5])
    assert other.finished(1) == set()
    other.publish(0, adapter(2.0), [0.25])
    assert one.others() == [KEYS[1][:12]]
    other.remove()
    assert one.finished(1) == {0} and other.finished(1) == set() and one.others() == []
    kept, losses = one.read(0)
    assert kept.factors["m"].down.tolist() == [[1.0, 1.0]] and losses == [0.5]
    one.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_second_builder_of_the_same_bank_is_refused_until_the_first_is_done(tmp_path: Path) -> None:
    one, other = (AdapterFiles(root=str(tmp_path / "bank.adapters"), key=key) for key in KEYS)
    with one.locked():
        with pytest.raises(ValueError, match="another build-bank with the same settings is at work"), one.locked():
            pass
        with other.locked():
            pass
    with one.locked():
        one.publish(0, adapter(1.0), [0.5])
    assert one.finished(1) == {0}


def test_what_cannot_be_read_gives_way_to_what_is_made_anew(tmp_path: Path) -> None:
    """A damaged manifest, or none because a kill came in the middle of a removal."""
    files = AdapterFiles(root=str(tmp_path / "bank.adapters"), key=KEYS[0])
    state = SlotState(steps=3, values=(torch.ones(2),), first=(torch.zeros(2),), second=(torch.zeros(2),))
    for damage in ("{", None):
        files.publish(0, adapter(1.0), [0.5])
        files.keep(1, Checkpoint(state=state, losses=(0.5,)), ["m"])
        for name in ("00000", "00001.checkpoint"):
            manifest = Path(files.folder) / name / "manifest.json"
            manifest.write_text(damage) if damage else manifest.unlink()
        assert files.finished(1) == set() and files.resume(1, ["m"]) is None
        files.publish(0, adapter(2.0), [0.25])
        files.keep(1, Checkpoint(state=state, losses=(0.25,)), ["m"])
        assert files.read(0)[1] == [0.25] and files.resume(1, ["m"]).losses == (0.25,)


def test_a_history_of_somebody_else_is_refused(tmp_path: Path) -> None:
    """As it would be where another run has put its own anchors in the place of these."""
    item = HistoryItem(id="1", content="c", target="t")
    users = [User(id=name, task="movie_tagging", history=(item,)) for name in ("ann", "bob")]
    with publish(str(tmp_path / "h"), kind=KIND, settings={"users": ["ann", "ann"]}, inputs={}) as draft:
        for number, user in enumerate(users):
            pq.write_table(to_table([user]), draft.path / f"{number:05d}.parquet")
    histories = open_histories(str(tmp_path / "h"))
    assert read_history(histories, 0).id == "ann"
    with pytest.raises(ValueError, match="holds another user"):
        read_history(histories, 1)
