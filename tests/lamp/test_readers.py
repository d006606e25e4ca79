import json
from dataclasses import replace
from itertools import permutations

import pytest

from mta_ray.lamp.readers import LampFile, Reject, join, leaked_items
from mta_ray.lamp.tasks import TASKS
from mta_ray.lamp.users import HistoryItem, Query, User

MOVIE, HEADLINE, RATING = TASKS["movie_tagging"], TASKS["news_headline"], TASKS["product_rating"]


def movie_input(content, labels=MOVIE.labels):
    return MOVIE.question.format(labels=", ".join(labels), content=content)


def movie_user(user_id="7", **changes):
    profile = [{"id": "70", "description": "A robot dreams.", "tag": "sci-fi"}]
    query = [{"id": "71", "input": movie_input("A clown weeps."), "gold": "comedy"}]
    return {"user_id": user_id, "profile": profile, "query": query} | changes


def write(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")
    return str(path)


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def write_questions(folder, records, golds, task="LaMP_2", name="dev"):
    write(folder / f"{name}_outputs.json", {"task": task, "golds": golds})
    return write(folder / f"{name}_questions.json", records)


EXPECTED = User(
    id="7",
    task="movie_tagging",
    history=(HistoryItem(id="70", content="A robot dreams.", target="sci-fi"),),
    queries=(Query(id="71", content="A clown weeps.", target="comedy"),),
)


def test_the_processed_form_as_array_and_as_lines(tmp_path):
    assert list(LampFile(write(tmp_path / "a.json", [movie_user(7)]), MOVIE)) == [EXPECTED]
    assert list(LampFile(write_lines(tmp_path / "b.txt", [movie_user("7"), movie_user("8")]), MOVIE))[0] == EXPECTED


def test_the_raw_form_reads_its_answers_in_any_order(tmp_path):
    records = [{"id": n, "input": movie_input(f"Film {n}."), "profile": movie_user()["profile"]} for n in (1, 2, 3)]
    golds = [{"id": "3", "output": "action"}, {"id": 1, "output": "Comedy"}, {"id": 2, "output": "sci - fi"}]
    file = LampFile(write_questions(tmp_path, records, golds), MOVIE)
    users = list(file)
    assert file.form == "questions" and file.labels == MOVIE.labels
    assert [(u.id, u.queries[0].content, u.queries[0].target) for u in users] == [
        ("1", "Film 1.", "comedy"),
        ("2", "Film 2.", "sci-fi"),
        ("3", "Film 3.", "action"),
    ]
    lines = write_lines(tmp_path / "x_questions.jsonl", records)
    write_lines(tmp_path / "x_outputs.jsonl", golds)
    assert list(LampFile(lines, MOVIE)) == users


def test_numbers_are_welcome_as_ids_scores_and_dates(tmp_path):
    profile = [
        {"id": 2, "text": "Bad.", "score": 1.0, "date": 1361750400},
        {"id": 1, "text": "Good.", "score": 5, "date": "2009-05-01"},
    ]
    query = [{"id": 3, "input": RATING.question.format(content="Fine."), "gold": 4}]
    [user] = LampFile(write(tmp_path / "a.json", [{"user_id": 9, "profile": profile, "query": query}]), RATING)
    # 1361750400 s after 1970 is the 25th of February 2013: the older item comes first.
    assert [(i.id, i.target, i.date) for i in user.history] == [
        ("1", "5", "2009-05-01"),
        ("2", "1", "2013-02-25T00:00:00"),
    ]
    assert user.queries[0].target == "4"


@pytest.mark.parametrize(
    ("told", "date"),
    [
        ("2009", "2009"),
        ("2009-12", "2009-12"),
        ("2009-05-11T03:17:40+02:00", "2009-05-11T01:17:40"),  # in UTC, so that texts sort as times
        ("Mon May 11 03:17:40 UTC 2009", "2009-05-11T03:17:40"),
        ("2009-99", None),
        ("\u0662\u0660\u0660\u0669", None),  # 2009 in Arabic digits
        ("Mon May \u0661\u0661 03:17:40 UTC 2009", None),
        ("0001-01-01T00:00:00+01:00", None),  # in UTC, a year that no calendar here has
    ],
)
def test_dates_are_brought_to_one_form_or_rejected(tmp_path, told, date):
    user = movie_user(profile=[movie_user()["profile"][0] | {"date": told}])
    [found] = LampFile(write(tmp_path / "a.json", [user]), MOVIE)
    assert (found.history[0].date if isinstance(found, User) else found.reason) == (
        date or "wrong type: profile[0].date"
    )


def test_labels_are_data(tmp_path):
    task, labels = TASKS["news_categorize"], ("u.s. news", "sports")
    question = task.question.format(labels=", ".join(labels), content="Who won?")
    record = {
        "user_id": "1",
        "profile": [{"id": "1", "title": "A goal", "text": "", "category": "Sports"}],
        "query": [{"id": "2", "input": question, "gold": "U.S. News"}],
    }
    file = LampFile(write(tmp_path / "a.json", [record]), task)
    [user] = file
    assert file.labels == labels
    assert user.history[0] == HistoryItem(id="1", content="A goal", target="sports")
    assert user.queries[0].target == "u.s. news"


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_labels_hold_for_the_whole_file_whatever_its_order(tmp_path, order):
    def user(name, tag, *labels):
        query = [{"id": "q", "input": movie_input("x", labels), "gold": labels[0]}] if labels else []
        return movie_user(name, profile=[{"id": "1", "description": "x", "tag": tag}], query=query)

    users = [user("a", "alpha", "alpha", "beta"), user("b", "Gamma", "beta", "gamma"), user("c", "gamma")]
    users.append(user("d", "comedy"))  # one of the task's labels, and none of this file's
    file = LampFile(write(tmp_path / "a.json", [users[n] for n in order]), MOVIE)
    found = {told.id: told.history[0].target if isinstance(told, User) else told.reason for told in file}
    assert found == {"a": "alpha", "b": "gamma", "c": "gamma", "d": "unknown label: profile[0].tag"}
    assert sorted(file.labels) == ["alpha", "beta", "gamma"]


def test_labels_take_the_spelling_in_which_they_first_stand(tmp_path):
    users = [
        movie_user(n, query=[{"id": "q", "input": movie_input("x", labels), "gold": labels[1]}])
        for n, labels in enumerate([("Sci-fi", "Comedy"), ("comedy", "sci - fi")])
    ]
    file = LampFile(write(tmp_path / "a.json", users), MOVIE)
    first, second = file
    assert file.labels == ("Sci-fi", "Comedy")
    assert [u.queries[0].target for u in (first, second)] == ["Comedy", "Sci-fi"]
    assert first.history == second.history and first.history[0].target == "Sci-fi"


@pytest.mark.parametrize(("labels", "reason"), [(("C", "C++"), "'C' and 'C\\+\\+'"), (("good", "👍"), "'👍' has no")])
def test_labels_that_answers_cannot_tell_apart_are_an_error(tmp_path, labels, reason):
    users = [
        movie_user(
            n,
            profile=[{"id": "1", "description": "x", "tag": labels[0]}],
            query=[{"id": "q", "input": movie_input("x", [label]), "gold": label}],
        )
        for n, label in enumerate(labels)
    ]
    file = write(tmp_path / "a.json", users)
    with pytest.raises(ValueError, match=f"a.json: the labels? {reason}.*rename"):
        list(LampFile(file, MOVIE))
    with pytest.raises(ValueError, match="rename"):
        LampFile(write(tmp_path / "b.json", [movie_user()]), MOVIE, labels=labels)


def test_citations_have_options_and_may_lack_the_profile_target(tmp_path):
    task = TASKS["citation"]
    question = task.question.format(content="On X", option_1="Older X", option_2="Y")
    records = [{"id": "1", "input": question, "profile": [{"id": "p", "title": "X again", "abstract": "Long."}]}]
    [user] = LampFile(write_questions(tmp_path, records, [{"id": "1", "output": "[2]"}], "LaMP_1"), task)
    assert user.queries[0] == Query(id="1", content="On X", target="[2]", options=("Older X", "Y"))
    assert user.history[0] == HistoryItem(id="p", content="X again", target="")


BAD = {
    "missing field: profile[0].tag": movie_user(profile=[{"id": "1", "description": "x"}]),
    "missing field: profile[0].description": movie_user(profile=[{"id": "1", "description": " ", "tag": "comedy"}]),
    "missing field: query[0].gold": movie_user(query=[{"id": "1", "input": movie_input("x")}]),
    "missing field: query": {"user_id": "bad", "profile": movie_user()["profile"]},
    "missing field: user_id": movie_user(user_id=None),
    "wrong type: profile": movie_user(profile={"id": "1"}),
    "wrong type: profile[0]": movie_user(profile=["text"]),
    "wrong type: profile[0].tag": movie_user(profile=[{"id": "1", "description": "x", "tag": ["comedy"]}]),
    "wrong type: profile[0].date": movie_user(profile=[movie_user()["profile"][0] | {"date": "yesterday"}]),
    "wrong type: record": 17,
    "wrong type: user_id": movie_user(user_id=True),
    "unknown label: query[0].gold": movie_user(query=[{"id": "1", "input": movie_input("x"), "gold": "western"}]),
    "unknown label: profile[0].tag": movie_user(profile=[{"id": "1", "description": "x", "tag": "western"}]),
    "unknown wording: query[0].input": movie_user(query=[{"id": "1", "input": "Which?", "gold": "comedy"}]),
    "empty profile": movie_user(profile=[]),
    "duplicate id": movie_user("first"),
    "duplicate id: query[1].id": movie_user(query=movie_user()["query"] * 2),
}


@pytest.mark.parametrize("reason", BAD)
@pytest.mark.parametrize("writer", [write, write_lines])
def test_a_bad_record_is_rejected_with_its_place_and_the_rest_is_read(tmp_path, reason, writer):
    record = BAD[reason] | {"user_id": "bad"} if "user_id" not in reason and "query" in reason else BAD[reason]
    path = writer(tmp_path / "a.json", [movie_user("first"), record, movie_user("last")])
    first, reject, last = LampFile(path, MOVIE)
    assert (first.id, last.id) == ("first", "last")
    wanted_id = {"wrong type: record": "", "missing field: user_id": ""}.get(reason)
    assert reject == Reject(file=path, position=1, id=reject.id if wanted_id is None else wanted_id, reason=reason)
    assert reject.kind == reason.partition(":")[0]


def test_nan_and_infinity_are_no_texts(tmp_path):
    odd = movie_user("MARK", profile=[{"id": "1", "description": "x", "tag": "comedy"}])
    lines = [json.dumps(odd).replace('"x"', value) for value in ("NaN", "-Infinity", "1e400")]
    lines.append(json.dumps(odd).replace('"MARK"', "NaN"))
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, json.dumps(movie_user())]))
    *rejects, last = LampFile(str(tmp_path / "a.jsonl"), MOVIE)
    assert [reject.reason for reject in rejects] == ["wrong type: profile[0].description"] * 3 + ["wrong type: user_id"]
    assert last == EXPECTED


def test_a_duplicate_is_told_from_a_record_that_was_rejected_before(tmp_path):
    path = write(tmp_path / "a.json", [movie_user("a"), movie_user("b", profile=[]), movie_user("b"), movie_user("a")])
    found = list(LampFile(path, MOVIE))
    assert [type(x).__name__ for x in found] == ["User", "Reject", "User", "Reject"]
    assert (found[3].id, found[3].reason) == ("a", "duplicate id")


@pytest.mark.parametrize("writer", [write, write_lines])
def test_broken_utf8_costs_one_record(tmp_path, writer):
    path = writer(tmp_path / "a.json", [movie_user("1"), movie_user("MARK"), movie_user("é"), movie_user("4")])
    data = (tmp_path / "a.json").read_bytes().replace(b"MARK", b"ab\xff\xc3c")
    (tmp_path / "a.json").write_bytes(data)
    found = list(LampFile(path, MOVIE))
    assert [x.id for x in found if isinstance(x, User)] == ["1", "é", "4"]
    [reject] = [x for x in found if isinstance(x, Reject)]
    assert (reject.position, reject.reason) == (1, "broken UTF-8")
    assert reject.id.startswith("ab") and reject.id.encode()


def test_a_character_across_read_buffers_is_not_broken(tmp_path):
    users = [
        movie_user(str(n), profile=[{"id": "1", "description": "é€😀" * 9_001, "tag": "action"}]) for n in range(9)
    ]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(users, ensure_ascii=False), encoding="utf-8")
    assert [u.history[0].content for u in LampFile(str(path), MOVIE)] == ["é€😀" * 9_001] * 9


def test_half_a_surrogate_pair_is_broken_too(tmp_path):
    path = tmp_path / "a.jsonl"
    text = json.dumps(movie_user("1")) + "\n" + json.dumps(movie_user("2")).replace("dreams", "\\ud800") + "\n"
    path.write_text(text)
    assert [getattr(x, "reason", "user") for x in LampFile(str(path), MOVIE)] == ["user", "broken UTF-8"]


@pytest.mark.parametrize("cut", [1, 2, 40, 400])
def test_a_truncated_array_says_where_it_ends(tmp_path, cut):
    path = tmp_path / "a.json"
    data = json.dumps([movie_user(str(n)) for n in range(40)])[:-cut]
    path.write_text(data)
    with pytest.raises(ValueError, match=rf"a\.json is cut off: it ends at byte {len(data)}") as caught:
        list(LampFile(str(path), MOVIE))
    assert "robot" not in str(caught.value) and "\n" not in str(caught.value)


def test_truncated_lines_and_a_bad_line_within(tmp_path):
    path, good = tmp_path / "a.jsonl", json.dumps(movie_user("1"))
    path.write_text(good + "\n{broken\n" + json.dumps(movie_user("2")) + "\n")
    assert [getattr(x, "reason", "user") for x in LampFile(str(path), MOVIE)] == ["user", "broken JSON", "user"]
    path.write_text(good + "\n" + good[:50])
    with pytest.raises(ValueError, match="is cut off"):
        list(LampFile(str(path), MOVIE))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON: it begins with nothing"),
        (b"hello", "not JSON: it begins with byte 0x68"),
        (b"\x1f\x8b\x08", "not JSON: it begins with gzip"),
        (b'[{"a": x}]', "not JSON: lexical error"),
        (b"[]", "not LaMP: it holds no records"),
        (b"[1, 2]", "not LaMP: it holds records that are numbers"),
        (b'[{"name": "x", "age": 3}]', "not LaMP: it holds records that are objects with 'name', 'age'; wanted"),
        (b'{\n "task": "LaMP_2",\n "golds": []\n}', "not LaMP: it holds one object with 'task', 'golds'"),
        (b'{"task": "LaMP_2", "golds": []}', "not LaMP: it holds records that are objects with 'task', 'golds'"),
    ],
)
def test_a_file_that_is_not_lamp(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        LampFile(str(path), MOVIE)
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_a_task_that_does_not_match(tmp_path):
    with pytest.raises(
        ValueError, match="questions of movie_tagging, not of news_headline; name movie_tagging as the task"
    ):
        LampFile(write(tmp_path / "a.json", [movie_user()]), HEADLINE)
    records = [{"id": "1", "input": movie_input("x"), "profile": movie_user()["profile"]}]
    with pytest.raises(ValueError, match="says that it is of task LaMP_5, not of movie_tagging"):
        LampFile(write_questions(tmp_path, records, [], "LaMP_5"), MOVIE)
    with pytest.raises(ValueError, match="in no LaMP task's wording"):
        LampFile(write(tmp_path / "b.json", [movie_user(query=[{"id": "1", "input": "?", "gold": "x"}])]), MOVIE)


def test_questions_need_their_answers(tmp_path):
    records = [{"id": "1", "input": movie_input("x"), "profile": movie_user()["profile"]}]
    path = write(tmp_path / "dev_questions.json", records)
    with pytest.raises(ValueError, match=r"without their answers; wanted .*dev_outputs\.json: put it there"):
        LampFile(path, MOVIE)
    other = write(tmp_path / "elsewhere.json", {"task": "LaMP_2", "golds": [{"id": "9", "output": "action"}]})
    [reject] = LampFile(path, MOVIE, outputs=other)
    assert reject.reason == "no answer in the outputs file"
    with pytest.raises(ValueError, match="wanted LaMP's outputs"):
        list(LampFile(path, MOVIE, outputs=write(tmp_path / "else.json", records)))


def test_questions_of_one_user_join(tmp_path):
    item = {"description": "x", "tag": "comedy"}
    records = [{"id": n, "user_id": "u", "input": movie_input(f"Film {n}."), "profile": [item] * n} for n in (1, 3, 2)]
    users = list(
        LampFile(write_questions(tmp_path, records, [{"id": n, "output": "action"} for n in (1, 3, 2)]), MOVIE)
    )
    assert [user.id for user in users] == ["u", "u", "u"]
    joined = join(users)
    assert len(joined.history) == 3
    assert [query.id for query in joined.queries] == ["1", "3", "2"]


def test_a_joined_history_holds_nothing_that_is_asked_about():
    old, answered = (HistoryItem(id="o", content=text, target="t") for text in ("An old film", "a first film!"))
    first = User(id="u", task="m", history=(old,), queries=(Query(id="1", content="A first film", target="t"),))
    second = User(id="u", task="m", history=(old, answered), queries=(Query(id="2", content="Another", target="t"),))
    assert join([first, second]).history == (old,)
    assert join([first, replace(second, history=(answered, answered))]).history == (
        old,
    )  # the longest has nothing left
    assert join([replace(first, history=(answered,)), replace(second, history=(answered,))]).history == ()


LONG = "A long text - longer than what is compared first, and then some"


def test_leaked_items_are_those_that_are_asked_about():
    history = tuple(
        HistoryItem(id=str(n), content=text, target="t") for n, text in enumerate(("A b!", "c", "a  B", "a b c", LONG))
    )
    asked = (Query(id="q", content="a b", target="t"), Query(id="r", content=LONG.upper(), target="t"))
    assert leaked_items(User(id="u", task="movie_tagging", history=history, queries=asked)) == 3
    other = (Query(id="q", content=LONG + " but another end", target="t"),)
    assert leaked_items(User(id="u", task="movie_tagging", history=history, queries=other)) == 0
    tweets = (HistoryItem(id="1", content="", target="Hello."), HistoryItem(id="2", content="", target="Bye"))
    asked = (Query(id="q", content="greetings", target="hello"),)
    assert leaked_items(User(id="u", task="tweet_paraphrase", history=tweets, queries=asked)) == 1


@pytest.mark.parametrize("opening", ["[", '{"a":', '[{"profile": '])
def test_brackets_without_end_are_told_before_they_take_all_memory(tmp_path, opening):
    (tmp_path / "deep.json").write_text("[" + opening * 200_000)
    with pytest.raises(ValueError, match="deep.json is not JSON: values nested thousands deep"):
        LampFile(str(tmp_path / "deep.json"), MOVIE)


CHUNK = 65_536
"""So many bytes ijson reads at once."""


@pytest.mark.parametrize("start", [5_000, CHUNK - 2_500, CHUNK - 1, CHUNK, 5 * CHUNK - 3_999])
def test_a_number_of_thousands_of_digits_is_told_wherever_it_stands(tmp_path, start):
    def text(filler):
        return json.dumps([movie_user("a" * 1_000, filler=filler, n=0)]).replace('"n": 0', '"n": -' + "9" * 5_000)

    path = tmp_path / "a.json"
    path.write_text(text("x" * (start - text("").index("9" * 5_000))))
    assert path.read_text().index("9" * 5_000) == start
    with pytest.raises(ValueError, match=r"a\.json is not JSON: a number of thousands of digits, in or after record"):
        list(LampFile(str(path), MOVIE))


@pytest.mark.parametrize("shift", [0, 1, 2, 3])
def test_thousands_of_digits_within_a_text_are_welcome(tmp_path, shift):
    told = "x" * shift + '\\"' * 20_000 + " pi: " + "3" * 70_000 + ', ["' + "\\\\"  # escapes over the first chunk's end
    users = [movie_user("a", profile=[{"id": "1", "description": told, "tag": "action"}])]
    assert [user.history[0].content for user in LampFile(write(tmp_path / "a.json", users), MOVIE)] == [told]


def test_an_exponent_that_no_number_has_is_told(tmp_path):
    (tmp_path / "a.json").write_text("[1e" + "9" * 30 + "]")
    with pytest.raises(ValueError, match=r"a\.json is not JSON: a number too large"):
        LampFile(str(tmp_path / "a.json"), MOVIE)
