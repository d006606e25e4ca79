import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mta_ray.artifacts import ArtifactError, open_artifact
from mta_ray.lamp.tasks import TASKS
from mta_ray.lamp.users import from_table
from mta_ray.pipeline.prepare_users import PrepareUsersConfig, prepare_users, read_users, users_dataset

HEADLINE = TASKS["news_headline"]


pytestmark = pytest.mark.usefixtures("ray_local")


def record(user_id, items=2):
    profile = [{"id": str(n), "text": f"text {n} of {user_id}", "title": f"title {n}"} for n in range(items)]
    query = [{"id": f"{user_id}-q", "input": HEADLINE.question.format(content=f"news {user_id}"), "gold": "gold"}]
    return {"user_id": user_id, "profile": profile, "query": query}


def write(path, records):
    path.write_text(json.dumps(records))
    return str(path)


def config(tmp_path, *files, **changes):
    return PrepareUsersConfig(files=files, task="LaMP-4", out=str(tmp_path / "users"), **changes)


def test_users_come_back_whole_from_however_many_shards(tmp_path):
    records = [record(f"u{n}", items=1 + n % 15) for n in range(150)]
    file, other = write(tmp_path / "a.json", records[:100]), write(tmp_path / "b.json", records[100:])
    one = Path(prepare_users(config(tmp_path, file, other)))
    together = list(read_users(one))
    assert [user.id for user in together] == [f"u{n}" for n in range(150)]  # one shard: the order of the files
    assert [len(user.history) for user in together] == [1 + n % 15 for n in range(150)]
    assert together[7].history[3].content == "text 3 of u7" and together[7].queries[0].content == "news u7"

    facts = open_artifact(one, kind="users").facts
    expected = {"records": 150, "users": 150, "few_shot_users": 100, "history_items": 10 * 120, "queries": 150}
    assert {name: facts[name] for name in expected} == expected
    assert (facts["rejects"], facts["leaked_items"], facts["labels"]) == (0, 0, [])

    many = Path(prepare_users(config(tmp_path / "more", file, other, shard_mib=0.01)))
    assert len(list(Path(many).glob("users-*.parquet"))) > 5
    assert sorted(read_users(many), key=lambda user: int(user.id[1:])) == together
    blocks = users_dataset(many).iter_batches(batch_format="pyarrow")
    assert sorted(user.id for block in blocks for user in from_table(block)) == sorted(user.id for user in together)


def test_rejects_are_written_with_their_reasons_also_across_files(tmp_path):
    first = write(tmp_path / "a.json", [record(f"u{n}") for n in range(30)] + [record("empty", items=0)])
    second = write(tmp_path / "b.json", [record("v"), record("u7"), record("v")])
    out = Path(prepare_users(config(tmp_path, first, second, max_reject_share=0.1, shard_mib=0.002)))
    rejects = pq.read_table(out / "rejects.parquet").to_pylist()
    assert sorted((r["file"], r["position"], r["id"], r["reason"]) for r in rejects) == [
        (first, 30, "empty", "empty profile"),
        (second, 1, "u7", "duplicate id"),
        (second, 2, "v", "duplicate id"),
    ]
    assert len(list(read_users(out))) == 31
    facts = open_artifact(out, kind="users").facts
    assert (facts["records"], facts["rejects_by_reason"]) == (34, {"duplicate id": 2, "empty profile": 1})


def test_too_many_rejects_stop_the_run_and_publish_nothing(tmp_path):
    records = [record(f"u{n}") for n in range(71)] + [record(f"x{n}", items=0) for n in range(28)] + [record("u3")]
    file = write(tmp_path / "a.json", records)
    with pytest.raises(ValueError, match="29 of 100 records rejected, more than the share 0.28: .*1 dup") as caught:
        prepare_users(config(tmp_path, file, max_reject_share=0.28))
    assert [f"record {n}:" in str(caught.value) for n in (70, 71, 75, 76)] == [False, True, True, False]
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert Path(prepare_users(config(tmp_path, file, max_reject_share=0.29))).is_dir()  # 0.29 * 100 < 29 in floats


def test_a_truncated_file_is_one_clear_error_and_what_was_there_stays(tmp_path):
    good = write(tmp_path / "a.json", [record(f"u{n}") for n in range(40)])
    out = Path(prepare_users(config(tmp_path, good)))
    bad = tmp_path / "b.json"
    bad.write_text(Path(good).read_text()[:-50])
    with pytest.raises(ValueError, match=r"b\.json is cut off"):
        prepare_users(config(tmp_path, str(bad)))
    assert len(list(read_users(out))) == 40
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def question(number, user_id, items, *, about=""):
    profile = record(user_id, items)["profile"] + [{"id": "a", "text": about, "title": "gold"}] * bool(about)
    asked = HEADLINE.question.format(content=f"news {number}")
    return {"id": number, "input": asked, "profile": profile} | ({"user_id": user_id} if user_id else {})


def write_questions(path, questions):
    golds = [{"id": q["id"], "output": f"gold {q['id']}"} for q in questions]
    write(path.with_name(f"{path.name}_outputs.json"), {"task": "LaMP_4", "golds": golds})
    return write(path.with_name(f"{path.name}_questions.json"), questions)


def test_questions_of_a_user_become_one_user_wherever_they_stand(tmp_path):
    train = write_questions(tmp_path / "train", [question(1, "a", 2), question(2, "b", 1), question(3, "a", 3)])
    dev = write_questions(tmp_path / "dev", [question(4, "a", 2), question(2, "b", 5)])
    out = Path(prepare_users(config(tmp_path, train, dev, max_reject_share=0.5)))
    a, b = read_users(out)
    assert (a.id, len(a.history), [(q.id, q.target) for q in a.queries]) == (
        "a",
        3,
        [("1", "gold 1"), ("3", "gold 3"), ("4", "gold 4")],
    )
    assert (b.id, len(b.history)) == ("b", 1)  # its question came twice: the second is rejected
    [reject] = pq.read_table(out / "rejects.parquet").to_pylist()
    assert (reject["file"], reject["position"], reject["reason"]) == (dev, 1, "duplicate id")


def test_who_asks_is_joined_by_name_alone_and_without_the_answers(tmp_path):
    file = write_questions(
        tmp_path / "a",
        [
            question(1, "u", 2),
            question(2, "u", 2, about="News 1"),  # holds the first question, with its answer
            question(3, "all", 0, about="news 4"),  # the two hold nothing but each other
            question(4, "all", 0, about="news 3"),
            question(7, None, 1),  # goes by its own id: not the user who is called 7
        ],
    )
    other = write_questions(tmp_path / "b", [question(8, "7", 3)])
    out = Path(prepare_users(config(tmp_path, file, other, max_reject_share=0.5)))
    u, seven = read_users(out)
    assert (u.id, [item.target for item in u.history], len(u.queries)) == ("u", ["title 0", "title 1"], 2)
    assert (seven.id, [query.id for query in seven.queries]) == ("7", ["7"])
    rejects = pq.read_table(out / "rejects.parquet").to_pylist()
    assert sorted((r["file"], r["position"], r["reason"]) for r in rejects) == [
        (file, 2, "all of the profile is asked about"),
        (file, 3, "all of the profile is asked about"),
        (other, 0, "duplicate id"),
    ]
    facts = open_artifact(out, kind="users").facts
    assert (facts["users"], facts["leaked_items"], facts["left_out_items"]) == (2, 0, 1)


def test_a_finished_artifact_is_not_made_again_unless_something_changed(tmp_path):
    file = write(tmp_path / "a.json", [record(f"u{n}") for n in range(5)])
    manifest = Path(prepare_users(config(tmp_path, file))) / "manifest.json"
    first = manifest.stat().st_ino
    prepare_users(config(tmp_path, file))
    assert manifest.stat().st_ino == first
    prepare_users(config(tmp_path, file, force=True))
    forced = manifest.stat().st_ino
    assert forced != first
    write(tmp_path / "a.json", [record(f"u{n}") for n in range(6)])
    prepare_users(config(tmp_path, file))
    assert len(list(read_users(tmp_path / "users"))) == 6


def test_labels_and_leaks_of_the_data_are_told(tmp_path, caplog):
    task = TASKS["news_categorize"]
    asked = task.question.format(labels="u.s. news, sports", content="Who won?")
    users = [
        {
            "user_id": str(n),
            "profile": [{"id": "1", "text": "Who won?", "category": "sports"}],
            "query": [{"id": "q", "input": asked, "gold": "sports"}],
        }
        for n in range(3)
    ]
    file = write(tmp_path / "a.json", users)
    out = Path(prepare_users(PrepareUsersConfig(files=(file,), task="news_categorize", out=str(tmp_path / "users"))))
    facts = open_artifact(out, kind="users").facts
    assert (facts["labels"], facts["leaked_items"]) == (["u.s. news", "sports"], 3)
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == 1 and "3 of 3 history items are asked about" in told[0]


def test_the_limit_counts_records_of_each_file(tmp_path):
    files = [write(tmp_path / f"{name}.json", [record(f"{name}{n}") for n in range(9)]) for name in "ab"]
    out = Path(prepare_users(config(tmp_path, *files, limit=2)))
    assert [user.id for user in read_users(out)] == ["a0", "a1", "b0", "b1"]


def test_settings_are_checked_at_the_door(tmp_path):
    with pytest.raises(ValueError, match="no files"):
        prepare_users(config(tmp_path))
    with pytest.raises(ValueError, match="max_reject_share is 5"):
        config(tmp_path, "x", max_reject_share=5.0)
    with pytest.raises(ValueError, match="no such file"):
        prepare_users(config(tmp_path, str(tmp_path / "none.json")))
    with pytest.raises(ArtifactError, match="nothing there"):
        next(read_users(tmp_path / "none"))
