"""A population through local Ray: what is stored is what the pieces say one by one, also after a stop in the middle."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from mta_ray.artifacts import open_artifact
from mta_ray.benchmarks.killed_population import parts_table, stored_rows
from mta_ray.files import alone_in
from mta_ray.pipeline.embed_users import item_texts
from mta_ray.population.crowd import simulate as crowd
from mta_ray.population.crowd.simulate import SimulatePopulationConfig, simulate_population
from mta_ray.population.people import simulate_user
from mta_ray.serving.banks import Banks
from mta_ray.serving.database import DatabaseConfig, open_database
from mta_ray.serving.identity import UserId
from mta_ray.serving.user_store import UserStore
from mta_ray.similarity.embedding import Encoder

pytestmark = pytest.mark.usefixtures("ray_local")

USERS = 230


def _config(folder: Path, **changes: object) -> SimulatePopulationConfig:
    settings: dict = {
        "users": USERS,
        "anchors": 5,
        "fitted_on": 40,
        "held_out": 20,
        "max_items": 4,
        "part_users": 50,
        "workers": 1,
        "store": str(folder / "store.db"),
        "out": str(folder / "population"),
    }
    return SimulatePopulationConfig(**settings | changes)


def _rows(store: Path) -> dict[str, list[tuple]]:
    return {table: sorted(rows) for table, rows in stored_rows(store).items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    simulate_population(_config(folder, grow_from=(60,)))
    return folder


def test_every_user_is_there_once_with_the_route_that_the_file_has(undisturbed: Path) -> None:
    table = parts_table(undisturbed / "population")
    assert table["number"].to_pylist() == list(range(USERS))
    assert len(set(table["user_id"].to_pylist())) == USERS

    database = open_database(DatabaseConfig(url=str(undisturbed / "store.db")))
    store = UserStore(database)
    assert store.counts("simulated").users == USERS
    (bank,) = sqlite3.connect(undisturbed / "store.db").execute("SELECT version FROM banks").fetchone()
    slots = {anchor: slot for slot, anchor in enumerate(Banks(database).get(bank).bank.anchors)}
    for row in table.slice(0, USERS).to_pylist()[::23]:
        state = store.read(UserId(tenant="simulated", id=row["user_id"]))
        assert state.has_route_for(bank)
        assert [slots[anchor] for anchor in state.route.anchors] == row["slots"]
        assert list(state.route.weights) == row["weights"]
        assert state.items == state.item_sum.items == len(store.read_history(state.user)) == 3
        np.testing.assert_allclose(state.item_sum.mean, row["mean"], rtol=1e-6)
    database.close()


def test_the_report_adds_up(undisturbed: Path) -> None:
    table = parts_table(undisturbed / "population")
    report = json.loads((undisturbed / "population" / "report.json").read_text())
    nearest = np.bincount([slots[0] for slots in table["slots"].to_pylist()], minlength=5)
    assert report["anchors"]["users"] == nearest.tolist()
    assert sum(report["anchors"]["weighted_load"]) == pytest.approx(USERS, rel=1e-5)
    assert report["cosines"]["mean_by_rank"][0] == pytest.approx(np.mean([c[0] for c in table["cosines"].to_pylist()]))
    assert [one["users"] for one in report["growth"]] == [60, USERS]
    assert report["store"]["bytes"] == (undisturbed / "store.db").stat().st_size
    assert not (undisturbed / "population.parts").exists()
    open_artifact(undisturbed / "population", kind="population")


def test_a_run_that_stopped_goes_on_to_the_same_end(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after two parts, and between a part's store and its file."""
    config = _config(tmp_path)
    whole = crowd.run_parts

    def stop_early(plan, parts, board) -> None:  # noqa: ANN001
        whole(plan, parts[:3], board)
        plan.file(1).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(crowd, "run_parts", stop_early)
        with pytest.raises(KeyboardInterrupt):
            simulate_population(config)
    assert not Path(config.out).exists()

    again: list[int] = []

    def noted(plan, parts, board) -> None:  # noqa: ANN001
        again.extend(parts)
        whole(plan, parts, board)

    monkeypatch.setattr(crowd, "run_parts", noted)
    simulate_population(config)
    assert again == [1, 3, 4]
    assert _rows(tmp_path / "store.db") == _rows(undisturbed / "store.db")
    assert parts_table(tmp_path / "population").equals(parts_table(undisturbed / "population"))

    again.clear()
    simulate_population(config)  # is current
    assert again == []
    lost = f"sim-{config.world.seed}-{USERS - 1}"
    with (
        closing(sqlite3.connect(tmp_path / "store.db")) as connection,
        connection,
    ):  # as many users as ever, but one is another's
        for table in ("histories", "citations"):
            connection.execute(f"DELETE FROM {table} WHERE user_id = ?", (lost,))
        connection.execute("UPDATE users SET user_id = 'stranger' WHERE user_id = ?", (lost,))
    simulate_population(config)  # the artifact is current, its store is not
    assert again == [0, 1, 2, 3, 4]
    found, wanted = _rows(tmp_path / "store.db"), _rows(undisturbed / "store.db")
    assert [row for row in found.pop("users") if "stranger" not in row] == wanted.pop("users")
    assert found == wanted


def test_encoded_users_have_the_encoders_vectors(tmp_path: Path) -> None:
    config = _config(tmp_path, users=30, embeddings="encoded", part_users=8)
    simulate_population(config)
    table = parts_table(tmp_path / "population")
    assert table["number"].to_pylist() == list(range(30))
    some = [simulate_user(config.world, number) for number in (0, 7, 8, 29)]
    wanted = Encoder().embed_users([item_texts(user, 4, 64) for user in some])
    means = np.array(table["mean"].to_pylist())
    np.testing.assert_allclose(means[[0, 7, 8, 29]], wanted, atol=1e-5)
    assert table["items"].to_pylist()[29] == len(some[-1].history)

    database = open_database(DatabaseConfig(url=config.store))
    history = UserStore(database).read_history(UserId(tenant="simulated", id=some[-1].id))
    database.close()
    assert [(item.content, item.target) for item in history] == [(i.content, i.target) for i in some[-1].history[-3:]]
    report = json.loads((tmp_path / "population" / "report.json").read_text())
    assert report["encoder"]["share_of_bare"] > 0


def test_two_runs_do_not_work_in_one_place(tmp_path: Path) -> None:
    config = _config(tmp_path)
    with alone_in(f"{config.out}.parts", "x"), pytest.raises(ValueError, match="another simulation is at work in"):
        simulate_population(config)
    assert not Path(config.store).exists()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"users": 0}, "users must be at least 1"),
        ({"grow_from": (300,)}, "grow_from must be ascending sizes below users"),
        ({"grow_from": (60,), "store": "postgresql://u@h/d"}, "only SQLite files"),
        ({"store": "postgresql://u:p@h/d"}, "store holds a password"),
        ({"store": "postgresql://u@h/d?password=p"}, "store holds a password"),
        ({"held_out": 19}, "held_out is 19"),
        ({"report": "r"}, "report and evaluated belong together"),
        ({"report": "r", "evaluated": "e"}, "give that bank too"),
        ({"out": "s3://bucket/x"}, "wanted a folder"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=complaint):
        dataclasses.replace(_config(tmp_path), **changes)
