"""Stages on real Ray: as jobs on a cluster that asks for a token; on a cluster of their own; their progress."""

from __future__ import annotations

import json
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import psutil
import pytest
import yaml

from mta_ray.cli import COMPARISON, SIMULATIONS, STAGES
from mta_ray.cluster import ClusterConfig, connect
from mta_ray.pipeline.progress import follow, open_board

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A running cluster of this test run alone, and what its commands need in their environment."""

    address: str
    dashboard: str
    environment: dict[str, str]

    def submit(self, working_dir: Path, *entrypoint: str) -> subprocess.CompletedProcess[str]:
        """`ray job submit`, until the job ends."""
        command = ["job", "submit", "--address", self.dashboard, "--working-dir", str(working_dir), "--", *entrypoint]
        return run_ray(command, self.environment)


def run_ray(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ray.scripts.scripts", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500, cwd="/")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """`ray start --head` with token authentication, on free ports, with its own token and its own folder.

    The head runs in the foreground of a process of ours (--block): killing that and its children ends this cluster and
    no other.
    """
    token = tmp_path_factory.mktemp("token") / "auth_token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    # Unix sockets lie in it, and their paths have at most 107 characters.
    folder = Path("/tmp") / f"mta-{secrets.token_hex(4)}"
    port, dashboard, client, metrics, agent = free_ports(5)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "PYTHONPATH": "",  # what a job finds, it finds in its working directory
    }
    head = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2"]
        + ["--node-ip-address=127.0.0.1", f"--port={port}", f"--temp-dir={folder}"]
        + [f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
        + [f"--metrics-export-port={metrics}", f"--dashboard-agent-listen-port={agent}"]
        + [f"--object-store-memory={150 * 2**20}", "--disable-usage-stats"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
    )
    try:
        cluster = Cluster(
            address=f"127.0.0.1:{port}", dashboard=f"http://127.0.0.1:{dashboard}", environment=environment
        )
        wait_for_jobs(cluster, head, agent)
        yield cluster
    finally:
        if head.poll() is None:
            for process in [*psutil.Process(head.pid).children(recursive=True), head]:
                process.kill()
        head.wait(timeout=300)
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(n: int) -> list[int]:
    """Ports that nobody listens at, and that neither the system (from 32768 on) nor Ray (up to 19999) gives to others
    while the cluster starts: a dashboard agent that finds its port taken ends, and the cluster with it."""
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(20000, 32768), 100):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            ports.append(port)
    return ports[:n]


def wait_for_jobs(cluster: Cluster, head: subprocess.Popen[bytes], agent: int) -> None:
    """Until the cluster takes jobs: its dashboard answers, and so does the agent that runs them."""
    for _ in range(12):
        assert head.poll() is None, "the head of the cluster ended before it took a job"
        listed = run_ray(["job", "list", "--address", cluster.dashboard], cluster.environment)
        if listed.returncode == 0:
            break
    else:
        raise AssertionError(f"the cluster takes no jobs: {listed.stderr[-2000:]}")
    for _ in range(240):
        assert head.poll() is None, "the head of the cluster ended before it took a job"
        with suppress(OSError), socket.create_connection(("127.0.0.1", agent), timeout=1):
            return
        time.sleep(0.5)
    raise AssertionError("the cluster's agent does not listen")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a person submits with `--working-dir .`: the package and the jobs."""
    folder = tmp_path_factory.mktemp("checkout")
    for part in ("mta_ray", "jobs"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


# ---- every stage that can run on a few users; a line here for each


def write_lamp(folder: Path) -> Path:
    """Twelve users in the processed form: eight of them with 12 items, four few-shot."""
    question = (
        "Which tag does this movie relate to among the following tags? Just answer with the tag name without further "
        "explanation. tags: [sci-fi, based on a book, comedy, action, twist ending, dystopia, dark comedy, classic, "
        "psychology, fantasy, romance, thought-provoking, social commentary, violence, true story] description: "
    )
    users = [
        {
            "user_id": f"u{i}",
            "profile": [
                {"id": f"{i}-{n}", "description": f"a film about {n}", "tag": "comedy"}
                for n in range(12 if i < 8 else 3)
            ],
            "query": [{"id": f"q{i}", "input": f"{question}a film about {i}", "gold": "action"}],
        }
        for i in range(12)
    ]
    (folder / "lamp.json").write_text(json.dumps(users))
    return folder / "lamp.json"


def prepare_users_settings(folder: Path) -> dict[str, object]:
    return {"files": [str(write_lamp(folder))], "task": "movie_tagging", "out": str(folder / "users")}


# The stages of one small population, in their order; each reads what the one before it left.
SPLIT = {"max_few_shot": 4, "max_rest": 1}
ONE = {"actors": 1}
ORDER = ("simulate-users", "embed-users", "train-base", "build-bank", "adapt-users", "evaluate")


def chain_settings(folder: Path) -> dict[str, dict[str, object]]:
    place = {name: str(folder / name) for name in ("users", "embeddings", "base", "bank", "user-states", "report")}
    reads = {"users": place["users"], "embeddings": place["embeddings"]}
    taught = reads | {"base": place["base"]}
    return {
        "simulate-users": {"users": 40, "world": {"queries": 2, "max_items": 20}, "out": place["users"]},
        "embed-users": {"users": place["users"], "actors": 1, "max_items": 4, "out": place["embeddings"]},
        "train-base": reads | {"mode": "none", "split": SPLIT, "out": place["base"]},
        "build-bank": taught | {"anchors": 2, "train": {"steps": 2}, "split": SPLIT, "out": place["bank"]},
        "adapt-users": taught
        | {
            "bank": place["bank"],
            "stack": {"rank": 1, "steps": 2},
            "split": SPLIT,
            "workers": ONE,
            "out": place["user-states"],
        },
        "evaluate": taught
        | {
            "bank": place["bank"],
            "states": place["user-states"],
            "oppu": {"steps": 2},
            "split": SPLIT,
            "workers": ONE,
            "out": place["report"],
        },
    }


def test_every_stage_has_a_job_that_shows_its_submit_line() -> None:
    jobs = {path.stem for path in (ROOT / "jobs").glob("*.py")}
    submitted = [*STAGES, *(stage for stage in SIMULATIONS if stage.name == "simulate population")]
    names = {stage.name: stage.name.replace("-", "_").replace(" ", "_") for stage in submitted}
    assert {job for job in jobs if not job.startswith("benchmark_")} == set(names.values())
    names["benchmark"] = "benchmark_methods"
    for stage in (*submitted, *COMPARISON):
        script = f"jobs/{names[stage.name]}.py"
        text = (ROOT / script).read_text()
        assert f"ray job submit --working-dir . -- python {script} --config " in text
        assert f'run_stage("{stage.name}")' in text


ONE_BY_ONE = """
    import runpy
    import sys
    folder, *names = sys.argv[1:]
    for name in names:  # as `python jobs/NAME.py --config FILE`, without importing everything each time
        sys.argv = [f"jobs/{name.replace('-', '_')}.py", "--config", f"{folder}/{name}.yaml"]
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
"""


def submit_stage(name: str, settings: dict[str, object], cluster: Cluster, checkout: Path, folder: Path) -> Path:
    """Submit one stage's job, wait for it, and return the result that it names."""
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    script = f"jobs/{name.replace('-', '_')}.py"
    done = cluster.submit(checkout, sys.executable, script, "--config", str(folder / "settings.yaml"))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    said = [line for line in done.stdout.splitlines() if line.startswith(str(folder))]
    return Path(said[-1])


def test_submitted_prepare_users_leaves_its_result_where_it_says(cluster, checkout, tmp_path) -> None:
    settings = prepare_users_settings(tmp_path)
    out = submit_stage("prepare-users", settings, cluster, checkout, tmp_path)
    assert str(out) == settings["out"]
    assert json.loads((out / "manifest.json").read_text())["facts"]["users"] == 12
    saved = yaml.safe_load(Path(f"{out}.config.yaml").read_text())
    assert {key: saved[key] for key in settings} == settings


def test_one_submitted_job_leads_from_people_to_a_report_and_each_stages_job_finds_its_part(
    cluster: Cluster, checkout: Path, tmp_path: Path
) -> None:
    # 1. all stages as one job
    chain = chain_settings(tmp_path)
    stages: dict[str, object] = {"split": SPLIT}
    for name, setting in (("embed", "embed-users"), ("base", "train-base"), ("bank", "build-bank")):
        stages[name] = {
            k: v for k, v in chain[setting].items() if k in ("actors", "max_items", "mode", "train", "anchors")
        }
    stages |= {"adapt": {"stack": chain["adapt-users"]["stack"], "workers": ONE}}
    stages |= {"evaluate": {"oppu": {"steps": 2}, "workers": ONE}}
    users = {"users": 40, "world": {"queries": 2, "max_items": 20}}
    settings = {"out": str(tmp_path), "users": users, "stages": stages}
    out = submit_stage("quickstart", settings, cluster, checkout, tmp_path)
    assert out == tmp_path / "report"
    report = json.loads((out / "report.json").read_text())
    assert report["few_shot_users"] == 4
    assert 4 <= report["users"] <= 5  # of 40 people one more with a long history may be drawn
    assert set(report["methods"]) >= {"non_personalised", "rag", "oppu", "nearest_anchor", "mta_fusion", "mta"}
    assert set(report["methods"]) >= {"as_released", "oracle"}
    assert report["methods"]["mta"]["bytes_per_user"] > report["methods"]["mta_fusion"]["bytes_per_user"] > 0

    # 2. each stage's script, with the same settings: its result is there, and is kept; the last one is made anew
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/manifest.json")}
    assert len(kept) == len(ORDER)
    shutil.copytree(tmp_path / "report", tmp_path / "first")
    assert (tmp_path / "quickstart.config.yaml").is_file()
    whole = yaml.safe_load((tmp_path / "report.config.yaml").read_text())
    assert set(whole) >= {"states", "oppu", "split"}  # of the report alone
    for name in ORDER:
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(chain[name]))
    (checkout / "one_by_one.py").write_text(textwrap.dedent(ONE_BY_ONE))
    done = cluster.submit(checkout, sys.executable, "one_by_one.py", str(tmp_path), *ORDER)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    said = [line for line in done.stdout.splitlines() if line.startswith(str(tmp_path))]
    assert said == [chain[name]["out"] for name in ORDER]
    again = json.loads((tmp_path / "report" / "report.json").read_text())
    same = [pd.read_parquet(place / "predictions.parquet") for place in (tmp_path / "first", tmp_path / "report")]
    assert again["title"] != report["title"] and same[0].equals(same[1])
    changed = [path.parent.name for path, when in kept.items() if path.stat().st_mtime_ns != when]
    assert changed == ["report"]  # whose title is another


def test_a_submitted_job_runs_all_stages(cluster, checkout, tmp_path) -> None:
    users = {"files": [str(write_lamp(tmp_path))], "task": "movie_tagging"}
    stages = {
        "split": SPLIT,
        "embed": {"actors": 1, "max_items": 4},
        "base": {"mode": "none"},
        "bank": {"anchors": 2, "train": {"steps": 2}},
        "adapt": {"stack": {"rank": 1, "steps": 2}, "workers": ONE},
        "evaluate": {"oppu": {"steps": 2}, "workers": ONE},
    }
    settings = {"out": str(tmp_path / "all"), "users": users, "stages": stages}
    out = submit_stage("run", settings, cluster, checkout, tmp_path)
    methods = json.loads((out / "report.json").read_text())["methods"]
    assert "mta" in methods and "oracle" not in methods


def test_a_job_with_bad_settings_fails_with_one_message(cluster: Cluster, checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("fils: []")
    done = cluster.submit(
        checkout, sys.executable, "jobs/prepare_users.py", "--config", str(tmp_path / "settings.yaml")
    )
    assert done.returncode != 0
    assert "no setting is called 'fils'; did you mean 'files'?" in done.stdout
    assert "Traceback" not in done.stdout


def test_the_cluster_asks_for_a_token(cluster: Cluster) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{cluster.dashboard}/api/jobs/", timeout=300)
    assert refused.value.code == 401


JOB = """
    import ray
    from mta_ray.cluster import ClusterConfig, connect

    @ray.remote
    def where():
        import mta_ray
        return mta_ray.__file__

    with connect(ClusterConfig({config})):
        print("CLUSTER", ray.get_runtime_context().gcs_address)
        print("WORKER", ray.get(where.remote()))
    print("CONNECTED", ray.is_initialized())
"""


def told(output: str, word: str) -> str:
    """What the script printed after `word`."""
    return next(line.split(" ", 1)[1] for line in output.splitlines() if line.startswith(word + " "))


def test_a_job_joins_its_own_cluster_and_its_workers_find_the_package(
    cluster: Cluster, checkout: Path, tmp_path: Path
) -> None:
    (checkout / "probe.py").write_text(textwrap.dedent(JOB.format(config="")))
    done = cluster.submit(checkout, sys.executable, "probe.py")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert told(done.stdout, "CLUSTER").split(":")[1] == cluster.address.split(":")[1]
    assert "/runtime_resources/" in told(done.stdout, "WORKER")  # the submitted files, not another copy
    assert told(done.stdout, "CONNECTED") == "False"


@pytest.mark.parametrize("is_named", [True, False])
def test_a_script_joins_a_running_cluster_only_by_its_name(is_named: bool, cluster: Cluster, tmp_path: Path) -> None:
    """RAY_ADDRESS in the shell is not enough. The workers find the package though its folder is not the current one."""
    script = tmp_path / "probe.py"
    script.write_text(textwrap.dedent(JOB.format(config=f"address={cluster.address!r}" if is_named else "cpus=1")))
    environment = {**cluster.environment, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": cluster.address}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert (told(done.stdout, "CLUSTER").split(":")[1] == cluster.address.split(":")[1]) == is_named
    worker = Path(told(done.stdout, "WORKER"))
    assert worker.is_relative_to(ROOT) != is_named  # a named cluster may be elsewhere: it is sent the package
    assert told(done.stdout, "CONNECTED") == "False"


# ---- one cluster for the rest of this file


def test_where_a_local_cluster_says_its_dashboard_is_nobody_answers(ray_local) -> None:
    """Ray Train asks there whether its controller lives; another cluster's dashboard would say no and end training."""
    from ray._private import ray_constants
    from ray.experimental.internal_kv import _internal_kv_get

    said = _internal_kv_get(ray_constants.DASHBOARD_ADDRESS, namespace=ray_constants.KV_NAMESPACE_DASHBOARD).decode()
    host, port = said.rsplit(":", 1)
    assert int(port) != ray_constants.DEFAULT_DASHBOARD_PORT
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), timeout=5)


def test_connect_uses_a_connection_that_is_there_and_leaves_it(ray_local: None) -> None:
    import ray

    before = ray.get_runtime_context().gcs_address
    with connect(ClusterConfig(address="no.such.host:1")):
        assert ray.get_runtime_context().gcs_address == before
    assert ray.is_initialized()


def test_progress_of_workers_comes_to_the_driver(ray_local: None) -> None:
    import ray

    board = open_board()

    @ray.remote(num_cpus=0.5)
    def work(source: int) -> None:
        for done in (1, 2, 3):
            ray.get(board.report.remote("packs", str(source), done))
            ray.get(board.add.remote("users", 10))

    with follow(board, "packs", 6, "packs") as packs, follow(board, "users", 60, "users") as users:
        ray.get([work.remote(source) for source in (0, 1)])
    assert (packs.done, users.done) == (6, 60)

    # a pack that is trained again is not counted twice
    ray.get(board.report.remote("packs", "0", 1))
    assert ray.get(board.done.remote("packs")) == 4
    assert ray.get(board.done.remote("nothing")) == 0


def test_a_board_that_is_gone_does_not_stop_the_work(ray_local: None) -> None:
    import ray

    board = open_board()
    ray.get(board.add.remote("users", 1))
    ray.kill(board)
    with pytest.raises(ray.exceptions.RayActorError):  # it takes a moment
        while True:
            ray.get(board.add.remote("users", 0))
    with follow(board, "users", 2, "users") as meter:
        meter.advance(2)
    assert meter.done == 2


FAILS = """
    import ray
    from mta_ray.cli import message_of, root_cause
    from mta_ray.cluster import ClusterConfig, connect

    def fail(batch):
        raise ValueError("file a.json holds no users; give others")

    with connect(ClusterConfig(cpus=1)):
        for run in (
            lambda: ray.get(ray.remote(fail).remote({})),
            lambda: ray.data.range(4).map_batches(fail).materialize(),
        ):
            try:
                run()
            except Exception as error:
                cause = root_cause(error)
                print(type(cause).__name__, message_of(cause))
"""


def test_an_error_in_a_worker_comes_back_as_it_was_raised_and_is_told_once(tmp_path: Path) -> None:
    """Through a task, and through Ray Data, which would wrap it, print it and lose the original."""
    (tmp_path / "probe.py").write_text(textwrap.dedent(FAILS))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "probe.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.stdout.splitlines() == ["ValueError file a.json holds no users; give others"] * 2
    assert "file a.json" not in done.stderr and "Dataset" not in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"object_store_mib": 50}, "object_store_mib is 50, wanted at least 75"),
        ({"cpus": 0}, "cpus is 0, wanted at least 1"),
        ({"address": "http://127.0.0.1:8265"}, "wanted host:port of the head node"),
        ({"address": ""}, "wanted host:port of the head node"),
    ],
)
def test_a_cluster_that_cannot_be_is_told_before_it_starts(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClusterConfig(**wrong)  # type: ignore[arg-type]
