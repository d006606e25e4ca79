"""Actors that work through packs of users: how many, who gets which pack, and that they end, whatever happens."""

from __future__ import annotations

import gc
import logging
import math
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import wraps
from types import FrameType
from typing import Any, ParamSpec, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from mta_ray.cluster import ClusterConfig, room_for

log = logging.getLogger(__name__)
GivenP = ParamSpec("GivenP")
ResultT = TypeVar("ResultT")
RETRIES = 2
"""Of a call whose actor died under it: a node may go at any time. Calls depend on nothing before them."""
PATIENCE_S = 60.0
"""After so long without a single actor one is told so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorConfig:
    """Processes that each hold the base model and the bank."""

    actors: int = 2
    """How many at once."""
    cpus: int = 1
    """CPUs of each, all of which torch uses."""
    gpus: float = 0.0
    """GPUs of each."""
    users_per_pack: int = 16
    """At most so many users' adapters are trained at once."""

    def __post_init__(self) -> None:
        for name in ("actors", "cpus", "users_per_pack"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.gpus < math.inf:
            raise ValueError(f"gpus must be at least 0, got {self.gpus}")

    @property
    def device(self) -> str:
        return "cuda" if self.gpus else "cpu"


class Crew:
    """Actors and their calls. Only who is up is called: one that finds no room keeps no call waiting. What one was at
    that died is given to another, and a new one is started in its place."""

    def __init__(self, start: Callable[[], ActorHandle], count: int) -> None:
        self._start = start
        self._coming: dict[ray.ObjectRef, ActorHandle] = {}
        self._idle: list[ActorHandle] = []
        self._deaths_at_start = 0
        self.actors: list[ActorHandle] = []
        """All that were ever started."""
        for _ in range(count):
            self._start_one()

    def map(self, call: Callable[[ActorHandle, Any], ray.ObjectRef], values: Iterable[Any]) -> Iterator[Any]:
        """What `call(actor, value)` comes to for each value, in their order.

        Raises what a call or a constructor raises, and RayActorError where actors died of one value too often.
        """
        early: dict[int, Any] = {}
        wanted = 0
        for number, result in self._results(call, values):
            early[number] = result
            while wanted in early:
                yield early.pop(wanted)
                wanted += 1

    def map_unordered(self, call: Callable[[ActorHandle, Any], ray.ObjectRef], values: Iterable[Any]) -> Iterator[Any]:
        """The same, whichever is ready first."""
        return (result for _, result in self._results(call, values))

    def _results(self, call: Callable, values: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        rest = enumerate(values)
        again: list[tuple[int, Any]] = []
        """Values whose actor died."""
        deaths: Counter[int] = Counter()
        at_work: dict[ray.ObjectRef, tuple[int, Any, ActorHandle]] = {}
        given = next(rest, None)
        while given or at_work:
            while self._idle and given:
                number, value = given
                actor = self._idle.pop()
                at_work[call(actor, value)] = (number, value, actor)
                given = again.pop() if again else next(rest, None)
            ready, _ = ray.wait([*self._coming, *at_work], timeout=PATIENCE_S)
            for task in ready:
                if task in self._coming:
                    self._welcome(task)
                    continue
                number, value, actor = at_work.pop(task)
                try:
                    result = ray.get(task)
                except RayActorError:
                    deaths[number] += 1
                    if deaths[number] > RETRIES:
                        raise
                    log.warning("a process died at its work, which another one does again")
                    self._start_one()
                    again.append((number, value))
                    given = given or again.pop()
                else:
                    self._idle.append(actor)
                    yield number, result
            if not ready and not at_work:
                _say_what_is_free()

    def _start_one(self) -> None:
        actor = self._start()
        self.actors.append(actor)
        self._coming[actor.__ray_ready__.remote()] = actor

    def _welcome(self, task: ray.ObjectRef) -> None:
        actor = self._coming.pop(task)
        try:
            ray.get(task)
        except RayActorError as error:
            if error.actor_init_failed:  # by what its constructor raised
                raise
            self._deaths_at_start += 1
            if self._deaths_at_start > RETRIES:
                raise
            self._start_one()
        else:
            self._idle.append(actor)


def _say_what_is_free() -> None:
    whole, free = ray.cluster_resources(), ray.available_resources()
    log.warning(
        "no process is up yet, for want of room or still loading: of %g CPUs and %g GPUs %g and %g are free; waiting",
        whole.get("CPU", 0), whole.get("GPU", 0), free.get("CPU", 0), free.get("GPU", 0),
    )  # fmt: skip


@contextmanager
def crew(
    kind: type, *arguments: Any, workers: ActorConfig, cluster: ClusterConfig, calls: int | None = None
) -> Iterator[Crew]:
    """Actors `kind(*arguments)`, as many as have room and at most one for each of `calls`, on the connected cluster.

    They end with the block, however it ends: one that an error's traceback kept alive would keep its CPUs, and whoever
    comes next would wait for them. Raises ValueError where not one has room.
    """
    wanted = workers.actors if calls is None else min(workers.actors, max(1, calls))
    count = room_for(cluster, wanted, cpus=workers.cpus, gpus=workers.gpus)
    remote = ray.remote(kind).options(num_cpus=workers.cpus, num_gpus=workers.gpus)
    made = Crew(lambda: remote.remote(*arguments), count)
    try:
        yield made
    finally:
        for actor in made.actors:
            ray.kill(actor)


def lets_go(function: Callable[GivenP, ResultT]) -> Callable[GivenP, ResultT]:
    """Of a function that runs Ray Data with actors: when it raises, they end at once.

    Ray Data lets go of them when its executor is collected. Tracebacks of the error, and of what is behind it, keep
    that alive in the frames of a thread that has ended, for as long as somebody keeps the error or nobody collects; and
    with it CPUs that others wait for.
    """

    @wraps(function)
    def call(*args: GivenP.args, **kwargs: GivenP.kwargs) -> ResultT:
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            for one in _behind(error):
                for frame, _ in traceback.walk_tb(one.__traceback__):
                    _clear(frame)
            gc.collect()
            raise

    return call


def _clear(frame: FrameType | None) -> None:
    """What the frame and its callers know, as far as they have ended."""
    while frame is not None:
        with suppress(RuntimeError):  # at work yet
            frame.clear()
        frame = frame.f_back


def _behind(error: BaseException) -> list[BaseException]:
    """The error, what caused it, and what was being handled meanwhile."""
    found: list[BaseException] = []
    rest: list[BaseException | None] = [error]
    while rest:
        one = rest.pop()
        if one is not None and not any(one is known for known in found):
            found.append(one)
            rest += [one.__cause__, one.__context__]
    return found
