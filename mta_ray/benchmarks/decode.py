"""How fast a batch of different users is decoded, next to the same batch without adapters, PEFT, and merging.

    python -m mta_ray.benchmarks.decode --json FILE

Every figure is a ratio of medians of runs that took turns in one process, so that a busy machine slows all alike. Needs
torch, transformers and peft, and no Ray.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from mta_ray.benchmarks.random_base import random_base
from mta_ray.lora.adapter import Adapter, Factors, save_peft
from mta_ray.lora.fusion import fuse, stack
from mta_ray.lora.slots import Route, put
from mta_ray.model.backbone import RoutedModel, merge
from mta_ray.model.engine import Engine
from mta_ray.model.requests import Request
from mta_ray.model.settings import EngineConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkConfig:
    """One base model, one batch of users."""

    base: str = "default"
    """`default`, or a shape of `random_base`: `wide`, `8b`."""
    users: int = 16
    """Requests decoded together, each of another user."""
    anchors: int = 16
    k: int = 4
    rank: int = 8
    stack_rank: int = 1
    prompt_tokens: int = 32
    new_tokens: int = 32
    rounds: int = 5
    """Times that each contestant is timed, after one run to get warm."""
    merge_users: int = 8
    """Users that the one-at-a-time rival serves in a run; its rate needs no more."""
    rivals: bool = True
    """PEFT, merging, and transformers' own continuous batching, too."""
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Run:
    """One contestant's seconds and tokens."""

    total_s: float
    decode_s: float
    """From every request's first token to the last token of all."""
    decoded: int
    """Tokens after the first ones."""
    made: int
    answers: tuple[tuple[int, ...], ...]


def benchmark(config: BenchmarkConfig) -> dict[str, Any]:
    """Ratios (keys `mixed_over_*`), and what they were computed from."""
    bench = _Bench(config)
    contestants: dict[str, Callable[[], Run]] = {"mixed": bench.mixed, "base": bench.base}
    if config.rivals:
        contestants |= {"peft": bench.peft, "merge": bench.merge, "transformers": bench.transformers}
        contestants |= {"traffic": bench.traffic, "peft_traffic": bench.peft_traffic}
        try:
            bench.transformers()
        except RuntimeError as error:  # 5.24's no longer runs every model
            log.warning("%s: transformers' continuous batching is left out: %s", config.base, error)
            del contestants["transformers"]
    runs: dict[str, list[Run]] = {name: [] for name in contestants}
    for number in range(config.rounds + 1):
        for name, run in contestants.items():
            if number == 0 and name.endswith("traffic"):
                continue  # the same code as mixed and peft: warm already
            result = run()
            if number:
                runs[name].append(result)
            log.info("%s %s: %.0f ms, decode %.0f ms", config.base, name, result.total_s * 1e3, result.decode_s * 1e3)

    decode = {name: statistics.median(r.decoded / r.decode_s for r in each) for name, each in runs.items()}
    total = {name: statistics.median(r.made / r.total_s for r in each) for name, each in runs.items()}
    out: dict[str, Any] = {"mixed_over_base": decode["mixed"] / decode["base"]}
    if config.rivals:
        out |= {
            "mixed_over_peft": decode["mixed"] / decode["peft"],
            # Adapters that cost nothing at all would give this much over PEFT: the rest is the base model.
            "base_over_peft": decode["base"] / decode["peft"],
            "mixed_over_peft_traffic": total["traffic"] / total["peft_traffic"],
            "mixed_over_merge": total["mixed"] / total["merge"],
            "same_answers_as_peft": _same(runs["mixed"][0], runs["peft"][0]),
            "same_answers_as_merge": _same(runs["mixed"][0], runs["merge"][0]),
        }
    if "transformers" in total:
        out["base_over_transformers"] = total["base"] / total["transformers"]
    return out | {
        "decode_tokens_per_s": decode,
        "total_tokens_per_s": total,
        "config": asdict(config),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if config.device == "cuda" else "cpu",
    }


class _Bench:
    """The same users, adapters and prompts for every contestant."""

    def __init__(self, config: BenchmarkConfig) -> None:
        self.config = config
        backbone = random_base(config.base, device=config.device, dtype=config.dtype, seed=config.seed)
        # Copies before layers are replaced. PEFT's, the one that is merged into, and the library's own engine.
        self._plain = copy.deepcopy(backbone.model) if config.rivals else None
        self._peft_base = copy.deepcopy(backbone.model) if config.rivals else None
        self.routed = RoutedModel(backbone)
        draw = random.Random(config.seed)
        bank = random_adapters(self.routed, config.anchors, config.rank, config.seed)
        own = random_adapters(self.routed, config.users, config.stack_rank, config.seed + 1)
        for shelf, filled in (("bank", bank), ("stack", own)):
            self.routed.add_shelf(shelf, slots=len(filled), rank=filled[0].rank, alpha=1.0)
            for slot, adapter in enumerate(filled):
                put(self.routed.layers, shelf, slot, adapter)
        self._routes = []
        self.exported: list[Adapter] = []
        for user in range(config.users):
            slots = tuple(draw.sample(range(config.anchors), config.k))
            weights = tuple(1 / config.k for _ in slots)
            self._routes.append(
                {"bank": Route(slots=slots, weights=weights), "stack": Route(slots=(user,), weights=(1.0,))}
            )
            if config.rivals:
                self.exported.append(stack(fuse([bank[slot] for slot in slots], weights), own[user]))

        def prompt(tokens: int) -> tuple[int, ...]:
            return tuple(draw.randrange(1000, 30000) for _ in range(tokens))

        self._prompts = [prompt(config.prompt_tokens) for _ in range(config.users)]
        # Two rounds of users, with prompts and answers of many lengths.
        self._lengths = [
            (draw.randint(4, 2 * config.prompt_tokens), draw.randint(2, 2 * config.new_tokens))
            for _ in range(2 * config.users)
        ]
        self._traffic = [(n % config.users, prompt(p), new) for n, (p, new) in enumerate(self._lengths)]
        tokens = 2 * (config.prompt_tokens + config.new_tokens)
        self.engine = Engine(
            self.routed,
            ("bank", "stack"),
            EngineConfig(
                max_requests=config.users,
                max_tokens=tokens,
                max_step_tokens=config.users * (config.prompt_tokens + 1),
                max_waiting=2 * config.users,
            ),
        )
        self._peft = _with_adapters(self._peft_base, self.exported) if config.rivals else None
        self._pad = 0

    # -- ours

    def mixed(self) -> Run:
        return self._ours([(u, p, self.config.new_tokens) for u, p in enumerate(self._prompts)], routed=True)

    def base(self) -> Run:
        return self._ours([(u, p, self.config.new_tokens) for u, p in enumerate(self._prompts)], routed=False)

    def traffic(self) -> Run:
        return self._ours(self._traffic, routed=True)

    def _ours(self, work: Sequence[tuple[int, tuple[int, ...], int]], *, routed: bool) -> Run:
        start = time.perf_counter()
        tickets = [
            self.engine.submit(
                Request(prompt=prompt, max_new_tokens=new, routes=self._routes[user] if routed else {}, owner=str(user))
            )
            for user, prompt, new in work
        ]
        made = 0
        first = 0.0
        while any(not ticket.is_over for ticket in tickets):
            made += self.engine.step()
            if not first and made >= min(len(work), self.config.users):
                first, before = time.perf_counter(), made
        end = time.perf_counter()
        answers = tuple(ticket.answer().tokens for ticket in tickets)
        return Run(end - start, end - first, made - before, made, answers)

    # -- the others

    def peft(self) -> Run:
        return self._generate(
            self._peft,
            self._prompts,
            self.config.new_tokens,
            adapter_names=[f"u{u}" for u in range(len(self._prompts))],
        )

    def peft_traffic(self) -> Run:
        """Arrivals in batches; a batch ends when its longest answer does, and only asked-for tokens are counted."""
        size = self.config.users
        runs = []
        for at in range(0, len(self._traffic), size):
            batch = self._traffic[at : at + size]
            run = self._generate(
                self._peft,
                [prompt for _, prompt, _ in batch],
                max(new for _, _, new in batch),
                adapter_names=[f"u{user}" for user, _, _ in batch],
            )
            runs.append(replace(run, made=sum(new for _, _, new in batch)))
        return Run(
            sum(r.total_s for r in runs),
            sum(r.decode_s for r in runs),
            sum(r.decoded for r in runs),
            sum(r.made for r in runs),
            tuple(a for r in runs for a in r.answers),
        )

    def merge(self) -> Run:
        """One user at a time: their adapter into the weights, their answer, the weights back."""
        assert self._plain is not None
        saved = {name: self._plain.get_submodule(name).weight.detach().clone() for name in self.routed.layers}
        start, runs = time.perf_counter(), []
        for adapter, prompt in list(zip(self.exported, self._prompts, strict=True))[: self.config.merge_users]:
            merge(self._plain, adapter)
            runs.append(self._generate(self._plain, [prompt], self.config.new_tokens))
            with torch.no_grad():
                for name, weight in saved.items():
                    self._plain.get_submodule(name).weight.copy_(weight)  # type: ignore[operator]
        end = time.perf_counter()
        decode = sum(r.decode_s for r in runs)
        decoded, made = sum(r.decoded for r in runs), sum(r.made for r in runs)
        return Run(end - start, decode, decoded, made, tuple(r.answers[0] for r in runs))

    def transformers(self) -> Run:
        """Their continuous batching over the same prompts, no adapters."""
        assert self._plain is not None
        settings = GenerationConfig(
            max_new_tokens=self.config.new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=self._pad
        )
        room = self.config.users * (self.config.prompt_tokens + self.config.new_tokens)
        limits = ContinuousBatchingConfig(
            num_blocks=room // 32 + 2 * self.config.users,
            max_batch_tokens=self.config.users * (self.config.prompt_tokens + 1),
            allow_block_sharing=False,
        )
        with self._plain.continuous_batching_context_manager(  # type: ignore[operator]
            generation_config=settings, continuous_batching_config=limits, warmup=False
        ) as manager:
            manager.add_requests([[1000]], max_new_tokens=2)  # its cache is allocated by the first request
            _results(manager, 1)
            start = time.perf_counter()
            manager.add_requests([list(p) for p in self._prompts], max_new_tokens=self.config.new_tokens)
            answers = _results(manager, len(self._prompts))
            total = time.perf_counter() - start
        made = sum(len(answer) for answer in answers)
        return Run(total, total, made, made, tuple(answers))

    def _generate(self, model: Any, prompts: Sequence[tuple[int, ...]], new_tokens: int, **more: Any) -> Run:
        width = max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), width), self._pad, device=self.config.device)
        attention = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            attention[row, width - len(prompt) :] = 1
        times: list[float] = []

        def clock(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if scores.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter())
            return scores

        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=attention,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=self._pad,
                eos_token_id=None,
                logits_processor=LogitsProcessorList([clock]),
                **more,
            )
        answers = tuple(tuple(row) for row in out[:, width:].tolist())
        end = time.perf_counter()
        return Run(end - start, end - times[0], len(prompts) * (new_tokens - 1), len(prompts) * new_tokens, answers)


def random_adapters(routed: RoutedModel, count: int, rank: int, seed: int) -> list[Adapter]:
    draw = torch.Generator().manual_seed(seed)
    return [
        Adapter(
            factors={
                name: Factors(
                    down=torch.randn(rank, layer.base.in_features, generator=draw) * layer.base.in_features**-0.5,
                    up=torch.randn(layer.base.out_features, rank, generator=draw) * 0.2,
                )
                for name, layer in routed.layers.items()
            },
            scale=1.0,
        )
        for _ in range(count)
    ]


def _with_adapters(model: PreTrainedModel | None, adapters: Sequence[Adapter]) -> Any:
    from peft import PeftModel

    wrapped: Any = None
    with tempfile.TemporaryDirectory() as folder:
        for user, adapter in enumerate(adapters):
            path = str(save_peft(adapter, Path(folder) / str(user), base_model="benchmark"))
            if wrapped is None:
                wrapped = PeftModel.from_pretrained(model, path, adapter_name=f"u{user}")
            else:
                wrapped.load_adapter(path, adapter_name=f"u{user}")
    return wrapped.eval()


def _results(manager: Any, count: int) -> list[tuple[int, ...]]:
    done: dict[str, tuple[int, ...]] = {}
    while len(done) < count:
        result = manager.get_result(timeout=60)
        if result is None:
            raise RuntimeError("no result: its engine has ended, or is at it for a minute")
        if result.is_finished():
            done[result.request_id] = tuple(result.generated_tokens)
    return list(done.values())


def _same(one: Run, other: Run) -> float:
    return sum(a == b for a, b in zip(one.answers, other.answers, strict=False)) / len(other.answers)


def main() -> None:
    """Print and write the ratios of each base model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--base", nargs="+", default=["default", "wide"], help="default, wide, 8b")
    parser.add_argument("--quick", action="store_true", help="fewer runs: within 3 minutes on two cores")
    parser.add_argument("--no-rivals", action="store_true", help="only ours, with and without adapters")
    parser.add_argument("--threads", type=int, help="of torch on the CPU; default: torch's own choice")
    for name in ("users", "anchors", "k", "rank", "prompt_tokens", "new_tokens", "rounds", "merge_users", "seed"):
        parser.add_argument("--" + name.replace("_", "-"), type=int)
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    asked = vars(parser.parse_args())
    if asked["threads"]:
        torch.set_num_threads(asked["threads"])
    fields = {name: value for name, value in asked.items() if value is not None and name in BenchmarkConfig.__slots__}
    config = BenchmarkConfig(**fields | {"base": "default", "rivals": not asked["no_rivals"]})
    if asked["quick"]:
        config = replace(config, rounds=2, merge_users=4)
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)  # it says much of its own end
    results = {base: benchmark(replace(config, base=base)) for base in asked["base"]}
    if asked["json"]:
        asked["json"].write_text(json.dumps(results, indent=2))
    for base, result in results.items():
        print(base, {name: round(value, 3) for name, value in result.items() if isinstance(value, float)})


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    log.setLevel(logging.INFO)
    main()
