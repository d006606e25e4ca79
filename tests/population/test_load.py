"""A short load run on a real service: nothing wrong is found in it, and what is planted is found."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mta_ray.artifacts import open_artifact
from mta_ray.cluster import ClusterConfig
from mta_ray.population.load.afterwards import Afterwards
from mta_ray.population.load.rows import Row
from mta_ray.population.load.service import OwnServiceConfig, own_service
from mta_ray.population.load.simulate import LoadRun, SimulateLoadConfig, run_load, simulate_load
from mta_ray.population.load.traffic import TrafficConfig
from mta_ray.population.load.verdicts import judge, telling
from mta_ray.serving.args import AutoscaleConfig
from mta_ray.serving.database import DatabaseConfig, open_database
from mta_ray.serving.user_store import UserStore

TRAFFIC = TrafficConfig(
    seconds=20.0, sessions_per_s=1.5, users=40, think_s=1.0, new_share=0.15, update_share=0.15, stack_share=0.1,
    delete_share=0.1, settled_s=4.0, seed=9,
)  # fmt: skip
SERVICE = OwnServiceConfig(cpus_per_replica=0.4, autoscale=AutoscaleConfig(max_replicas=0))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> SimulateLoadConfig:
    """Of the run, all but where the service listens."""
    folder = tmp_path_factory.mktemp("load")
    return SimulateLoadConfig(
        url="http://127.0.0.1:1", base=str(folder / "base"), bank=str(folder / "bank"), marked=18, traffic=TRAFFIC
    )


@pytest.fixture(scope="module")
def run(ray_local: None, config: SimulateLoadConfig) -> Iterator[LoadRun]:
    """Twenty seconds of load on a service that stood there before, and stands there after."""
    with own_service(SERVICE, ClusterConfig(), Path(config.base or "").parent) as own:
        run = run_load(replace(config, url=own.url))
        store = UserStore(open_database(DatabaseConfig(url=str(Path(own.base).parent / "users.db"))))
        assert sum(row.kind == "history" for row in run.rows) > 0 and store.counts("default").users == 0
    yield run


def test_every_answer_is_its_own_users(run: LoadRun) -> None:
    verdicts = judge(run.rows, run.book)
    told = Counter(verdicts)
    assert told["wrong"] == told["wrong_user"] == told["failed"] == 0, told
    told_to = [(row.user, verdict) for row, verdict in zip(run.rows, verdicts, strict=True) if row.kind == "ask"]
    # who asked for a stack cannot be judged from then on
    stacked = {row.user for row in run.rows if row.kind == "stack" and row.status == 202}
    assert any(user in stacked and verdict == "unchecked" for user, verdict in told_to)
    asks = [verdict for user, verdict in told_to if user not in stacked]
    assert len(asks) >= 20 and asks.count("ok") >= 0.9 * len(asks)
    users = {row.user for row in run.rows}
    assert min(users) < 18 and any(18 <= user < 40 for user in users) and max(users) >= 40
    assert {row.kind for row in run.rows} == {"ask", "history", "stack", "delete"}
    assert run.book is not None and (telling(run.rows, verdicts, run.book) or 0) > 0.9
    streams = [row for row in run.rows if row.is_stream and row.status == 200]
    assert streams and all(row.ttft_ms is not None and 0 < row.ttft_ms <= row.total_ms for row in streams)
    assert all(row.tokens <= row.most_tokens for row in run.rows)
    assert run.afterwards == Afterwards(users=len(users | set(range(18))))
    tries = len(run.rows) + sum(row.retried for row in run.rows)
    assert run.locust["requests"] == tries
    assert all(sample.running == 1 for sample in run.samples if sample.running is not None)
    assert any(sample.running == 1 for sample in run.samples)


@pytest.mark.parametrize("prompts_apart", [0, 1])
def test_answers_of_swapped_users_are_found(run: LoadRun, prompts_apart: int) -> None:
    """Two users' expectations change places: whoever asked as one of them was told what belongs to the other."""
    book = run.book
    assert book is not None
    changed = {row.user for row in run.rows if row.kind == "history"}
    asked = Counter(row.user for row in run.rows if row.kind == "ask" and row.user in book.stacks.keys() - changed)
    one = asked.most_common(1)[0][0]
    other = next(user for user in book.stacks if (user - one) % 3 == prompts_apart and user != one)
    right = judge(run.rows, book)

    def swap() -> None:
        mine, yours = book.stacks[one], book.stacks[other]
        book.give(one, yours)
        book.give(other, mine)
        book.marked[one], book.marked[other] = book.marked[other], book.marked[one]

    swap()
    try:
        found = judge(run.rows, book)
    finally:
        swap()
    for row, before, after in zip(run.rows, right, found, strict=True):
        if row.kind == "ask" and row.user in (one, other) and before == "ok":
            assert after == "wrong_user" if row.user not in changed else after != "ok"
        elif row.user not in (one, other):
            assert after == before
    assert "wrong_user" in found


def test_a_wrong_text_is_wrong_and_a_lost_answer_failed(run: LoadRun) -> None:
    place, row = next(
        (place, row)
        for place, (row, verdict) in enumerate(zip(run.rows, judge(run.rows, run.book), strict=True))
        if row.kind == "ask" and verdict == "ok"
    )
    for change, verdict in (
        ({"text": row.text + " x"}, "wrong"),
        ({"text": ""}, "wrong"),
        ({"status": 500, "error": "status 500"}, "failed"),
        ({"status": 0, "error": "stream without an end"}, "failed"),
        ({"status": 503, "error": "busy"}, "503"),
    ):
        rows = [*run.rows[:place], replace(row, **change), *run.rows[place + 1 :]]
        assert judge(rows, run.book)[place] == verdict
    assert judge(run.rows, None)[place] == "unchecked"


def test_histories_that_change_places_are_found(run: LoadRun) -> None:
    """What a service would do that mixes up two newcomers' histories, and says so by their anchors."""
    book = run.book
    assert book is not None
    right = judge(run.rows, book)
    firsts: dict[int, Row] = {}
    for row, verdict in zip(run.rows, right, strict=True):
        if row.kind == "history" and verdict == "ok" and row.user not in book.marked:
            firsts.setdefault(row.user, row)
    assert len(firsts) >= 4
    asked = Counter(
        row.user for row, verdict in zip(run.rows, right, strict=True) if row.kind == "ask" and verdict == "ok"
    )
    one = max(firsts, key=lambda user: asked[user])
    other = next(user for user in firsts if (user - one) % 6)
    swapped = {id(firsts[one]): firsts[other], id(firsts[other]): firsts[one]}

    # both are told anchors that their own text does not lead to, and answered by them
    rows = [replace(row, item=swapped[id(row)].item) if id(row) in swapped else row for row in run.rows]
    found = judge(rows, book)
    for row, before, after in zip(run.rows, right, found, strict=True):
        if id(row) in swapped:
            assert after == "wrong"
        elif row.user not in (one, other):
            assert after == before
    assert any(
        before == "ok" and after in ("wrong", "wrong_user")
        for row, before, after in zip(run.rows, right, found, strict=True)
        if row.kind == "ask" and row.user == one
    )


def test_a_question_beside_a_change_may_have_either_answer(run: LoadRun) -> None:
    book = run.book
    assert book is not None
    book.expected(998, ())  # somebody else whom every anchor answers alike; the others are nobody's but this user's
    old, new, tokens = ((0, 0.6), (1, 0.4)), ((1, 0.7), (2, 0.3)), 12
    said = {anchors: book.text(book.expected(999, anchors), tokens) for anchors in (old, new, ())}
    assert len(set(said.values())) == 3

    def change(kind: str, from_s: float, to_s: float, anchors=None, status: int = 200) -> Row:  # noqa: ANN001
        return Row(at_s=from_s, kind=kind, user=999, is_stream=False, most_tokens=0, sent_s=from_s, ended_s=to_s,
                   status=status, anchors=anchors and list(anchors))  # fmt: skip

    def verdict(from_s: float, to_s: float, answer: tuple, *changes: Row) -> str:
        ask = Row(at_s=from_s, kind="ask", user=999, is_stream=False, most_tokens=tokens, sent_s=from_s, ended_s=to_s,
                  status=200, text=said[answer])  # fmt: skip
        return judge([*changes, ask], book)[-1]

    first, second = change("history", 1.0, 2.0, old), change("history", 5.0, 6.0, new)
    assert verdict(3.0, 4.0, old, first, second) == "ok"
    assert verdict(3.0, 4.0, new, first, second) == "wrong"
    assert verdict(3.0, 4.0, (), first, second) == "wrong_user"
    assert verdict(5.5, 7.0, old, first, second) == verdict(5.5, 7.0, new, first, second) == "ok"
    assert verdict(7.0, 8.0, old, first, second) == "wrong"  # stale
    assert verdict(0.2, 0.5, (), first, second) == "ok"
    gone = change("delete", 9.0, 10.0)
    assert verdict(11.0, 12.0, (), first, second, gone) == "ok"
    assert verdict(11.0, 12.0, new, first, second, gone) == "wrong"
    book.expected(998, new)
    assert verdict(11.0, 12.0, new, first, second, gone) == "wrong_user"
    trained = change("stack", 7.0, 7.1, status=202)
    assert verdict(8.0, 8.5, new, first, second, trained) == "unchecked"
    assert verdict(11.0, 12.0, (), first, second, trained, gone) == "ok"
    lost = change("history", 7.0, 7.1, status=503)
    assert verdict(8.0, 8.5, new, first, second, lost) == "unchecked"


def test_the_stage_publishes_a_report_and_rests(
    run: LoadRun, config: SimulateLoadConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run of this file again, from its rows: the service is not asked twice."""
    runs = []
    monkeypatch.setattr("mta_ray.population.load.simulate.run_load", lambda config: runs.append(config) or run)
    config = replace(config, out=str(tmp_path / "load"))
    assert simulate_load(config) == simulate_load(config) == str(tmp_path / "load")
    assert len(runs) == 1
    artifact = open_artifact(tmp_path / "load", kind="load")
    report = json.loads((artifact.path / "report.json").read_text())
    assert report["simulation"] == "load" and report["all"]["requests"] == len(run.rows) == artifact.facts["requests"]
    assert pq.read_table(artifact.path / "requests.parquet").num_rows == len(run.rows)
    assert (artifact.path / "report.html").stat().st_size > 1000

    # a run in which somebody was told something wrong fails, when it is made and when it lies there
    verdicts = judge(run.rows, run.book)
    place = next(n for n, row in enumerate(run.rows) if row.kind == "ask" and verdicts[n] == "ok")
    wrong = [*run.rows[:place], replace(run.rows[place], text="never said"), *run.rows[place + 1 :]]
    monkeypatch.setattr("mta_ray.population.load.simulate.run_load", lambda config: replace(run, rows=wrong))
    config = replace(config, out=str(tmp_path / "wrong"))
    for _ in range(2):
        with pytest.raises(ValueError, match="1 of .* answered wrongly, 0 of them as another user"):
            simulate_load(config)
    assert open_artifact(tmp_path / "wrong", kind="load").facts["wrong"] == 1

    # so does one with a failure, unless it may have some, and one whose service did not do what it had said
    failed = [*run.rows[:place], replace(run.rows[place], status=500), *run.rows[place + 1 :]]
    stacked = {row.user for row in run.rows if row.kind == "stack" and row.status == 202}
    unjudged = [
        row
        for row, verdict in zip(run.rows, verdicts, strict=True)
        if row.user in stacked and (row.kind != "ask" or verdict == "unchecked")
    ]
    for number, (seen, complaint) in enumerate(
        (
            (replace(run, rows=failed), "1 of .* requests failed, which is more than failed_share 0"),
            (replace(run, afterwards=Afterwards(users=3, lost=1)), "of 1 users the service had said what was not so"),
            (replace(run, rows=unjudged), "none of .* answers could be judged"),
        )
    ):
        monkeypatch.setattr("mta_ray.population.load.simulate.run_load", lambda config, seen=seen: seen)
        with pytest.raises(ValueError, match=complaint):
            simulate_load(replace(config, out=str(tmp_path / f"bad-{number}")))
    monkeypatch.setattr("mta_ray.population.load.simulate.run_load", lambda config: replace(run, rows=failed))
    simulate_load(replace(config, out=str(tmp_path / "some"), failed_share=0.1))


def test_an_endpoint_is_named_or_made() -> None:
    for settings in (
        {},
        {"serve": True, "url": "http://x"},
        {"serve": True, "base": "b", "bank": "c"},
        {"url": "x"},
        {"url": "http://a:b@x"},
    ):
        with pytest.raises(ValueError, match="url|--serve"):
            SimulateLoadConfig(**settings)
    with pytest.raises(ValueError, match="go together"):
        SimulateLoadConfig(url="http://x", base="b")
