"""The doors: settings from defaults, file and command line; what a person is told; exit codes."""

from __future__ import annotations

import errno
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Literal

import pytest
import ray

from mta_ray.cli import ALL, BAD_INPUT, FAILED, OK, STOPPED, Stage, main, run_stage
from mta_ray.cluster import ClusterConfig, connect
from mta_ray.errors import is_lasting, root_cause
from mta_ray.settings import load_settings, save_settings


class Fusion(Enum):
    EXACT = 1
    LINEAR = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    peak: float = 1e-4
    steps: int = 100

    def __post_init__(self) -> None:
        if self.peak <= 0:
            raise ValueError(f"peak is {self.peak}, wanted more than 0; choose a rate such as 1e-4")


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """A stage of these tests."""

    out: Path
    """Where the result goes."""
    task: Literal["movie_tagging", "product_rating"] = "movie_tagging"
    """Which task."""
    files: tuple[str, ...] = ()
    span: tuple[int, int] = (1, 2)
    limit: int | None = None
    force: bool = False
    fusion: Fusion = Fusion.EXACT
    shares: dict[str, float] = field(default_factory=dict)
    rates: Rates = field(default_factory=lambda: Rates(steps=20))
    """Its steps are not those of Rates: a file that sets one field of it must keep the other."""
    fails: str = ""


def demo(config: Demo) -> Path:
    """Write one file, or go wrong in the way that the settings ask for."""
    if config.fails == "value":
        raise ValueError("bank /b holds rank 8, the model has slots of rank 4; rebuild the bank")
    if config.fails == "file":
        (config.out / "missing.json").read_text()
    if config.fails == "full":
        raise OSError(28, os.strerror(28), str(config.out))
    if config.fails == "bug":
        {}["k"]  # noqa: B018
    if config.fails == "interrupt":
        raise KeyboardInterrupt
    if config.fails == "exit":
        sys.exit(0)  # what Ray Train does with Ctrl-C
    if config.fails == "wait":
        config.out.with_suffix(".ready").touch()
        time.sleep(60)
    if config.fails == "wait for ray":
        with connect(ClusterConfig(cpus=1)):
            config.out.with_suffix(".ready").touch()
            ray.get(ray.remote(_sleep).remote(60))
    config.out.mkdir(parents=True)
    (config.out / "result.txt").write_text(config.task)
    return config.out


def _sleep(seconds: float) -> None:  # Ray takes no function of C
    time.sleep(seconds)


DEMO = Stage(name="demo", help="", module=__name__, config="Demo", function="demo")


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "demo.yaml"
    path.write_text(text)
    return path


# ---- settings


def test_the_later_one_wins_defaults_file_command_line(tmp_path: Path) -> None:
    file = write(tmp_path, "out: a\nlimit: 5\ntask: product_rating\nrates:\n  peak: 1e-3\n")
    assert load_settings(Demo, None, ["--out", "a"]) == Demo(out=Path("a"))
    from_file = load_settings(Demo, file, [])
    assert from_file == Demo(out=Path("a"), limit=5, task="product_rating", rates=Rates(peak=1e-3, steps=20))
    both = load_settings(Demo, file, ["--limit", "7", "--rates.steps", "3"])
    assert both == Demo(out=Path("a"), limit=7, task="product_rating", rates=Rates(peak=1e-3, steps=3))


def test_a_file_need_not_be_whole(tmp_path: Path) -> None:
    """What the file leaves out, even a value that has no default and a check that fails without it, may follow."""
    assert load_settings(Demo, write(tmp_path, "limit: 5"), ["--out", "b"]) == Demo(out=Path("b"), limit=5)
    assert load_settings(Demo, write(tmp_path, ""), ["--out", "b"]) == Demo(out=Path("b"))
    broken = write(tmp_path, "out: b\nrates: {peak: -1}")
    assert load_settings(Demo, broken, ["--rates.peak", "2"]).rates == Rates(peak=2.0, steps=20)
    with pytest.raises(SystemExit) as end:
        load_settings(Demo, broken, [])
    assert end.value.code == BAD_INPUT


def test_every_type_of_value_comes_from_yaml(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "out: 'on'\nfiles: [2024-01-01, off, '1']\nspan: [3, 010]\nlimit: null\nforce: true\nfusion: LINEAR\n"
        "shares: {a: 1, b: .5, c: 2E-3, d: .inf}\n",
    )
    got = load_settings(Demo, file, [])
    assert got.files == ("2024-01-01", "off", "1")  # YAML 1.1 would make a date and a False of them
    assert got.span == (3, 10)  # and 8 of 010
    assert (got.out, got.limit, got.force, got.fusion) == (Path("on"), None, True, Fusion.LINEAR)
    assert got.shares == {"a": 1.0, "b": 0.5, "c": 0.002, "d": math.inf}
    assert all(type(share) is float for share in got.shares.values())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("limt: 3", ["'limt'", "did you mean 'limit'"]),
        ("rates: {stepps: 3}", ["'rates.stepps'", "did you mean 'steps'"]),
        ("limit: many", ["limit is 'many' (str)", "wanted a int"]),
        ("limit: 1.5", ["limit is 1.5 (float)"]),
        ("limit: true", ["limit is True (bool)"]),
        ("force: 1", ["force is 1 (int)", "true or false"]),
        ("force: yes", ["force is 'yes' (str)", "true or false"]),
        ("rates: {peak: high}", ["rates.peak is 'high' (str)", "wanted a float"]),
        ("rates: 3", ["rates is 3 (int)", "peak, steps"]),
        (
            "task: movie_taging",
            ["task is 'movie_taging'", "movie_tagging, product_rating", "did you mean 'movie_tagging'"],
        ),
        ("fusion: EXAKT", ["fusion is 'EXAKT'", "did you mean 'EXACT'"]),
        ("files: a.json", ["files is 'a.json' (str)", "a list"]),
        ("files: [1]", ["files[0] is 1 (int)", "text"]),
        ("span: [1, 2, 3]", ["span is [1, 2, 3]", "a list of 2 values"]),
        ("out:", ["out is None (nothing)", "a path"]),
        ("limit: 1\nlimit: 2", ["'limit'", "2 times"]),
        ("- a", ["the file is ['a'] (list)"]),
        ("a: [", ["is not YAML"]),
        ("a: !!python/object/apply:os.getcwd []", ["is not YAML"]),
    ],
)
def test_a_wrong_file_is_told_by_file_key_got_wanted(tmp_path: Path, text: str, words: list[str]) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ValueError) as told:
        load_settings(Demo, file, ["--out", "a"])
    for word in [str(file), *words]:
        assert word in str(told.value)


def test_a_file_that_is_missing_or_not_text_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no settings file at .*none.yaml"):
        load_settings(Demo, tmp_path / "none.yaml", [])
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"bytes\.yaml"):
        load_settings(Demo, tmp_path / "bytes.yaml", [])


def test_what_is_saved_makes_the_same_settings_again(tmp_path: Path) -> None:
    config = Demo(
        out=tmp_path / "users",
        files=("a: b", "ü", "1e5", "true", "null"),
        fusion=Fusion.LINEAR,
        shares={"x": 1e-7, "y": math.inf, "z": 1e20},
        rates=Rates(peak=3e-5),
        limit=4,
    )
    saved = save_settings(config.out, config)
    assert saved == str(tmp_path / "users.config.yaml")
    assert load_settings(Demo, saved, []) == config
    assert list(tmp_path.iterdir()) == [Path(saved)]  # nothing temporary stays


def test_settings_are_saved_in_an_object_store() -> None:
    config = Demo(out=Path("x"))
    saved = save_settings("memory://bucket/users", config)
    assert saved == "memory://bucket/users.config.yaml"
    assert load_settings(Demo, saved, []) == config


# ---- the command


def test_help_is_a_page_that_names_every_stage_and_comes_without_heavy_imports() -> None:
    code = (
        "import sys; from mta_ray.cli import main; code = main(['--help']);"
        "heavy = {'torch', 'ray', 'transformers', 'pandas', 'numpy', 'tyro'} & set(sys.modules);"
        "print('heavy:', sorted(heavy)); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == OK, done.stderr
    assert "heavy: []" in done.stdout
    positions = [done.stdout.index(f"\n    {stage.name} ") for stage in ALL]
    assert positions == sorted(positions)
    assert max(map(len, done.stdout.splitlines())) <= 120


def test_without_arguments_the_page_is_shown_and_the_code_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == BAD_INPUT
    assert "USAGE" in capsys.readouterr().out
    assert main(["--version"]) == OK


def test_an_unknown_stage_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bild-bank"]) == BAD_INPUT
    assert "did you mean 'build-bank'" in capsys.readouterr().err


def test_a_stage_says_where_its_result_and_its_settings_lie(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, "task: product_rating")
    out = tmp_path / "users"
    assert run_stage(DEMO, ["--config", str(file), "--out", str(out), "--limit", "3"]) == OK
    told = capsys.readouterr()
    assert told.out == f"{out}\n"
    assert (out / "result.txt").read_text() == "product_rating"
    saved = tmp_path / "users.config.yaml"
    assert str(saved) in told.err
    assert load_settings(Demo, saved, []) == Demo(out=out, task="product_rating", limit=3)


def test_stage_help_lists_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_stage(DEMO, ["--help"]) == OK
    told = capsys.readouterr().out
    assert "--out" in told and "Where the result goes." in told and "--rates.peak" in told


@pytest.mark.parametrize("stage", ALL, ids=lambda stage: stage.name)
def test_every_stage_loads_and_explains_each_setting(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    config_type, function = stage.load()
    assert callable(function)
    assert main([*stage.name.split(), "--help"]) == OK
    told = capsys.readouterr().out
    for setting in fields(config_type):
        assert f"--{setting.name.replace('_', '-')}" in told, setting.name


@pytest.mark.parametrize(
    ("fails", "code", "message"),
    [
        ("value", BAD_INPUT, "mta demo: bank /b holds rank 8, the model has slots of rank 4; rebuild the bank"),
        ("file", BAD_INPUT, "mta demo: No such file or directory: OUT/missing.json"),
        ("full", FAILED, "mta demo: No space left on device: OUT; free some space, then run the same command to go on"),
        ("bug", FAILED, "mta demo: KeyError: 'k'; --debug shows where"),
        ("interrupt", STOPPED, "stopped; finished stages are kept, run the same command to go on"),
        ("exit", STOPPED, "stopped; finished stages are kept, run the same command to go on"),
    ],
)
def test_an_error_is_one_message_and_a_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fails: str, code: int, message: str
) -> None:
    out = tmp_path / "users"
    args = ["--out", str(out), "--fails", fails]
    assert run_stage(DEMO, args) == code
    told = capsys.readouterr()
    assert told.err == message.replace("OUT", str(out)) + "\n"
    assert told.out == ""
    assert list(tmp_path.iterdir()) == []  # neither result nor settings

    assert run_stage(DEMO, [*args, "--debug"]) == code
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args", [["--config"], ["--config", "--force"], ["--config", "a", "--config=b"], ["--config="]]
)
def test_config_without_a_file_or_twice_is_told(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_stage(DEMO, args) == BAD_INPUT
    assert capsys.readouterr().err.startswith("mta demo: --config ")


@pytest.mark.parametrize("args", [["--out", "a", "--no-such", "1"], ["--out", "a", "--limit", "x"], []])
def test_a_wrong_command_line_is_code_2_without_a_traceback(
    args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_stage(DEMO, args) == BAD_INPUT
    told = capsys.readouterr().err
    assert told and "Traceback" not in told


@pytest.mark.parametrize("work", ["wait", "wait for ray"])
@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_a_polite_kill_stop_with_one_line(tmp_path: Path, kill: signal.Signals, work: str) -> None:
    code = (
        "import signal, sys; from mta_ray.cli import Stage, run_stage;"
        "signal.signal(signal.SIGINT, signal.default_int_handler);"  # a test run in the background ignores Ctrl-C
        "demo = Stage(name='demo', help='', module='test_cli', config='Demo', function='demo');"
        f"sys.exit(run_stage(demo, ['--out', {str(tmp_path / 'users')!r}, '--fails', {work!r}]))"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])}
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=env) as process:
        deadline_s = time.monotonic() + 90
        while not (tmp_path / "users.ready").exists() and time.monotonic() < deadline_s:
            time.sleep(0.05)
        process.send_signal(kill)
        _, told = process.communicate(timeout=300)
    assert process.returncode == STOPPED, told
    told = told.removeprefix("ray local: 1 CPUs, 0 GPUs\n")
    assert told == "stopped; finished stages are kept, run the same command to go on\n"


def test_an_error_of_ours_is_found_beneath_what_ray_wraps_around_it() -> None:
    from ray.exceptions import RayTaskError
    from ray.train import ControllerError, WorkerGroupError

    ours = ValueError("file a.json is not LaMP; give --files others")
    task = RayTaskError("f", "Traceback\n" * 30, ours)
    group = WorkerGroupError("worker 1: " + "Traceback\n" * 30, {1: ours})
    wrapped = [task, task.as_instanceof_cause(), group, ControllerError(group), ControllerError(task)]
    assert all(root_cause(error) is ours for error in wrapped)
    other = OSError("no")
    assert root_cause(other) is other


def test_what_would_happen_again_is_told_from_what_a_new_try_may_mend() -> None:
    from ray.exceptions import ActorDiedError
    from ray.train import WorkerGroupError

    gone, broken = ActorDiedError(), RuntimeError("Connection closed by peer")
    assert not is_lasting(WorkerGroupError("", {0: broken, 1: gone}))
    assert not is_lasting(ConnectionError("away"))
    assert is_lasting(WorkerGroupError("", {0: broken, 1: ValueError("rank must be at least 1")}))
    assert is_lasting(OSError(errno.ENOSPC, "No space left on device"))
