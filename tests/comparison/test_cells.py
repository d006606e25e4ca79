"""Cells: named by what decides their answers, written whole, put together to one row a question."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mta_ray.artifacts import publish
from mta_ray.comparison.cells import Cell, CellAnswers, CellFiles, collect
from mta_ray.comparison.datasets import TESTED, prompt_hash
from mta_ray.comparison.recipes import Recipe
from mta_ray.lamp.tasks import MOVIE_TAGS, task_named
from mta_ray.lamp.users import HistoryItem, Query, User, to_table
from mta_ray.personalize.base_model import PromptConfig, Wording
from mta_ray.personalize.train_config import TrainConfig

WORDING = Wording(task=task_named("movie_tagging"), labels=MOVIE_TAGS, prompts=PromptConfig())
USERS = [
    User(
        id=name,
        task="movie_tagging",
        history=tuple(HistoryItem(id=f"{n}", content=f"film {n}", target="comedy") for n in range(items)),
        queries=(Query(id="q", content=f"of {name}", target="comedy"),),
    )
    for name, items in (("long", 11), ("middle", 10), ("short", 2))
]


@pytest.fixture
def cell(tmp_path: Path) -> Cell:
    with publish(tmp_path / "tested", kind=TESTED, settings={"max_items": 4}, inputs={}) as draft:
        draft.facts["encode_s"] = 0.5
        pq.write_table(to_table(USERS), draft.path / "users.parquet")
        pq.write_table(pa.table({"all": [[0.0]] * 3}), draft.path / "vectors.parquet")
    return Cell(
        dataset="films", recipe=Recipe(name="oppu", own=TrainConfig()), rag=False, budget="all", seed=0, whole=True,
        tested=str(tmp_path / "tested"), base="/base", users_per_pack=16, inputs=("a", "b"), devices=2,
    )  # fmt: skip


def answers(said: dict[str, str], *, kept: float, seconds: float) -> CellAnswers:
    asked = {user.id: prompt_hash(user.queries[0]) for user in USERS}
    return CellAnswers(
        rows=[(user_id, "q", asked[user_id], text) for user_id, text in said.items()],
        bytes=dict.fromkeys(said, kept),
        seconds=dict.fromkeys(said, seconds),
        decode_tokens=30,
        decode_s=2.0,
    )


def test_users_whom_the_budget_leaves_all_items_are_answered_as_with_the_whole_history(cell, tmp_path) -> None:
    files, cut = CellFiles(tmp_path / "cells"), replace(cell, budget="10")
    files.write(cell, answers({"long": "comedy", "short": "action", "middle": "comedy"}, kept=10.0, seconds=1.0))
    files.write(cut, answers({"long": "violence"}, kept=40.0, seconds=4.0))

    results, costs = collect([cut, cell], files, {"films": WORDING})
    names = ["budget", "user_id", "prediction", "score", "history_items", "full_history_items", "few_shot"]
    assert results[names].values.tolist() == [
        ["10", "long", "violence", 0.0, 10, 11, False],
        ["10", "middle", "comedy", 1.0, 10, 10, True],  # at most ten items are few
        ["10", "short", "action", 0.0, 2, 2, True],
        ["all", "long", "comedy", 1.0, 11, 11, False],
        ["all", "middle", "comedy", 1.0, 10, 10, True],
        ["all", "short", "action", 0.0, 2, 2, True],
    ]
    spent = costs.set_index(["budget", "group"])
    names = ["bytes_per_user", "seconds_per_user", "training_device_seconds"]
    assert spent.loc[("10", "all"), names].tolist() == [20, 2, 12]  # seconds of two devices
    assert spent.loc[("10", "few_shot"), names].tolist() == [10, 1, 4]
    assert spent.loc[("10", "rest"), names].tolist() == [40, 4, 8]
    assert spent.loc[("all", "all"), "training_device_seconds"] == 6
    assert spent.loc[("10", "all"), "decode_tokens_per_s"] == 15


def test_what_reads_no_history_is_answered_once_for_all_budgets(cell) -> None:
    bare = replace(cell, recipe=Recipe(name="non_personalised", rag="never"))
    for one, asked in (
        (replace(bare, budget="1"), []),
        (bare, ["long", "middle", "short"]),
        (replace(bare, budget="1", rag=True), ["long", "middle", "short"]),
        (replace(cell, budget="10"), ["long"]),
        (replace(cell, budget="1", whole=False), ["long", "middle", "short"]),
    ):
        assert [user.id for user in USERS if one.asks(user)] == asked


def test_a_cells_name_is_of_what_decides_its_answers(cell) -> None:
    same = replace(cell, tested="/elsewhere", base="/b", bank_device_seconds=5.0, pooled_device_seconds=5.0, devices=3)
    assert same.key == cell.key
    others = [
        replace(cell, seed=1),
        replace(cell, rag=True),
        replace(cell, budget="5"),
        replace(cell, whole=False),
        replace(cell, users_per_pack=8),
        replace(cell, inputs=("a", "c")),
        replace(cell, made_by=("torch 3",)),
        replace(cell, recipe=replace(cell.recipe, own=TrainConfig(steps=61))),
    ]
    assert len({one.key for one in (cell, *others)}) == len(others) + 1


def test_a_cell_is_there_when_it_is_whole_and_comes_back_as_it_was(cell, tmp_path) -> None:
    files, said = CellFiles(tmp_path / "cells"), answers({"long": "comedy"}, kept=1.5, seconds=0.25)
    files.write(cell, said)
    assert files.read(cell) == said and files.is_there(cell)
    next((tmp_path / "cells").glob("*.json")).unlink()  # killed between the two
    assert not files.is_there(cell)


def test_a_cell_whose_costs_were_changed_is_not_there(cell, tmp_path) -> None:
    files = CellFiles(tmp_path / "cells")
    files.write(cell, answers({"long": "comedy"}, kept=1.5, seconds=0.25))
    (path,) = (tmp_path / "cells").glob("*.json")
    written = json.loads(path.read_text())
    without = {name: value for name, value in written.items() if name != "bytes"}
    for changed in (written | {"seconds": {"long": 9.0}}, without):
        path.write_text(json.dumps(changed))
        assert not files.is_there(cell)
    path.write_text(json.dumps(written))
    assert files.is_there(cell)


@pytest.mark.parametrize("ending", ["json", "parquet"])
def test_a_damaged_cell_and_another_cells_files_are_not_there(cell, tmp_path, ending) -> None:
    files, other = CellFiles(tmp_path / "cells"), replace(cell, seed=1)
    files.write(cell, answers({"long": "comedy"}, kept=1.5, seconds=0.25))
    files.write(other, answers({"long": "action"}, kept=1.5, seconds=0.25))
    path, others = ((tmp_path / "cells" / f"{one.key}.{ending}") for one in (cell, other))
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", others.read_bytes()):
        path.write_bytes(damaged)
        assert not files.is_there(cell) and files.is_there(other)
    path.write_bytes(whole)
    assert files.is_there(cell)
    for kind in ("json", "parquet"):  # both of another cell
        (tmp_path / "cells" / f"{cell.key}.{kind}").write_bytes(
            (tmp_path / "cells" / f"{other.key}.{kind}").read_bytes()
        )
    assert not files.is_there(cell)


def test_answers_to_other_questions_are_refused(cell, tmp_path) -> None:
    files = CellFiles(tmp_path / "cells")
    files.write(cell, answers({"long": "comedy", "short": "action"}, kept=1.0, seconds=1.0))
    with pytest.raises(ValueError, match="2 answers for 3 questions; remove the cell"):
        collect([cell], files, {"films": WORDING})
    said = answers({"long": "comedy", "short": "action", "middle": "comedy"}, kept=1.0, seconds=1.0)
    files.write(cell, replace(said, rows=[(u, q, "0" * 16, text) for u, q, _, text in said.rows]))
    with pytest.raises(ValueError, match="another question"):
        collect([cell], files, {"films": WORDING})
