"""Every kind of leak is found where it was put, and nothing where none is."""

from __future__ import annotations

import random
import unicodedata

import pytest

from mta_ray.lamp.leaks import check_leaks, find_leaks, persons
from mta_ray.lamp.tasks import MOVIE_TAGS
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


def fans(seed: int, tags: tuple[str, ...]) -> list[User]:
    """40 people who saw 4 to 30 of the same 60 films, popular ones above all, and each tagged them for themselves."""
    rng = random.Random(seed)
    found = []
    for number in range(40):
        seen: dict[str, str] = {}
        size = rng.choice([4, 5, 6, 8, 10, 10, 30])
        while len(seen) < size:
            film = rng.choices(range(60), [1 / (place + 1) for place in range(60)])[0]
            seen.setdefault(f"film {film}", rng.choice(tags))
        found.append(user(f"p{number:02}", seen, {}))
    return found


@pytest.mark.parametrize(("tags", "least"), [(MOVIE_TAGS, 39), (MOVIE_TAGS[:4], 35)])
def test_people_who_saw_the_same_films_are_people_each(tags, least):
    counts = [len(set(persons(fans(seed, tags)).values())) for seed in range(3)]
    assert min(counts) >= least


def test_copies_are_found_among_people_who_saw_the_same_films():
    people = fans(0, MOVIE_TAGS)
    told = [{item.content: item.target for item in one.history} for one in people]
    copies = [user(f"whole {n}", told[n], {}) for n in range(40)]
    copies += [user(f"cut {n}", dict(list(items.items())[::2]), {}) for n, items in enumerate(told) if len(items) > 4]
    person_of = persons(people + copies)
    assert all(person_of[copy.id] == person_of[f"p{int(copy.id.split()[1]):02}"] for copy in copies)
    assert find_leaks(people[:20], people[20:]).twins == 0
    assert find_leaks(people[:20], copies).twins == 20


def test_a_profile_of_two_items_is_a_copy_where_it_is_the_same():
    two = {"film 1": "action", "café": "comedy"}
    again = {unicodedata.normalize("NFD", content): target for content, target in reversed(two.items())}
    people = [user("a", two, {}), user("b", again, {}), user("c", two | {"film 3": "action"}, {})]
    people += [user("d", two | {"café": "action"}, {}), user("e", {"x": "action"}, {}), user("f", {"x": "action"}, {})]
    assert persons(people) == {"a": "a", "b": "a", "c": "c", "d": "d", "e": "e", "f": "f"}
    assert find_leaks(people[:1], people[1:2]).twins == 1


def test_headlines_of_the_same_articles_differ_between_people():
    articles = [f"article {n}" for n in range(5)]
    ours, theirs = ({article: f"{who} on {article}" for article in articles} for who in ("us", "them"))
    assert find_leaks([user("a", ours, {})], [user("t", theirs, {})]).twins == 0
    assert find_leaks([user("a", ours, {})], [user("t", theirs | dict(list(ours.items())[:4]), {})]).twins == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The café of Zoë", unicodedata.normalize("NFD", "The café of Zoë")),
        ("The café of Zoë", "the cafe of Zoe"),
        ("ABC film 12", "\uff21\uff22\uff23 film \uff11\uff12"),  # full width
        ("the final office", "the \ufb01nal o\ufb03ce"),  # ligatures
        ("the final office", "the fi\u200bnal of\u00adfice"),  # zero-width space, soft hyphen
        ("Tom & Jerry's run", "tom &amp; jerry&#39;s run"),
        ("die Straße", "DIE STRASSE"),
        ("istanbul", "\u0130stanbul"),
        ("\u2764", "\u2764\ufe0f"),  # signs alone
    ],
)
def test_a_text_in_another_spelling_is_the_same(one, other):
    for asked, told in ((one, other), (other, one)):
        found = find_leaks([user("a", {"x": "action"}, {asked: "comedy"})], [user("t", {told: "comedy"}, {})])
        assert (found.leaked, found.with_answer) == (1, 1)


def test_texts_that_differ_behind_the_cut_are_the_same():
    start = " - ".join(f"word{n}" for n in range(6))  # 11 words, five of them a sign
    tested = [user("a", {"x": "action"}, {f"{start} one end": "comedy"})]
    teachers = [user("t", {f"{start} other end": "comedy"}, {})]
    assert find_leaks(tested, teachers).is_clean
    assert find_leaks(tested, teachers, max_words=12).is_clean
    assert find_leaks(tested, teachers, max_words=11).leaked == 1
    assert find_leaks(tested, [user("t", {start: "comedy"}, {})], max_words=11).leaked == 1
    # whatever the cut, the whole text with fewer signs is the same
    assert find_leaks(tested, [user("t", {f"{start} one end".replace(" -", ""): "x"}, {})], max_words=11).leaked == 1


@pytest.mark.parametrize(("answer", "with_answer"), [("[1]", 1), ("[2]", 0), ("[ 1 ]", 1), ("Cited work", 1)])
def test_a_citation_is_answered_by_the_paper(answer, with_answer):
    query = Query(id="q", content="My paper", target=answer, options=("Cited work", "Other work"))
    item = HistoryItem(id="1", content="my paper", target="Cited work")
    found = find_leaks([User(id="a", task="citation", history=(item,), queries=(query,))], [])
    assert (found.kinds["own_profile"], found.with_answer) == (1, with_answer)


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
