"""A population through local Ray: what is stored is what the pieces say one by one, also after a stop in the middle."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy.exc import OperationalError

from mta_ray.artifacts import open_artifact
from mta_ray.benchmarks.killed_population import parts_table, stored_rows
from mta_ray.files import alone_in
from mta_ray.lora.fusion_config import FusionConfig
from mta_ray.pipeline.embed_users import item_texts
from mta_ray.population.crowd import parts as crowd_parts
from mta_ray.population.crowd import simulate as crowd
from mta_ray.population.crowd.sample import FIRST
from mta_ray.population.crowd.simulate import MARK, SimulatePopulationConfig, simulate_population
from mta_ray.population.crowd.vectors import load_model
from mta_ray.population.people import WorldConfig, simulate_user, user_name
from mta_ray.serving.banks import Banks
from mta_ray.serving.database import DatabaseConfig, open_database
from mta_ray.serving.identity import UserId
from mta_ray.serving.user_store import UserStore
from mta_ray.similarity.embedding import Encoder

pytestmark = pytest.mark.usefixtures("ray_local")

USERS = 230
FITTED, HELD_OUT, ITEMS = 40, 20, 4


def _config(folder: Path, **changes: object) -> SimulatePopulationConfig:
    settings: dict = {
        "users": USERS,
        "anchors": 5,
        "fitted_on": FITTED,
        "held_out": HELD_OUT,
        "max_items": ITEMS,
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


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> Path:
    """Folder `run` of a run that stopped after some parts: 0 and 2 are whole, 1 was stored and not written, 3 is
    damaged. `kept` is a copy of it.
    """
    folder = tmp_path_factory.mktemp("stopped")
    whole = crowd.run_parts

    def stop_early(plan, parts, board) -> None:  # noqa: ANN001
        whole(plan, parts[:4], board)
        plan.file(1).unlink()
        damaged = plan.file(3).read_bytes()
        plan.file(3).write_bytes(damaged[:-200] + b"\xff" * 192 + damaged[-8:])
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crowd, "run_parts", stop_early)
        with pytest.raises(KeyboardInterrupt):
            simulate_population(_config(folder / "run"))
    shutil.copytree(folder / "run", folder / "kept")
    return folder


@pytest.fixture(scope="module")
def sample() -> np.ndarray:
    """Mean vectors of the sample, encoded here."""
    world = WorldConfig()
    users = [simulate_user(world, FIRST + number) for number in range(FITTED + HELD_OUT)]
    return Encoder().embed_users([item_texts(user, ITEMS, 64) for user in users])


@pytest.fixture
def parts_run(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the parts that runs really do."""
    run: list[int] = []
    whole = crowd.run_parts

    def noted(plan, parts, board) -> None:  # noqa: ANN001
        run.extend(parts)
        whole(plan, parts, board)

    monkeypatch.setattr(crowd, "run_parts", noted)
    return run


def _anchors(folder: Path) -> list[str]:
    with closing(open_database(DatabaseConfig(url=str(folder / "store.db")))) as database:
        (bank,) = sqlite3.connect(folder / "store.db").execute("SELECT version FROM banks").fetchone()
        return [anchor.id for anchor in Banks(database).get(bank).bank.anchors]


def _cosines(means: np.ndarray, sample: np.ndarray, anchors: list[str]) -> np.ndarray:
    """Of users to these anchors, who are users of the sample."""
    rows = [int(anchor.rsplit("-")[-1]) - FIRST for anchor in anchors]
    assert max(rows) < FITTED
    moved, center = means - sample[:FITTED].mean(axis=0), sample[:FITTED].mean(axis=0)
    vectors = sample[rows] - center
    norms = np.linalg.norm(moved, axis=1)[:, None] * np.linalg.norm(vectors, axis=1)
    return moved @ vectors.T / norms


def _check_routes(folder: Path, sample: np.ndarray, temperature: float) -> None:
    """Every row of the files against cosines and softmax of its own vector."""
    table = parts_table(folder / "population")
    found = {name: np.array(table[name].to_pylist()) for name in ("mean", "slots", "weights", "cosines")}
    cosines = _cosines(found["mean"], sample, _anchors(folder))
    wanted = -np.sort(-cosines, axis=1)[:, :4]
    np.testing.assert_allclose(found["cosines"], wanted, atol=1e-4)
    np.testing.assert_allclose(np.take_along_axis(cosines, found["slots"], axis=1), wanted, atol=1e-4)
    shares = np.exp(wanted / temperature)
    np.testing.assert_allclose(found["weights"], shares / shares.sum(axis=1, keepdims=True), atol=2e-3)


def test_every_user_is_routed_by_the_own_vector(undisturbed: Path, sample: np.ndarray) -> None:
    _check_routes(undisturbed, sample, 0.1)
    fidelity = json.loads((undisturbed / "population" / "report.json").read_text())["fidelity"]
    cosines = np.sort(_cosines(sample[FITTED:], sample, _anchors(undisturbed)), axis=1)
    assert fidelity["mean_nearest_cosine"]["encoded"] == pytest.approx(cosines[:, -1].mean(), abs=1e-4)
    assert fidelity["mean_kth_cosine"]["encoded"] == pytest.approx(cosines[:, -4].mean(), abs=1e-4)


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


def test_drawn_users_have_the_texts_of_whom_they_were_drawn_from(stopped: Path, undisturbed: Path) -> None:
    (file,) = (stopped / "kept" / "population.parts").glob("model-*.npz")
    drawn = load_model(file).draw(0, 0, USERS)
    table = parts_table(undisturbed / "population")
    np.testing.assert_allclose(np.array(table["mean"].to_pylist()), drawn.means, atol=1e-4)
    with closing(open_database(DatabaseConfig(url=str(undisturbed / "store.db")))) as database:
        for number in range(0, USERS, 23):
            history = UserStore(database).read_history(UserId(tenant="simulated", id=f"sim-0-{number}"))
            donor = simulate_user(WorldConfig(), FIRST + int(drawn.donors[number])).history[-3:]
            assert [(item.content, item.target) for item in history] == [(item.content, item.target) for item in donor]


def test_another_setting_begins_anew_and_leaves_the_stores_users(
    stopped: Path, tmp_path: Path, sample: np.ndarray, parts_run: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(stopped / "kept", folder)
    config = _config(folder, fusion=FusionConfig(temperature=0.5))
    before = set(_rows(folder / "store.db")["users"])
    simulate_population(config)
    assert parts_run == [0, 1, 2, 3, 4]
    _check_routes(folder, sample, 0.5)
    assert len(before) == 200 and before < set(_rows(folder / "store.db")["users"])
    report = json.loads((folder / "population" / "report.json").read_text())
    assert report["store"]["kept_as_they_were"] == 200
    assert "200 users were in the store already" in (folder / "population" / "report.html").read_text()

    def begun(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(crowd, "_make", begun)
    with pytest.raises(KeyboardInterrupt):  # the artifact is current, the store has its users with other routes
        simulate_population(config)


def test_a_run_that_stopped_goes_on_to_the_same_end(undisturbed: Path, stopped: Path, parts_run: list[int]) -> None:
    """Also where it stopped between a part's store and its file, and where a file is damaged."""
    home = stopped / "run"
    config = _config(home)
    assert not Path(config.out).exists()
    simulate_population(config)
    assert parts_run == [1, 3, 4]
    assert _rows(home / "store.db") == _rows(undisturbed / "store.db")
    assert parts_table(home / "population").equals(parts_table(undisturbed / "population"))

    parts_run.clear()
    simulate_population(config)  # is current
    assert parts_run == []
    lost = f"sim-{config.world.seed}-{USERS - 1}"
    with (
        closing(sqlite3.connect(home / "store.db")) as connection,
        connection,
    ):  # as many users as ever, but one is another's
        for table in ("histories", "citations"):
            connection.execute(f"DELETE FROM {table} WHERE user_id = ?", (lost,))
        connection.execute("UPDATE users SET user_id = 'stranger' WHERE user_id = ?", (lost,))
    simulate_population(config)  # the artifact is current, its store is not
    assert parts_run == [0, 1, 2, 3, 4]
    found, wanted = _rows(home / "store.db"), _rows(undisturbed / "store.db")
    assert [row for row in found.pop("users") if "stranger" not in row] == wanted.pop("users")
    assert found == wanted


def test_a_store_that_lost_anybody_is_known(undisturbed: Path, tmp_path: Path) -> None:
    parts = sorted((undisturbed / "population").glob("part-*.parquet"))
    shutil.copy(undisturbed / "store.db", tmp_path / "store.db")
    tenant = _config(undisturbed).tenant
    assert crowd._are_stored(str(tmp_path / "store.db"), tenant, parts) == [True] * 5
    with closing(open_database(DatabaseConfig(url=str(tmp_path / "store.db")))) as database:
        UserStore(database).delete(UserId(tenant=tenant, id=user_name(0, 77)))  # no part's last one
    assert crowd._are_stored(str(tmp_path / "store.db"), tenant, parts) == [False] * 5


@pytest.mark.parametrize("failures", [2, 4])
def test_a_store_that_is_away_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int) -> None:
    monkeypatch.setattr(crowd_parts, "AWAY_S", (0.0, 0.0, 0.0))
    errors = [OperationalError("INSERT", {}, Exception("the connection was closed"))] * failures

    class Flaky(UserStore):
        def add_users(self, new):  # noqa: ANN001, ANN202
            if errors:
                raise errors.pop()
            return super().add_users(new)

    store_part = object.__new__(crowd_parts.StorePart)
    with closing(open_database(DatabaseConfig(url=str(tmp_path / "store.db")))) as database:
        store_part.store = Flaky(database)
        if failures == 2:
            assert store_part._add([]) == 0 and not errors
        else:
            with pytest.raises(RuntimeError, match="is away .OperationalError.*run the same command again"):
                store_part._add([])


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


@pytest.mark.parametrize("force", [False, True])
def test_what_is_not_ours_stays(tmp_path: Path, force: bool) -> None:
    config = _config(tmp_path, force=force)
    # 1. beside OUT
    precious = tmp_path / "population.parts" / "precious.txt"
    precious.parent.mkdir()
    precious.write_text("mine")
    with pytest.raises(ValueError, match=r"population.parts holds 'precious.txt' and no .*choose another --out"):
        simulate_population(config)
    assert [path.name for path in precious.parent.iterdir()] == ["precious.txt"]

    # 2. at OUT: what a stopped run left stays too
    (precious.parent / MARK).touch()
    Path(config.out).mkdir()
    (Path(config.out) / "theirs.txt").touch()
    with pytest.raises(ValueError, match="a folder without a manifest"):
        simulate_population(config)
    assert precious.read_text() == "mine"
    assert not Path(config.store or "").exists()


@pytest.mark.parametrize(
    "place", ["{}/population/store.db", "{}/population.parts/s.db", "sqlite:///{}/population/s.db"]
)
def test_a_store_in_what_is_replaced_is_refused(place: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="would be lost.*choose another place"):
        _config(tmp_path, store=place.format(tmp_path))
    _config(tmp_path, store=f"sqlite:///{tmp_path}/population.db")


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
