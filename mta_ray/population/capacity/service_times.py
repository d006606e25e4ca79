"""How long the parts of the service take, as measured: what the simulation of a pod works with, and its JSON file.

A step of the engine is fitted by least squares; the other parts are CPU times of processes. Pure numbers, no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from scipy.optimize import nnls

from mta_ray.settings import settings_of

T = TypeVar("T")
Part = TypeVar("Part", "StepTime", "ProcessTime")
PLACEHOLDER = "placeholder"
"""The source of times that nobody has measured."""
TURNS_MAX = 64
LONGER = (0.2, 20.0)
"""Within what work may be longer beside other work than alone, or shorter."""
COEFFICIENTS = ("fixed_ms", "row_ms", "prompt_ms", "prompt_token_ms")
"""Of a step."""


def no_type_check(part: T) -> T:
    """What is called millions of times: the test run, which goes by this name, does not check its arguments.

    (typing's own would make mypy look away too.)
    """
    return part


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """A step of the engine: fixed + row · decoding rows + prompt · prompts in it + prompt token · their tokens."""

    fixed_ms: float = 5.0
    """Of every step."""
    row_ms: float = 0.1
    """For each row that decodes."""
    prompt_ms: float = 0.0
    """For each prompt that is read, or part of one."""
    prompt_token_ms: float = 0.02
    """For each token of them."""
    python_share: float = 1.0
    """Share of a step during which the other Python threads of the replica wait (they share one interpreter)."""

    def __post_init__(self) -> None:
        _check_times(self)
        if self.fixed_ms + self.row_ms <= 0:
            raise ValueError("a step takes no time: fixed_ms and row_ms are 0; measure, or give one of them")
        if self.python_share > 1:
            raise ValueError(f"python_share is {self.python_share}, wanted 0 to 1")

    @no_type_check
    def of(self, rows: int, prompts: int, prompt_tokens: int) -> float:
        """Milliseconds of one step."""
        return self.fixed_ms + self.row_ms * rows + self.prompt_ms * prompts + self.prompt_token_ms * prompt_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessTime:
    """CPU time that one process of the service spends on requests, beside the engine's steps.

    A busy process does its work with fewer wake-ups: each costs something where a thread had nothing to do before.
    """

    request_ms: float = 0.0
    """Its event loop, for each request."""
    token_ms: float = 0.0
    """Its event loop, for each piece of an answer that passes."""
    native_request_ms: float = 0.0
    """Its other threads (Ray's own, which do not hold the interpreter), for each request."""
    native_token_ms: float = 0.0
    """The same for each piece."""
    wake_ms: float = 0.0
    """More for a request or a piece that finds the event loop idle; once, however many turns a request takes."""
    native_wake_ms: float = 0.0
    """The same of the other threads."""

    def __post_init__(self) -> None:
        _check_times(self)

    def total_ms(self, tokens: float) -> float:
        """For a request with that many pieces."""
        return self.request_ms + self.native_request_ms + tokens * (self.token_ms + self.native_token_ms)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceTimes:
    """All parts. The defaults are placeholders; measure, or give a file that `--measure` has written."""

    step: StepTime = field(default_factory=StepTime)
    """The engine."""
    proxy: ProcessTime = field(default_factory=ProcessTime)
    """Ray Serve's HTTP proxy."""
    ingress: ProcessTime = field(default_factory=ProcessTime)
    """Our ingress."""
    replica: ProcessTime = field(default_factory=ProcessTime)
    """The replica's process without its engine: personalisation, tokenisation, pieces handed on."""
    client: ProcessTime = field(default_factory=ProcessTime)
    """Whoever asks, where that is a process of the same machine; else zero."""
    away_ms: float = 0.0
    """Of each request, in which none of these works: the network, threads that wake up."""
    pause_ms: float = 0.0
    """Of each step, in which the engine waits for the interpreter and nobody works."""
    after_share: float = 0.0
    """Share of each `request_ms` that comes after the answer's last piece."""
    turns: int = 1
    """In so many turns a process does its work on a request: threads hand it to each other, each waits for a CPU."""
    longer: tuple[tuple[float, float], ...] = ()
    """(requests under way for each replica, factor), ascending: how much longer all work takes beside each other. A
    request alone takes 1 times; in between it is a line, after the last it stays."""
    stack_load_ms: float = 1.0
    """A stack from the store into its slot, at a miss."""
    source: str = PLACEHOLDER
    """On what it was measured, in words."""
    base: str = ""
    """The model that was measured: `tiny`, `default`, or a `base` artifact; empty: not told."""
    device: str = ""
    """What its engine ran on: `cpu`, or a GPU's name; empty: not told."""

    def __post_init__(self) -> None:
        for name in ("away_ms", "pause_ms", "stack_load_ms"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted at least 0 and finite")
        if not 0 <= self.after_share <= 1:
            raise ValueError(f"after_share is {self.after_share}, wanted 0 to 1")
        if not 1 <= self.turns <= TURNS_MAX:
            raise ValueError(f"turns is {self.turns}, wanted 1 to {TURNS_MAX}")
        if not all(1 < a < b < math.inf for (a, _), (b, _) in pairwise(((1.5, 1.0), *self.longer))) or not all(
            LONGER[0] <= factor <= LONGER[1] for _, factor in self.longer
        ):
            raise ValueError(
                f"longer is {self.longer}, wanted (requests, factor), requests ascending from 2, each factor "
                f"{LONGER[0]} to {LONGER[1]}"
            )

    def at_pace(self, pace: float) -> ServiceTimes:
        """The same service where all that it does takes `pace` times as long."""
        return replace(
            self,
            away_ms=self.away_ms * pace,
            pause_ms=self.pause_ms * pace,
            stack_load_ms=self.stack_load_ms * pace,
            **{name: _paced(getattr(self, name), pace) for name in ("step", "proxy", "ingress", "replica", "client")},
        )

    @no_type_check
    def longer_with(self, requests: float) -> float:
        """How much longer work takes while so many requests are under way for each replica."""
        before, was = 1.0, 1.0
        for at, factor in self.longer:
            if requests < at:
                return was + (factor - was) * max(0.0, requests - before) / (at - before)
            before, was = at, factor
        return was


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSample:
    """One step as it was measured."""

    rows: int
    prompts: int
    prompt_tokens: int
    ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFit:
    """Coefficients, and how far they are from what was measured."""

    step: StepTime
    samples: int
    r2: float
    """Share of the variance of step times that the line explains."""
    error_p50: float
    """Median of |fitted - measured| over measured."""
    error_p95: float
    """95th percentile of the same."""


def fit_step(samples: Sequence[StepSample], *, python_share: float = 1.0) -> StepFit:
    """Least squares with coefficients of at least zero; a step counts by its relative error, long or short."""
    if len(samples) < 8:
        raise ValueError(f"{len(samples)} measured steps are too few to fit four coefficients; measure at least 8")
    x = np.array([(1, s.rows, s.prompts, s.prompt_tokens) for s in samples], dtype=float)
    y = np.array([s.ms for s in samples])
    if not (np.isfinite(y).all() and (y > 0).all()):
        raise ValueError("a measured step took no time, or no finite one; measure again")
    fitted, _ = nnls(x / y[:, None], np.ones(len(y)))
    error = np.abs(x @ fitted - y) / y
    spread = float(((y - y.mean()) ** 2).sum())
    return StepFit(
        step=StepTime(
            fixed_ms=float(fitted[0]),
            row_ms=float(fitted[1]),
            prompt_ms=float(fitted[2]),
            prompt_token_ms=float(fitted[3]),
            python_share=python_share,
        ),
        samples=len(samples),
        r2=1 - float(((x @ fitted - y) ** 2).sum()) / spread if spread else 1.0,
        error_p50=float(np.percentile(error, 50)),
        error_p95=float(np.percentile(error, 95)),
    )


def write_times(path: str | Path, times: ServiceTimes, facts: dict[str, Any]) -> None:
    """The file that `--service-times` takes; `facts` say how they were measured, and are not read again."""
    Path(path).write_text(json.dumps({"times": asdict(times), "facts": facts}, indent=2, allow_nan=False) + "\n")


def read_times(path: str | Path) -> ServiceTimes:
    """The times of such a file; it must hold a step and a source, for the defaults are nobody's times."""
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
        times = raw["times"]
    except FileNotFoundError:
        raise ValueError(f"no service times at {path}; write them with --measure, or correct the path") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} holds no service times ({error!r}); write them with --measure") from error
    read = settings_of(ServiceTimes, times, source=str(path))
    missing = [f"step.{name}" for name in COEFFICIENTS if name not in times.get("step", {})]
    missing += [] if times.get("source") else ["source"]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; write it with --measure, or add what was measured")
    return read


def _paced(times: Part, pace: float) -> Part:
    named = [entry.name for entry in fields(times) if entry.name.endswith("_ms")]
    return replace(times, **{name: getattr(times, name) * pace for name in named})


def _check_times(times: StepTime | ProcessTime) -> None:
    for entry in fields(times):
        value = getattr(times, entry.name)
        if not 0 <= value < math.inf:
            raise ValueError(f"{entry.name} is {value}, wanted at least 0 and finite")
