"""Step times of the real engine, by itself: rows that decode and prompts that are read, in many mixtures."""

from __future__ import annotations

import logging
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from mta_ray.benchmarks.decode import random_adapters
from mta_ray.benchmarks.marked_users import tiny_llama
from mta_ray.lora.adapter import from_bytes, to_bytes
from mta_ray.lora.slots import Route, put
from mta_ray.model.backbone import EMBEDDED, RoutedModel, load_backbone
from mta_ray.model.engine import Engine
from mta_ray.model.requests import Request, Ticket
from mta_ray.model.settings import EngineConfig
from mta_ray.personalize.base_model import open_base
from mta_ray.population.capacity.service_times import StepFit, StepSample, fit_step

log = logging.getLogger(__name__)
BANK, STACKS = "bank", "stacks"


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureConfig:
    """What of an engine is measured."""

    max_requests: int = 16
    """Rows of the engine."""
    max_step_tokens: int = 512
    """Tokens of a step."""
    rows: tuple[int, ...] = (0, 1, 2, 4, 8, 12, 16)
    """Decoding rows that are tried; more than max_requests are left out."""
    prompts: tuple[int, ...] = (1, 2, 4)
    """Prompts in one step that are tried."""
    prompt_tokens: tuple[int, ...] = (8, 24, 64)
    """Lengths of a prompt that are tried."""
    repeats: int = 9
    """Times that each mixture is timed; the median counts."""
    anchors: int = 16
    """Adapters of the bank."""
    k: int = 4
    """Of which each user has this many."""
    rank: int = 8
    """Of each of them; a user's own stack has rank 1."""
    stack_slots: int = 48
    """Of the shelf of stacks."""
    threads: int = 1
    """Of torch on the CPU."""
    device: str = "cpu"
    """Or `cuda`."""
    dtype: str = "float32"
    """Of the weights, where `base` is not an artifact."""

    def __post_init__(self) -> None:
        for name in ("max_requests", "repeats", "anchors", "k", "rank", "stack_slots", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if min(self.rows, default=-1) < 0 or min((*self.prompts, *self.prompt_tokens), default=0) < 1:
            raise ValueError("rows are at least 0, prompts and prompt_tokens at least 1, and there is one of each")
        if self.k > self.anchors:
            raise ValueError(f"k is {self.k}, of {self.anchors} anchors; lower it")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineTimes:
    """What was measured."""

    fit: StepFit
    samples: tuple[StepSample, ...]
    stack_load_ms: float
    """From its bytes into its slot."""
    stack_bytes: int
    """Of one user's stack, as it is stored."""
    bank_bytes: int
    """Of all anchors' adapters on the device."""
    device: str


def measure_engine(base: str, config: MeasureConfig) -> EngineTimes:
    """Time steps of the engine that `mta serve` would run, in this process and with nothing around it.

    `base`: `tiny` (two random layers), `default` (the embedded base model), or the path of a `base` artifact.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        with _routed(base, config) as routed:
            return _Bench(config, routed).measure()
    finally:
        torch.set_num_threads(before)


@contextmanager
def _routed(base: str, config: MeasureConfig) -> Iterator[RoutedModel]:
    with tempfile.TemporaryDirectory(prefix="mta-measure-") as folder:
        if base in ("tiny", "default"):
            source = tiny_llama(Path(folder)) if base == "tiny" else EMBEDDED
            yield RoutedModel(load_backbone(source, device=config.device, dtype=config.dtype))
        else:
            artifact = open_base(base)
            yield RoutedModel(artifact.load(device=config.device), artifact.targets)


class _Bench:
    """An engine with a bank and stacks, stepped by hand."""

    def __init__(self, config: MeasureConfig, routed: RoutedModel) -> None:
        self.config, self.routed = config, routed
        # One thread on a CPU: its own time, so that what else the machine does is not counted.
        self._clock = time.thread_time if config.device == "cpu" and config.threads == 1 else time.perf_counter
        self.draw = random.Random(0)
        bank = random_adapters(routed, config.anchors, config.rank, 0)
        self.stack = random_adapters(routed, 1, 1, 1)[0]
        self.bank_bytes = sum(f.down.nbytes + f.up.nbytes for f in bank[0].factors.values()) * len(bank)
        routed.add_shelf(BANK, slots=config.anchors, rank=config.rank, alpha=1.0)
        routed.add_shelf(STACKS, slots=config.stack_slots, rank=1, alpha=1.0)
        for slot, adapter in enumerate(bank):
            put(routed.layers, BANK, slot, adapter)
        for slot in range(config.stack_slots):
            put(routed.layers, STACKS, slot, self.stack)
        limits = EngineConfig(max_requests=config.max_requests, max_step_tokens=config.max_step_tokens)
        self.engine = Engine(routed, (BANK, STACKS), limits)

    def measure(self) -> EngineTimes:
        for rows in (1, self.config.max_requests):  # warm
            self._mixtures(rows, repeats=2)
        samples: list[StepSample] = []
        for rows in sorted({n for n in self.config.rows if n <= self.config.max_requests}):
            samples += self._mixtures(rows, repeats=self.config.repeats)
        fit = fit_step(samples)
        log.info(
            "engine steps: %.2f ms + %.3f a row + %.2f a prompt + %.4f a token of it, median error %.1f%%",
            *(fit.step.fixed_ms, fit.step.row_ms, fit.step.prompt_ms, fit.step.prompt_token_ms, fit.error_p50 * 100),
        )
        tensors = to_bytes(self.stack)
        return EngineTimes(
            fit=fit,
            samples=tuple(samples),
            stack_load_ms=self._load_ms(tensors),
            stack_bytes=len(tensors),
            bank_bytes=self.bank_bytes,
            device=torch.cuda.get_device_name(self.config.device) if self.config.device.startswith("cuda") else "cpu",
        )

    def _mixtures(self, rows: int, *, repeats: int) -> list[StepSample]:
        """So many decoding rows, alone and beside prompts of each number and length."""
        mixtures = [(0, 0)] if rows else []
        for prompts in self.config.prompts:
            for length in self.config.prompt_tokens:
                if (
                    rows + prompts <= self.config.max_requests
                    and rows + prompts * length <= self.config.max_step_tokens
                ):
                    mixtures.append((prompts, length))
        took: dict[tuple[int, int], list[float]] = {mixture: [] for mixture in mixtures}
        for _ in range(repeats):
            # A fresh crowd each time: answers grow, and with them what a row reads of its cache.
            steps = 2 * len(mixtures) + 2
            tickets = [self._submit(16, steps + 1) for _ in range(rows)]
            while self.engine.stats().cached_tokens < 16 * rows:
                self.engine.step()
            for prompts, length in mixtures:
                tickets += [self._submit(length, 1) for _ in range(prompts)]  # over with this very step
                began_s = self._clock()
                self.engine.step()
                took[prompts, length].append((self._clock() - began_s) * 1e3)
            for ticket in tickets:
                ticket.cancel()
            while self.engine.stats().running:
                self.engine.step()
        return [
            StepSample(rows=rows, prompts=prompts, prompt_tokens=prompts * length, ms=statistics.median(times))
            for (prompts, length), times in took.items()
        ]

    def _submit(self, tokens: int, new_tokens: int) -> Ticket:
        slots = tuple(self.draw.sample(range(self.config.anchors), self.config.k))
        routes = {
            BANK: Route(slots=slots, weights=(1 / self.config.k,) * self.config.k),
            STACKS: Route(slots=(self.draw.randrange(self.config.stack_slots),), weights=(1.0,)),
        }
        prompt = tuple(self.draw.randrange(1000, 30000) for _ in range(tokens))
        return self.engine.submit(Request(prompt=prompt, max_new_tokens=new_tokens, routes=routes))

    def _load_ms(self, tensors: bytes) -> float:
        took: Sequence[float] = []
        for _ in range(self.config.repeats):
            began_s = self._clock()
            self.engine.load(STACKS, 0, from_bytes(tensors, self.stack.scale))
            self.engine.step()
            took = [*took, (self._clock() - began_s) * 1e3]
        return statistics.median(took)
