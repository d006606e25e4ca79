"""Data sets by name, teachers from elsewhere, and histories that are cut to a budget."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mta_ray.artifacts import open_artifact, publish
from mta_ray.comparison.datasets import DataSet, Subjects, cut, is_cut, join_teachers, parse_datasets, prompt_hash
from mta_ray.lamp.users import Query, User, to_table
from mta_ray.pipeline.prepare_users import read_users
from mta_ray.pipeline.split import SplitConfig, split_users
from mta_ray.population.people import WorldConfig, simulate_user


def write_users(out: Path, users: list[User], labels: list[str]) -> str:
    import pyarrow.parquet as pq

    with publish(out, kind="users", settings={}, inputs={}) as draft:
        pq.write_table(to_table(users), draft.path / "users-0.parquet")
        draft.facts.update(task="movie_tagging", labels=labels, users=len(users))
    return str(out)


def split_of(users: list[User]) -> tuple[set[str], set[str]]:
    """(ids of the teachers, ids of the tested)"""
    rows = ([u.id for u in users], [len(u.history) for u in users], [len(u.queries) for u in users])
    split = split_users(*rows, SplitConfig())
    return {users[n].id for n in split.teachers}, {users[n].id for n in split.tested}


def test_teachers_from_elsewhere_only_teach_and_the_tested_stay_the_same(tmp_path: Path) -> None:
    own = [simulate_user(WorldConfig(seed=1, max_items=20), number) for number in range(40)]
    others = [simulate_user(WorldConfig(seed=2, max_items=20), number) for number in range(40)]
    same_ids = [replace(other, id=mine.id) for mine, other in zip(own, others, strict=True)]
    paths = [
        write_users(tmp_path / "own", own, ["a", "b"]),
        write_users(tmp_path / "elsewhere", same_ids, ["b", "c"]),
    ]
    joined = join_teachers(paths[0], paths[1:], str(tmp_path / "joined"))

    users = list(read_users(joined))
    teachers, tested = split_of(users)
    own_teachers, own_tested = split_of(own)
    assert tested == own_tested
    assert teachers > own_teachers
    assert len(teachers - own_teachers) > 5 and not any(
        user.queries for user in users if user.id not in {u.id for u in own}
    )
    assert {user.history for user in users if user.id in teachers - own_teachers} <= {u.history for u in others}
    assert open_artifact(joined, kind="users").facts["labels"] == ["a", "b", "c"]


def test_a_budget_keeps_the_latest_items_and_every_query() -> None:
    user = simulate_user(WorldConfig(seed=3), 5)
    for budget in ("0", "1", str(len(user.history)), "1000", "all"):
        short = cut(user, budget)
        wanted = len(user.history) if budget == "all" else min(int(budget), len(user.history))
        assert short.history == user.history[::-1][:wanted][::-1]
        assert short.queries == user.queries
        assert is_cut(user, budget) == (short.history != user.history)


def test_a_question_has_one_hash_whatever_its_answer() -> None:
    plain = Query(id="1", content="a film", target="x")
    assert prompt_hash(plain) == prompt_hash(Query(id="2", content="a film", target="y", best="z"))
    others = [Query(id="1", content="a Film"), Query(id="1", content="a film", options=("p", "q"))]
    assert len({prompt_hash(query) for query in (plain, *others)}) == 3
    assert len(prompt_hash(plain)) == 16


def test_data_sets_are_named_and_their_files_joined() -> None:
    found = parse_datasets(
        ("movie_tagging",),
        ("news=LaMP-4:/a:b.json", "news=news_headline:s3://c/d.json"),
        ("news=/e.json", "news=simulated"),
    )
    assert found == [
        DataSet(name="simulated_movie_tagging", task="movie_tagging"),
        DataSet(
            name="news", task="news_headline", files=("/a:b.json", "s3://c/d.json"), teachers=("/e.json", "simulated")
        ),
    ]


def test_a_budgets_digest_is_of_what_it_leaves_alone() -> None:
    users = [simulate_user(WorldConfig(seed=3, max_items=20), number) for number in range(4)]
    means = {budget: np.full((4, 2), value, np.float32) for budget, value in (("all", 1.0), ("1", 2.0), ("5", 3.0))}
    one = Subjects(users=users, means=means, encode_s=0.5, max_items=4)
    fewer = replace(one, means={"all": means["all"], "1": means["1"]}, encode_s=1.0)
    assert one.digest("1") == fewer.digest("1") != one.digest("all") == fewer.digest("all")
    moved = replace(one, means=means | {"1": means["1"] + 1})
    assert moved.digest("1") != one.digest("1") and moved.digest("5") == one.digest("5")
    first, *others = users
    other = replace(one, users=[replace(first, history=first.history[1:]), *others])  # its oldest item is gone
    assert len(first.history) > 1 and other.digest("1") == one.digest("1") and other.digest("all") != one.digest("all")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (((), (), ()), "no data set"),
        (((), ("news.json",), ()), "files are given as NAME=TASK:PATH"),
        (((), ("a=LaMP-4:x", "a=LaMP-2:y"), ()), "one name, one task"),
        (((), ("a b=LaMP-4:x",), ()), "a data set cannot be called 'a b'"),
        (((), ("../a=LaMP-4:x",), ()), "a data set cannot be called"),
        ((("movie_tagging",), ("simulated_movie_tagging=LaMP-2M:x",), ()), "a data set cannot be called"),
        ((("movie_tagging",), (), ("a=x",)), "teachers of 'a'"),
        (((), ("a=LaMP-1:x",), ("a=simulated",)), "task citation cannot be simulated"),
    ],
)
def test_data_sets_that_cannot_be_are_told_at_the_door(settings: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_datasets(*settings)
