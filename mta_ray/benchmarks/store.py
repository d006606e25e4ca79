"""What a crowd in the store costs those who ask: throughput with many users stored over that with few, bytes a user.

Needs no Ray: requests go through store, personaliser and engine, as they do within a replica.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mta_ray.benchmarks.decode import random_adapters
from mta_ray.lamp.users import HistoryItem
from mta_ray.lora.adapter import to_bytes
from mta_ray.lora.bank import assemble
from mta_ray.lora.fusion_config import FusionConfig
from mta_ray.model.backbone import EMBEDDED, RoutedModel, load_backbone
from mta_ray.model.engine import Engine
from mta_ray.model.requests import Request
from mta_ray.model.settings import EngineConfig
from mta_ray.personalize.merge_then_adapt import BANK
from mta_ray.serving.banks import Banks, NewBank
from mta_ray.serving.database import Database, DatabaseConfig, open_database
from mta_ray.serving.identity import UserId
from mta_ray.serving.personal import Personaliser
from mta_ray.serving.served_bank import ServedBank
from mta_ray.serving.user_state import ItemSum, UserRoute, UserStack
from mta_ray.serving.user_store import NewUser, UserStore
from mta_ray.similarity.embedding import Encoder

TENANT, VERSION = "benchmark", "b1"
PAGE = 5000
"""Users that are loaded in one transaction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreBenchmarkConfig:
    """Two stores, one bank, one model."""

    few: int = 100
    many: int = 100_000
    users: int = 16
    """Decoded together."""
    requests: int = 64
    """Of a run, each of a user drawn anew."""
    rounds: int = 5
    """Timed runs over each store, which take turns."""
    anchors: int = 16
    k: int = 4
    rank: int = 8
    history_items: int = 5
    prompt_tokens: int = 32
    new_tokens: int = 16
    seed: int = 0


def store_benchmark(config: StoreBenchmarkConfig) -> dict[str, Any]:
    """`flat_in_users` (a ratio of medians), `bytes_per_user` on disk without and with a stack, and their sources."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mta-store-")))
        bench = _Bench(config)
        crowds = [_Crowd(bench, folder / f"{count}.db", count, stack) for count in (config.few, config.many)]
        for number in range(config.rounds + 1):
            for crowd in crowds:
                crowd.run(is_timed=number > 0)
        few, many = crowds
        bare = (many.bytes - few.bytes) / (config.many - config.few)
        return {
            "flat_in_users": many.tokens_per_s / few.tokens_per_s,
            "bytes_per_user": {"without_stack": round(bare), "with_stack": round(bare + few.add_stacks())},
            "tokens_per_s": {str(crowd.count): crowd.tokens_per_s for crowd in crowds},
            "personalise_ms": {str(crowd.count): statistics.median(crowd.personalise_ms) for crowd in crowds},
            "users_loaded_per_s": config.many / many.load_s,
        }


class _Bench:
    """What both stores share."""

    def __init__(self, config: StoreBenchmarkConfig) -> None:
        self.config = config
        self.routed = RoutedModel(load_backbone(EMBEDDED, seed=config.seed))
        self.encoder = Encoder()
        draw = np.random.default_rng(config.seed)
        vectors = draw.standard_normal((config.anchors, self.encoder.dim)).astype(np.float32)
        bank = assemble(
            random_adapters(self.routed, config.anchors, config.rank, config.seed),
            anchor_ids=tuple(f"anchor {n}" for n in range(config.anchors)),
            embeddings=vectors / np.linalg.norm(vectors, axis=1, keepdims=True),
            center=np.zeros(self.encoder.dim, dtype=np.float32),
            base_fingerprint=self.routed.backbone.fingerprint,
            encoder=self.encoder.source,
        )
        bank.load_into(self.routed.layers, BANK)
        self.served = ServedBank(
            version=VERSION,
            bank=bank,
            anchors=tuple(UserId(tenant=TENANT, id=name) for name in bank.anchor_ids),
            retired=frozenset(),
            fusion=FusionConfig(k=config.k),
        )
        limits = EngineConfig(
            max_requests=config.users,
            max_tokens=config.prompt_tokens + config.new_tokens,
            max_step_tokens=config.users * (config.prompt_tokens + 1),
            max_waiting=config.requests,
        )
        self.engine = Engine(self.routed, (BANK,), limits)


class _Crowd:
    """A store full of users, each with a history and a route."""

    def __init__(self, bench: _Bench, file: Path, count: int, stack: ExitStack) -> None:
        self.bench, self.file, self.count = bench, file, count
        self.database: Database = stack.enter_context(closing(open_database(DatabaseConfig(url=str(file)))))
        self.store = UserStore(self.database)
        banks = Banks(self.database)
        served = bench.served
        banks.publish(
            NewBank(
                version=VERSION,
                path=str(file),
                hash=VERSION,
                base_fingerprint=served.bank.base_fingerprint,
                encoder=served.bank.encoder,
                anchors=served.anchors,
            )
        )
        began_s = time.perf_counter()
        for start in range(0, count, PAGE):
            self.store.add_users([self._user(n) for n in range(start, min(start + PAGE, count))])
        self.load_s = time.perf_counter() - began_s
        self.bytes = self._bytes()
        self.personaliser = Personaliser(self.store, banks, bench.encoder, served, words=64)
        self.personaliser.follow()
        self.draw = random.Random(bench.config.seed)
        self.rates: list[float] = []
        self.personalise_ms: list[float] = []

    @property
    def tokens_per_s(self) -> float:
        return statistics.median(self.rates)

    def run(self, *, is_timed: bool) -> None:
        """Requests of users drawn from the whole store, from their names to their last tokens."""
        config, engine = self.bench.config, self.bench.engine
        began_s = time.perf_counter()
        tickets = []
        for _ in range(config.requests):
            asked_s = time.perf_counter()
            user = UserId(tenant=TENANT, id=f"user {self.draw.randrange(self.count)}")
            personal = self.personaliser.model_of(user)
            if is_timed:
                self.personalise_ms.append((time.perf_counter() - asked_s) * 1e3)
            assert personal.route is not None
            prompt = tuple(self.draw.randrange(1000, 30000) for _ in range(config.prompt_tokens))
            request = Request(
                prompt=prompt, max_new_tokens=config.new_tokens, routes={BANK: personal.route}, owner=user.id
            )
            tickets.append(engine.submit(request))
        while any(not ticket.is_over for ticket in tickets):
            engine.step()
        if is_timed:
            made = sum(len(ticket.answer().tokens) for ticket in tickets)
            self.rates.append(made / (time.perf_counter() - began_s))

    def add_stacks(self) -> float:
        """Give every user a stack of rank 1; the bytes that each has cost."""
        bench, before = self.bench, self._bytes()
        adapter = random_adapters(bench.routed, 1, 1, bench.config.seed + 1)[0]
        tensors = to_bytes(adapter)
        for number in range(self.count):
            user = UserId(tenant=TENANT, id=f"user {number}")
            stack = UserStack(
                tensors=tensors,
                kind="lora",
                rank=adapter.rank,
                scale=adapter.scale,
                base_fingerprint=bench.served.bank.base_fingerprint,
                bank_version=VERSION,
                history_version=self.store.read(user).version,
            )
            self.store.put_stack(user, stack)
        return (self._bytes() - before) / self.count

    def _user(self, number: int) -> NewUser:
        config, dim = self.bench.config, self.bench.encoder.dim
        draw = np.random.default_rng((config.seed, number))
        history = [
            HistoryItem(id=str(n), content=f"a film of {draw.integers(10**9)} robots and {n} lovers", target="sci-fi")
            for n in range(config.history_items)
        ]
        slots = draw.choice(config.anchors, config.k, replace=False)
        route = UserRoute(
            anchors=tuple(self.bench.served.anchors[slot] for slot in slots),
            weights=(1 / config.k,) * config.k,
            bank_version=VERSION,
            history_version=0,
        )
        total = draw.standard_normal(dim).astype(np.float32)
        return NewUser(
            user=UserId(tenant=TENANT, id=f"user {number}"),
            task="movie_tagging",
            history=history,
            item_sum=ItemSum(total=total, items=len(history), encoder=self.bench.encoder.source),
            route=route,
        )

    def _bytes(self) -> int:
        self.database.forget_pages()  # what still lies in the log goes into the file
        return self.file.stat().st_size
