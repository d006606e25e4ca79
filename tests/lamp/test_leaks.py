"""Every kind of leak is found where it was put, and nothing where none is."""

from __future__ import annotations

import pytest

from mta_ray.lamp.leaks import check_leaks, find_leaks, persons
from mta_ray.lamp.users import HistoryItem, Query, User


def user(name: str, items: dict[str, str], queries: dict[str, str]) -> User:
    """A user by content -> answer of the items, and of the queries."""
    return User(
        id=name,
        task="movie_tagging",
        history=tuple(HistoryItem(id=f"{name}-{n}", content=c, target=t) for n, (c, t) in enumerate(items.items())),
        queries=tuple(Query(id=f"{name}-q{n}", content=c, target=t) for n, (c, t) in enumerate(queries.items())),
    )


TESTED = [
    user(
        "a", {"own film": "action", "x": "action"}, {"Own  film!": "comedy", "b's film": "classic", "clean": "action"}
    ),
    user("b", {"B s film": "Classic", "y": "action"}, {"taught": "romance", "asked by c": "action"}),
    user("c", {"z": "action"}, {"Asked by C.": "violence", "asked of a teacher": "action"}),
]
TEACHERS = [
    user("t", {"taught": "romance", "other": "action"}, {}),
    user("u", {"taught": "comedy"}, {"asked of a teacher": "comedy"}),
]


def test_users_who_are_one_user_over_again_are_one_person():
    films = {f"film {n}": "action" for n in range(8)}
    people = [
        user("a", dict(list(films.items())[:5]), {}),
        user("b", films, {}),  # holds all of a's
        user("c", {"own 1": "action", "own 2": "action"} | dict(list(films.items())[:2]), {}),  # two are not enough
        user("d", dict(list(films.items())[4:]), {}),  # b's; so a's too, though a and d share one alone
        user("e", {}, {}),
    ]
    assert persons(people) == {"a": "a", "b": "a", "c": "c", "d": "a", "e": "e"}


def test_every_kind_is_counted():
    found = find_leaks(TESTED, TEACHERS)
    # Of seven questions one is clean; "b's film" and "taught" stand somewhere with their own answer.
    assert (found.users, found.queries, found.leaked, found.with_answer, found.twins) == (3, 7, 6, 2, 0)
    assert found.kinds == {
        "own_profile": 1, "tested_profile": 1, "teacher_profile": 1, "tested_query": 2, "teacher_query": 1,
    }  # fmt: skip


def test_a_tweet_leaks_by_its_text():
    tweets = [
        user("a", {"": "good morning"}, {"say hello": "Good morning!"}),
        user("b", {"": "evening"}, {"": "night"}),
    ]
    assert find_leaks(tweets, []).kinds["own_profile"] == 1
    assert find_leaks(tweets[1:], [user("t", {"": "night"}, {})]).kinds["teacher_profile"] == 1


def test_a_user_who_is_another_over_again_is_found():
    items = {f"film {n}": "action" for n in range(10)}
    half = {f"film {n}": "action" for n in range(5)} | {f"other {n}": "action" for n in range(5)}
    tested = [user("a", items, {}), user("b", half, {}), user("c", {"film 1": "action", "film 2": "comedy"}, {})]
    # a and b share half of both; c has two items, too few to tell
    assert find_leaks(tested, []).twins == 2
    assert find_leaks(tested[2:], tested[:1]).twins == 0
    assert find_leaks(tested[:1], [user("t", half | {f"more {n}": "action" for n in range(90)}, {})]).twins == 1


def test_a_leak_is_an_error_unless_it_is_allowed_by_name():
    with pytest.raises(ValueError, match=r"data set movies: of 7 questions 6 leak \(2 with their answer\): 1 stand in"):
        check_leaks("movies", TESTED, TEACHERS, allow=["news"])
    found = check_leaks("movies", TESTED, TEACHERS, allow=["movies"])
    assert found.is_allowed and not found.is_clean
    assert check_leaks("movies", TESTED[2:], TEACHERS[:1]).is_clean
