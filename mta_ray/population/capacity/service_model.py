"""One pod of the service as a discrete-event simulation: arrivals and service times in, what became of each out.

A pod is a proxy, an ingress and a few replicas. Every process is a queue before its event loop; a replica's engine
steps as mta_ray.model.engine does: decoding rows first, prompts in what room is left. Knows no Ray and no torch.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from random import Random
from typing import Any, Literal

import simpy

from mta_ray.population.capacity.arrivals import Arrival, TrafficConfig, sample_arrivals
from mta_ray.population.capacity.autoscaler import AutoscalerConfig, Scaler
from mta_ray.population.capacity.service_times import ProcessTime, ServiceTimes, no_type_check
from mta_ray.serving.slot_table import NoFreeSlot, SlotTable, StackKey

HOMES_PER_REPLICA = 1000
"""Users whose requests a replica attracts; as `_note_home` of serving/replica.py."""
BUSY_REQUESTS = 300
"""Requests for each replica that are counted, to see how fast a pod that always has more to do gets through them."""
ROUNDS = 5
"""Or so many of each client, where they are many."""
SLICE_MS = 1.0
"""A step lets the replica's other threads, and the machine's other processes, in between this often."""

OTHERS_MS = 3.0
"""What a program keeps a CPU for while others wait; Linux's own measure."""

Process = Generator[simpy.Event, Any, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PodConfig:
    """What works together: a proxy and an ingress before a few replicas. Pods of a fleet do not know each other."""

    replicas: int = 2
    """At the start, and all the time without an autoscaler."""
    max_requests: int = 16
    """Rows that a replica decodes together."""
    max_step_tokens: int = 512
    """Tokens of one step of the engine."""
    max_waiting: int = 32
    """Requests that wait for a row; one more is a 503."""
    max_tokens: int = 512
    """Of a prompt and its answer together; the service refuses a longer one. The simulation itself serves it."""
    stack_slots: int = 48
    """Stacks on a replica's device at once."""
    cores: int | None = None
    """CPUs that all processes of the pod share; none: enough of them."""
    others: float = 0.0
    """So many of these CPUs are kept busy by programs that have nothing to do with the service."""
    routing: Literal["home", "two_choices", "random"] = "home"
    """`two_choices`: the less busy of two replicas; `home`: the one that knows the user, if it has a free row."""
    autoscaler: AutoscalerConfig | None = None
    """None: the number of replicas stays."""

    def __post_init__(self) -> None:
        for name, least in (
            ("replicas", 1),
            ("max_requests", 1),
            ("max_step_tokens", 1),
            ("max_waiting", 0),
            ("max_tokens", 2),
            ("stack_slots", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.max_step_tokens < self.max_requests:
            raise ValueError(f"max_step_tokens {self.max_step_tokens} is less than max_requests {self.max_requests}")
        if self.cores is not None and self.cores < 1:
            raise ValueError(f"cores is {self.cores}, wanted at least 1, or none for enough of them")
        if not (self.others == 0 or 0 < self.others < (self.cores or 0)):
            raise ValueError(f"others is {self.others}, wanted at least 0 and less than cores ({self.cores})")


@no_type_check
@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one request."""

    arrival: Arrival
    replica: int
    status: int
    """200 or 503."""
    ttft_ms: float
    """To the first piece that the client sees; of an answer that is not streamed, to the whole of it."""
    total_ms: float
    tokens: int
    is_miss: bool
    """Its stack had to be loaded."""


@dataclass(slots=True)
class PodRun:
    """All of a run."""

    outcomes: list[Outcome] = field(default_factory=list)
    """In the order in which they ended."""
    replicas: list[tuple[float, int]] = field(default_factory=list)
    """(seconds, replicas that serve from then on)."""
    steps: int = 0
    rows: int = 0
    """Decoding rows, added up over all steps."""
    busy: dict[str, float] = field(default_factory=dict)
    """Process -> share of the time in which it worked, until the last request ended."""


def simulate_pod(
    arrivals: Sequence[Arrival],
    config: PodConfig,
    times: ServiceTimes,
    *,
    seed: int = 0,
    then: Sequence[Arrival] = (),
) -> PodRun:
    """Every arrival served, or refused; the run ends when the last answer has. The same seed gives the same run.

    `then`: asked one after the other, each by a client whose answer has just ended, whatever its `at_s`.
    """
    pod = _Pod(config, times, seed)
    pod.then = deque(then)
    pod.env.process(pod.arrive(arrivals))
    pod.env.run(until=pod.ended)
    seconds = pod.env.now / 1e3 or 1.0
    workers = {"client": pod.client, "proxy": pod.proxy, "ingress": pod.ingress}
    pod.run.busy = {name: hop.busy_ms / 1e3 / seconds for name, hop in workers.items()}
    engines = [replica.busy_ms / 1e3 / seconds for replica in pod.replicas]
    pod.run.busy["engine"] = sum(engines) / len(engines)
    return pod.run


def saturation_per_s(config: PodConfig, times: ServiceTimes, traffic: TrafficConfig) -> float:
    """Requests a second that leave a pod which always has more to do: twice as many clients as it has rows, each of
    whom asks again when it is answered. (A crowd that comes all at once would have its way in behind it too soon.)"""
    clients = 2 * config.max_requests * config.replicas
    count = max(BUSY_REQUESTS * config.replicas, ROUNDS * clients) + 2 * clients
    asked = [
        replace(arrival, at_s=0.0, has_stack=False)
        for arrival in sample_arrivals(traffic, per_s=1.0, requests=count, users=clients, seed=0)
    ]
    endless = replace(config, max_waiting=clients, autoscaler=None, routing="two_choices")
    ended = simulate_pod(asked[:clients], endless, times, then=asked[clients:]).outcomes
    ends_ms = sorted(outcome.arrival.at_s * 1e3 + outcome.total_ms for outcome in ended)
    middle = ends_ms[clients : len(ends_ms) - clients]  # not while the pod fills, or runs empty
    return (len(middle) - 1) / (middle[-1] - middle[0]) * 1e3


@no_type_check
class _Call:
    """A request under way."""

    __slots__ = ("arrival", "began_ms", "replica", "read", "made", "told", "ttft_ms", "slot", "is_miss")

    def __init__(self, arrival: Arrival, began_ms: float) -> None:
        self.arrival, self.began_ms = arrival, began_ms
        self.replica: _Replica | None = None
        self.read = self.made = self.told = 0  # tokens of the prompt, of the answer, and those that the client has
        self.ttft_ms = 0.0
        self.slot: int | None = None
        self.is_miss = False


@no_type_check
class _Thread:
    """Jobs one after the other, oldest first."""

    def __init__(self, pod: _Pod, wake_ms: float, interpreter: simpy.PriorityResource | None = None) -> None:
        self.pod, self.env, self.cpus, self.interpreter, self.wake_ms = pod, pod.env, pod.cpus, interpreter, wake_ms
        self.jobs: deque[tuple[float, Callable[..., None], tuple]] = deque()
        self.busy_ms = 0.0
        self._wake: simpy.Event | None = None
        self.env.process(self._work())

    def do(self, ms: float, then: Callable[..., None], *args: Any, wakes: bool = True) -> None:
        """`then(*args)` after that much work, and after what was asked for before; `wakes`: an idle thread has to be
        woken up for it."""
        if ms <= 0 and not self.jobs and self._wake is not None:
            then(*args)
            return
        self.jobs.append((ms + self.wake_ms if wakes and not self.jobs else ms, then, args))
        if self._wake is not None:
            self._wake.succeed()
            self._wake = None

    def _work(self) -> Process:
        while True:
            if not self.jobs:
                self._wake = self.env.event()
                yield self._wake
                continue
            ms, then, args = self.jobs[0]
            if ms > 0:
                ms *= self.pod.longer
                yield from busy(self.env, ms, self.cpus, self.interpreter, 0)
                self.busy_ms += ms
            self.jobs.popleft()
            then(*args)


@no_type_check
class _Hop:
    """A process on the way: its event loop, then its native threads."""

    def __init__(self, pod: _Pod, times: ProcessTime, interpreter: simpy.PriorityResource | None = None) -> None:
        self.times = times
        self.before = 1 - pod.times.after_share
        self.turns = pod.times.turns
        self.loop = _Thread(pod, times.wake_ms, interpreter)
        self.native = _Thread(pod, times.native_wake_ms)

    @property
    def busy_ms(self) -> float:
        return self.loop.busy_ms

    def request(self, then: Callable[..., None], *args: Any) -> None:
        self._turn(self.turns, then, args)

    def _turn(self, left: int, then: Callable[..., None], args: tuple) -> None:
        if not left:
            then(*args)
            return
        t, share, is_first = self.times, self.before / self.turns, left == self.turns
        native = partial(self.native.do, wakes=is_first)
        self.loop.do(
            t.request_ms * share,
            *(native, t.native_request_ms * share, self._turn, left - 1, then, args),
            wakes=is_first,
        )

    def piece(self, is_last: bool, then: Callable[..., None], *args: Any) -> None:
        t = self.times
        self.loop.do(t.token_ms, self.native.do, t.native_token_ms, then, *args)
        if is_last and self.before < 1:
            after = 1 - self.before
            self.loop.do(t.request_ms * after, self.native.do, t.native_request_ms * after, _nothing)


@no_type_check
class _Replica:
    """An event loop and an engine in one process."""

    def __init__(self, pod: _Pod, number: int) -> None:
        self.pod, self.number = pod, number
        self.ongoing = 0
        self.is_open = True
        self.homes: OrderedDict[int, None] = OrderedDict()
        self.table = SlotTable(pod.config.stack_slots)
        self.interpreter = simpy.PriorityResource(pod.env, 1) if pod.times.replica.total_ms(1.0) > 0 else None
        self.hop = _Hop(pod, pod.times.replica, self.interpreter)
        self.waiting: deque[_Call] = deque()
        self.decoding: list[_Call] = []
        self.reading: list[_Call] = []
        self.load_ms = 0.0
        self.busy_ms = 0.0
        self._wake: simpy.Event | None = None
        pod.env.process(self._steps())

    @property
    def under_way(self) -> int:
        return len(self.waiting) + len(self.decoding) + len(self.reading)

    def note_home(self, user: int) -> None:
        self.homes[user] = None
        self.homes.move_to_end(user)
        if len(self.homes) > HOMES_PER_REPLICA:
            self.homes.popitem(last=False)

    def submit(self, call: _Call) -> None:
        """Into the engine's queue, or refused at once."""
        config = self.pod.config
        if self.under_way >= config.max_requests + config.max_waiting:
            self.pod.refuse(call)
            return
        if call.arrival.has_stack:
            try:
                seat = self.table.acquire(StackKey(tenant="", user=str(call.arrival.user), version=0))
            except NoFreeSlot:
                self.pod.refuse(call)
                return
            call.slot, call.is_miss = seat.slot, seat.is_new
            self.load_ms += self.pod.times.stack_load_ms if seat.is_new else 0.0
        self.waiting.append(call)
        if self._wake is not None:
            self._wake.succeed()
            self._wake = None

    def _steps(self) -> Process:
        pod, config, step = self.pod, self.pod.config, self.pod.times.step
        while True:
            if not self.under_way:
                self._wake = pod.env.event()
                yield self._wake
                continue

            # 1. plan: rows that decode, and prompts in what room is left
            while self.waiting and len(self.decoding) + len(self.reading) < config.max_requests:
                self.reading.append(self.waiting.popleft())
            decoding = list(self.decoding)
            room = config.max_step_tokens - len(decoding)
            chunks: list[tuple[_Call, int]] = []
            for call in self.reading:
                if room <= 0:
                    break
                count = min(room, call.arrival.prompt_tokens - call.read)
                chunks.append((call, count))
                room -= count
            ms = step.of(len(decoding), len(chunks), sum(count for _, count in chunks)) + self.load_ms
            self.load_ms = 0.0

            # 2. forward
            ms *= pod.longer
            yield from self._forward(ms, step.python_share)
            if pod.times.pause_ms > 0:
                yield pod.env.timeout(pod.times.pause_ms)
            self.busy_ms += ms + pod.times.pause_ms
            pod.run.steps += 1
            pod.run.rows += len(decoding)

            # 3. hand out
            spoken = decoding
            for call, count in chunks:
                call.read += count
                if call.read == call.arrival.prompt_tokens:
                    self.reading.remove(call)
                    self.decoding.append(call)
                    spoken.append(call)
            for call in spoken:
                call.made += 1
                is_last = call.made == call.arrival.answer_tokens
                if is_last:
                    self.decoding.remove(call)
                self.hop.piece(is_last, pod.spoken, call, is_last)
            if self.interpreter is not None:
                yield pod.env.timeout(0)  # the loop is woken up, and takes the interpreter before the next step does

    def _forward(self, ms: float, python_share: float) -> Process:
        env, cpus = self.pod.env, self.pod.cpus
        if self.interpreter is None and cpus is None:
            yield env.timeout(ms)
            return
        while ms > 1e-9:
            piece = min(ms, SLICE_MS)
            held = piece * python_share
            if held > 0:
                yield from busy(env, held, cpus, self.interpreter, 1)
            if piece - held > 0:
                yield from busy(env, piece - held, cpus, None, 1)
            ms -= piece


@no_type_check
class _Pod:
    """The processes, and the way of a request through them."""

    def __init__(self, config: PodConfig, times: ServiceTimes, seed: int) -> None:
        self.config, self.times = config, times
        self.env = simpy.Environment()
        self.cpus = None if config.cores is None else simpy.PriorityResource(self.env, config.cores)
        self.random = Random(seed)
        self.run = PodRun()
        self.client, self.proxy, self.ingress = (_Hop(self, t) for t in (times.client, times.proxy, times.ingress))
        self.replicas: list[_Replica] = []
        self.left = 0
        self.under_way = 0
        self.longer = 1.0
        """How much longer work takes beside the other requests that are under way."""
        self.then: deque[Arrival] = deque()
        self.ended = self.env.event()
        self.scale(config.replicas)
        for _ in range(math.ceil(config.others)):
            self.env.process(self._others(config.others / math.ceil(config.others)))
        if config.autoscaler is not None:
            self.env.process(self._autoscale(config.autoscaler))

    def _others(self, share: float) -> Process:
        """A foreign program that wants a CPU for that share of the time, in turns of OTHERS_MS."""
        idle_ms = OTHERS_MS * (1 - share) / share
        while True:
            yield from busy(self.env, OTHERS_MS, self.cpus, None, 0)
            yield self.env.timeout(self.random.expovariate(1 / idle_ms) if idle_ms > 0 else 0)

    # -- the way in

    def arrive(self, arrivals: Sequence[Arrival]) -> Process:
        self.left = len(arrivals)
        if not arrivals:
            self.ended.succeed()
        for arrival in sorted(arrivals, key=lambda a: a.at_s):
            yield self.env.timeout(max(0.0, arrival.at_s * 1e3 - self.env.now))
            self._begin(arrival)

    def _begin(self, arrival: Arrival) -> None:
        self._count(1)
        self.client.request(self._travel, _Call(arrival, self.env.now))

    def _count(self, more: int) -> None:
        self.under_way += more
        if self.times.longer:
            self.longer = self.times.longer_with(self.under_way / max(1, self._open))

    def _travel(self, call: _Call) -> None:
        if self.times.away_ms <= 0:
            self.proxy.request(self.ingress.request, self._route, call)
            return
        event = self.env.timeout(self.times.away_ms)
        event.callbacks.append(lambda _: self.proxy.request(self.ingress.request, self._route, call))

    def _route(self, call: _Call) -> None:
        replica = self._choose(call.arrival.user)
        replica.ongoing += 1
        call.replica = replica
        if self.config.routing == "home":
            replica.note_home(call.arrival.user)
        replica.hop.request(replica.submit, call)

    def _choose(self, user: int) -> _Replica:
        there = [replica for replica in self.replicas if replica.is_open]
        if self.config.routing == "home":
            homes = [replica for replica in there if user in replica.homes]
            if homes:
                home = self._less_busy(homes)
                if home.under_way < self.config.max_requests:
                    return home
        return self.random.choice(there) if self.config.routing == "random" else self._less_busy(there)

    def _less_busy(self, replicas: list[_Replica]) -> _Replica:
        two = self.random.sample(replicas, 2) if len(replicas) > 1 else replicas
        return min(two, key=lambda replica: replica.ongoing)

    # -- the way back

    def spoken(self, call: _Call, is_last: bool) -> None:
        """A piece leaves the replica; an answer that is not streamed is gathered in the ingress."""
        if is_last:
            self._left_replica(call)
        self.ingress.piece(is_last, self._passed, call, is_last)

    def _passed(self, call: _Call, is_last: bool) -> None:
        if call.arrival.is_stream or is_last:
            self.proxy.piece(is_last, self.client.piece, is_last, self._told, call, is_last)

    def _told(self, call: _Call, is_last: bool) -> None:
        call.told += 1
        if call.told == 1:
            call.ttft_ms = self.env.now - call.began_ms
        if is_last:
            self._end(call, 200)

    def refuse(self, call: _Call) -> None:
        self._left_replica(call)
        self.ingress.piece(True, self.proxy.piece, True, self._end, call, 503)

    def _left_replica(self, call: _Call) -> None:
        assert call.replica is not None
        call.replica.ongoing -= 1
        if call.slot is not None:
            call.replica.table.release(call.slot)

    def _end(self, call: _Call, status: int) -> None:
        assert call.replica is not None
        took_ms = self.env.now - call.began_ms
        self.run.outcomes.append(
            Outcome(
                arrival=call.arrival,
                replica=call.replica.number,
                status=status,
                ttft_ms=call.ttft_ms or took_ms,
                total_ms=took_ms,
                tokens=call.made,
                is_miss=call.is_miss,
            )
        )
        self.left -= 1
        self._count(-1)
        if self.then:
            self.left += 1
            self._begin(replace(self.then.popleft(), at_s=self.env.now / 1e3))
        if not self.left:
            self.ended.succeed()

    # -- replicas come and go

    def scale(self, replicas: int) -> None:
        there = [replica for replica in self.replicas if replica.is_open]
        for _ in range(replicas - len(there)):
            self.replicas.append(_Replica(self, len(self.replicas)))
        for replica in sorted(there, key=lambda r: r.ongoing)[: max(0, len(there) - replicas)]:
            replica.is_open = False  # what it has begun it ends
        self._count(0)
        self.run.replicas.append((self.env.now / 1e3, replicas))

    def _autoscale(self, config: AutoscalerConfig) -> Process:
        scaler = Scaler(config, self.config.replicas)
        ongoing, told_s = 0, -math.inf
        while True:
            yield self.env.timeout(config.interval_s * 1e3)
            if self.env.now / 1e3 - told_s >= config.metrics_interval_s - 1e-6:
                ongoing, told_s = sum(replica.ongoing for replica in self.replicas), self.env.now / 1e3
            before = scaler.target
            wanted = scaler.decide(self.env.now / 1e3, ongoing)
            if wanted > before:
                self.env.process(self._start(scaler, wanted - before))
            elif wanted < self._open:
                self.scale(wanted)

    def _start(self, scaler: Scaler, count: int) -> Process:
        yield self.env.timeout(scaler.config.startup_s * 1e3)
        if (replicas := min(scaler.target, self._open + count)) > self._open:
            self.scale(replicas)

    @property
    def _open(self) -> int:
        return sum(replica.is_open for replica in self.replicas)


@no_type_check
def busy(
    env: simpy.Environment,
    ms: float,
    cpus: simpy.PriorityResource | None,
    interpreter: simpy.PriorityResource | None,
    priority: int,
) -> Process:
    """That much work, with the interpreter of its process and a CPU; a loop's work goes before a step's."""
    turn = None
    if interpreter is not None:
        turn = interpreter.request(priority=priority)
        yield turn
    core = None
    if cpus is not None:
        core = cpus.request(priority=0)
        yield core
    yield env.timeout(ms)
    if core is not None and cpus is not None:
        cpus.release(core)
    if turn is not None and interpreter is not None:
        interpreter.release(turn)


@no_type_check
def _nothing() -> None:
    """After the last work on an answer nobody waits."""
