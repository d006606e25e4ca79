"""The `mta` command, and the jobs: parse, call one stage's function, say where the result lies.

Nothing heavy is imported before a stage is chosen, so that `mta --help` answers at once.
"""

from __future__ import annotations

import errno
import importlib
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from mta_ray.errors import root_cause

OK, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 130


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage as the doors see it: a config dataclass, and a function from it to where the result lies.

    Or one that `is_told`: then the function gives the text that is to be printed, and nothing is written beside it.
    """

    name: str
    help: str
    module: str
    config: str
    function: str
    is_told: bool = False

    def load(self) -> tuple[type, Callable[[Any], Any]]:
        """The config type and the function; imports what the stage needs."""
        module = importlib.import_module(self.module)
        return getattr(module, self.config), getattr(module, self.function)


STAGES = (
    Stage(
        name="simulate-users",
        help="a population of users with known traits, in LaMP's form",
        module="mta_ray.population.synthesize",
        config="SimulateUsersConfig",
        function="simulate_users",
    ),
    Stage(
        name="prepare-users",
        help="LaMP files in, users out, with the records that were refused and why",
        module="mta_ray.pipeline.prepare_users",
        config="PrepareUsersConfig",
        function="prepare_users",
    ),
    Stage(
        name="embed-users",
        help="one vector per user, from the user's history",
        module="mta_ray.pipeline.embed_users",
        config="EmbedUsersConfig",
        function="embed_users",
    ),
    Stage(
        name="train-base",
        help="teach the base model the task: a task adapter, or all weights of a small model",
        module="mta_ray.pipeline.train_base",
        config="TrainBaseConfig",
        function="train_base",
    ),
    Stage(
        name="build-bank",
        help="choose anchor users and train one meta-LoRA for each, many at once",
        module="mta_ray.pipeline.build_bank",
        config="BuildBankConfig",
        function="build_bank",
    ),
    Stage(
        name="adapt-users",
        help="fuse the nearest anchors for each user and stack a small LoRA on top",
        module="mta_ray.pipeline.adapt_users",
        config="AdaptUsersConfig",
        function="adapt_users",
    ),
    Stage(
        name="evaluate",
        help="score every way of personalising on the users' queries and write the report",
        module="mta_ray.evaluation.run",
        config="EvaluateConfig",
        function="evaluate",
    ),
    Stage(
        name="run",
        help="all stages on your own LaMP files",
        module="mta_ray.evaluation.quickstart",
        config="RunConfig",
        function="run",
    ),
    Stage(
        name="quickstart",
        help="all stages on a simulated population; needs nothing, takes minutes",
        module="mta_ray.evaluation.quickstart",
        config="QuickstartConfig",
        function="quickstart",
    ),
)
COMPARISON = (
    Stage(
        name="benchmark",
        help="every method on every data set, with seeds, budgets, intervals and costs",
        module="mta_ray.comparison.run",
        config="BenchmarkConfig",
        function="benchmark",
    ),
)
"""Which method is better, and how sure that is."""
EXTRA_OF = {"faiss": "cpu", "psycopg": "postgres", "mlflow": "mlflow", "s3fs": "s3", "locust": "load"}
"""The extra of pyproject.toml that brings a package."""
WHOLE = ("run", "quickstart")
"""Stages that run all the others."""
BANKS = (
    Stage(
        name="bank list",
        help="the versions in a bank store: when built, anchors, rank, base, size",
        module="mta_ray.bank_commands.look",
        config="ListBanksConfig",
        function="list_banks",
        is_told=True,
    ),
    Stage(
        name="bank show",
        help="what a bank is made of, anchor by anchor",
        module="mta_ray.bank_commands.look",
        config="ShowBankConfig",
        function="show_bank",
        is_told=True,
    ),
    Stage(
        name="bank diff",
        help="two banks: anchors, settings, how far each kept anchor has moved",
        module="mta_ray.bank_commands.diff",
        config="DiffBanksConfig",
        function="diff_banks",
        is_told=True,
    ),
    Stage(
        name="bank verify",
        help="every checksum, shape and value of a bank",
        module="mta_ray.bank_commands.keep",
        config="VerifyBankConfig",
        function="verify_bank",
        is_told=True,
    ),
    Stage(
        name="bank import",
        help="take a bank into a store, as a version that never changes",
        module="mta_ray.bank_commands.keep",
        config="ImportBankConfig",
        function="import_bank",
        is_told=True,
    ),
    Stage(
        name="bank export",
        help="an anchor, or a user fused and stacked, as one PEFT adapter",
        module="mta_ray.bank_commands.export",
        config="ExportConfig",
        function="export_adapter",
        is_told=True,
    ),
    Stage(
        name="bank prune",
        help="remove old versions from a store",
        module="mta_ray.bank_commands.keep",
        config="PruneBanksConfig",
        function="prune_banks",
        is_told=True,
    ),
)
"""What banks are kept with: a bank store is a folder or URL of versions."""
SIMULATIONS = (
    Stage(
        name="simulate population",
        help="millions of simulated users through embedding, routing and the user store",
        module="mta_ray.population.crowd.simulate",
        config="SimulatePopulationConfig",
        function="simulate_population",
    ),
    Stage(
        name="simulate what-if",
        help="quality against anchors, k, temperature, rank and history; bytes per user",
        module="mta_ray.population.what_if",
        config="WhatIfConfig",
        function="simulate_what_if",
    ),
    Stage(
        name="simulate drift",
        help="tastes change over weeks: when are routes stale, when is the bank",
        module="mta_ray.population.drift",
        config="DriftConfig",
        function="simulate_drift",
    ),
    Stage(
        name="simulate load",
        help="a crowd of users against a live endpoint, every answer checked",
        module="mta_ray.population.load.simulate",
        config="SimulateLoadConfig",
        function="simulate_load",
    ),
    Stage(
        name="simulate capacity",
        help="from measured service times: users, requests, GPUs, latency, cost",
        module="mta_ray.population.capacity.simulate",
        config="SimulateCapacityConfig",
        function="simulate_capacity",
    ),
    Stage(
        name="simulate report",
        help="the reports of several simulations on one page",
        module="mta_ray.population.joined",
        config="JoinReportsConfig",
        function="join_reports",
    ),
)
"""Answers about users whom one does not have yet."""
SERVICE = (
    Stage(
        name="serve",
        help="the quickstart's bank, or yours, behind an OpenAI endpoint on this machine",
        module="mta_ray.serving.local",
        config="ServeConfig",
        function="serve_here",
        is_told=True,
    ),
    Stage(
        name="bank publish",
        help="put another bank in force, while the service runs",
        module="mta_ray.serving.local",
        config="PublishBankConfig",
        function="publish_bank",
        is_told=True,
    ),
    Stage(
        name="keys make",
        help="a new API key for a tenant, shown this once",
        module="mta_ray.serving.keys",
        config="MakeKeyConfig",
        function="make_key",
        is_told=True,
    ),
    Stage(
        name="keys list",
        help="the keys there are: id, tenant, limit, state",
        module="mta_ray.serving.keys",
        config="ListKeysConfig",
        function="list_keys",
        is_told=True,
    ),
    Stage(
        name="keys revoke",
        help="stop a key at once, for good",
        module="mta_ray.serving.keys",
        config="RevokeKeyConfig",
        function="revoke_key",
        is_told=True,
    ),
)
"""What the endpoint is run with; no jobs, for a cluster has no use for them."""

ALL = (*STAGES, *COMPARISON, *BANKS, *SERVICE, *SIMULATIONS)

MANUAL = """\
mta - merge, then adapt: one frozen base model, and answers that are each user's own

A few users are anchors, and have a small LoRA each: the bank. Any other user is served by merging the
anchors that are most like them, at once and without training; a tiny LoRA stacked on top then learns
what is left. See it work, offline, in minutes:

    mta quickstart

USAGE
    mta STAGE [--config FILE.yaml] [--SETTING VALUE ...] [--debug]
    mta STAGE --help         every setting of the stage, with its unit and its default

STAGES, in the order in which the data goes; each reads what those before it wrote
{stages}

ALL STAGES AT ONCE
{whole}

WHICH METHOD IS BETTER, and how sure that is
{comparison}

THE BANKS, in a store: a folder or a URL (s3://...) of versions that never change
{banks}

THE SERVICE
{service}

A MILLION USERS BEFORE THERE ARE ANY
{simulations}

SETTINGS
    Defaults, then the YAML file, then the command line; the later one wins. In YAML, keys are the settings'
    names (max_reject_share: 0.05) and groups are indented; on the command line the same setting is
    --max-reject-share 0.05, and one of a group --GROUP.SETTING.

RESULTS
    A stage prints where its result lies: a folder with a manifest.json, written whole or not at all. The
    settings it was made with lie beside it as NAME.config.yaml, and --config takes them back. A stage whose
    inputs and settings have not changed rests (--force runs it); one that was stopped goes on where it was
    when the same command is run again. Reports are report.html (to look at) and report.json (to compute with).

EXAMPLES
    mta prepare-users --files user_others.json --task movie_tagging --out users
    mta build-bank --config bank.yaml
    mta serve --base runs/quickstart/base --bank runs/quickstart/bank
    mta bank import --bank runs/quickstart/bank --store s3://bucket/banks
    ray job submit --working-dir . -- python jobs/build_bank.py --config bank.yaml

EXIT CODES
    0 done, 1 failed, 2 the input or a setting is wrong, 130 stopped (Ctrl-C)
    --debug, or MTA_DEBUG=1, shows where an error came from; mta --version says what is installed
"""


def main(args: Sequence[str] | None = None) -> int:
    """The `mta` command; returns its exit code."""
    args = sys.argv[1:] if args is None else list(args)
    if not args or args[0] in ("-h", "--help", "help"):
        print(_manual())
        return OK if args else BAD_INPUT
    if args[0] in ("-V", "--version"):
        print(f"mta-ray {_version()}")
        return OK
    group = [stage for stage in ALL if stage.name.startswith(f"{args[0]} ")]
    if group and (len(args) < 2 or args[1] in ("-h", "--help")):
        is_asked = len(args) > 1
        told = "\n".join(f"mta {stage.name:<20} {stage.help}" for stage in group)
        print(told, file=sys.stdout if is_asked else sys.stderr)
        return OK if is_asked else BAD_INPUT
    words = 2 if group else 1
    name = " ".join(args[:words])
    return run_stage(name, args[words:], prog=f"mta {name}")


def run_stage(stage: str | Stage, args: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run one stage with command-line arguments; returns the exit code. Errors become one message on stderr."""
    name = stage if isinstance(stage, str) else stage.name
    rest = sys.argv[1:] if args is None else list(args)
    is_debug = os.environ.get("MTA_DEBUG", "0") not in ("", "0")
    _start_log()
    try:
        is_debug, config_path, overrides = _split(rest, is_debug)
        with _sigterm_as_interrupt():
            return _run(_find(stage) if isinstance(stage, str) else stage, config_path, overrides, prog)
    except KeyboardInterrupt:
        if is_debug:
            traceback.print_exc()
        print("stopped; finished stages are kept, run the same command to go on", file=sys.stderr)
        return STOPPED
    except Exception as error:
        if is_debug:
            traceback.print_exc()
        cause = root_cause(error)
        print(f"mta {name}: {message_of(cause)}", file=sys.stderr)
        return _exit_code(cause)


def message_of(error: BaseException) -> str:
    """What a person is told about an error, without a traceback."""
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("mta_ray"):
        extra = EXTRA_OF.get((error.name or "").partition(".")[0], "cpu")
        return f"the Python package {error.name!r} is not installed; install mta-ray with its extra, mta-ray[{extra}]"
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        is_systems = error.strerror == os.strerror(errno.ENOSPC)  # ours say what to do themselves
        advice = "; free some space, then run the same command to go on" if is_systems else ""
        return f"{error.strerror}{where}{advice}"
    text = _own_words(str(error))
    if isinstance(error, (ValueError, OSError)) and text:
        return text
    kind = type(error).__name__
    return f"{kind}: {text}; --debug shows where" if text else f"{kind}; --debug shows where"


def _run(stage: Stage, config_path: str | None, overrides: list[str], prog: str | None) -> int:
    # 1. the settings
    config_type, function = stage.load()
    from mta_ray.settings import load_settings, save_settings

    try:
        config: Any = load_settings(config_type, config_path, overrides, prog=prog)
    except SystemExit as end:  # tyro has said what is wrong, or shown the help
        return end.code if isinstance(end.code, int) else BAD_INPUT

    # 2. the work
    started_s = time.monotonic()
    try:
        result = function(config)
    except SystemExit as end:  # how Ray Train ends a driver on Ctrl-C, and Ray on SIGTERM while it starts
        raise KeyboardInterrupt from end

    # 3. where it lies
    if stage.is_told:
        print(result, flush=True)
        return OK
    if getattr(config, "report_only", False):  # the results have settings of their own beside them
        print(f"{stage.name}: {time.monotonic() - started_s:.1f} s; report in", file=sys.stderr)
        print(result, flush=True)
        return OK
    # What runs all stages leaves the last one's settings beside its result, and its own under its own name.
    saved = save_settings(f"{config.out}/{stage.name}" if stage.name in WHOLE else result, config)
    print(f"{stage.name}: {time.monotonic() - started_s:.1f} s; settings in {saved}; result in", file=sys.stderr)
    print(result, flush=True)
    return OK


def _find(name: str) -> Stage:
    for stage in ALL:
        if stage.name == name.replace("_", "-"):
            return stage
    import difflib

    names = [stage.name for stage in ALL]
    close = difflib.get_close_matches(name, names, n=1)
    raise ValueError(
        f"no stage is called {name!r}{f'; did you mean {close[0]!r}?' if close else ''}; "
        f"wanted one of {', '.join(names)} (mta --help explains them)"
    )


def _split(args: list[str], is_debug: bool) -> tuple[bool, str | None, list[str]]:
    """(--debug, the value of --config, everything else), wherever they stand."""
    config_path, overrides = None, []
    rest = iter(args)
    for arg in rest:
        if arg == "--debug":
            is_debug = True
        elif arg == "--config" or arg.startswith("--config="):
            if config_path is not None:
                raise ValueError("--config stands twice; give one file, and single settings beside it")
            config_path = arg.partition("=")[2] if "=" in arg else next(rest, None)
            if not config_path or config_path.startswith("--"):
                raise ValueError("--config has no file; give it the path of a YAML file")
        else:
            overrides.append(arg)
    return is_debug, config_path, overrides


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """A polite kill stops a stage as Ctrl-C does. (Ray would put its own in place: cluster.connect.)"""

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread: whoever called us minds the signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _own_words(text: str) -> str:
    """The first paragraph: Ray's own messages go on for pages, and to ours Ray Data adds advice about retries."""
    return text.strip().split("\n\n")[0].split("\nFailed to apply UDF transform")[0]


def _exit_code(error: BaseException) -> int:
    is_ours = not type(error).__module__.startswith("ray.")
    is_input = isinstance(
        error, (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
    )
    return BAD_INPUT if is_ours and is_input else FAILED


def _manual() -> str:
    def lines(stages: Sequence[Stage]) -> str:
        return "\n".join(f"    {stage.name:<20} {stage.help}" for stage in stages)

    return MANUAL.format(
        stages=lines([stage for stage in STAGES if stage.name not in WHOLE]),
        whole=lines([stage for stage in STAGES if stage.name in WHOLE]),
        comparison=lines(COMPARISON),
        banks=lines(BANKS),
        service=lines(SERVICE),
        simulations=lines(SIMULATIONS),
    ).rstrip()


def _version() -> str:
    try:
        return metadata.version("mta-ray")
    except metadata.PackageNotFoundError:
        return "(a checkout that is not installed)"


def _start_log() -> None:
    """Our own events from INFO on, everybody else's warnings, on stderr."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("mta_ray").setLevel(logging.INFO)


if __name__ == "__main__":
    sys.exit(main())
