"""Replicas are killed under load: is a request lost, or answered with another user's adapter?

    python -m mta_ray.benchmarks.killed_replicas --json FILE

Clients ask over HTTP without a pause, and retry once: after a 503 (when Retry-After says), a dropped connection, or a
stream that broke off. Every answer is compared with plain generation by its own user's adapter. Needs httpx.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import ray
from ray import serve

from mta_ray.benchmarks.command import settings_from_words, show
from mta_ray.benchmarks.marked_users import make_bank, make_base, mark_users, tiny_llama
from mta_ray.cluster import ClusterConfig, connect
from mta_ray.model.backbone import EMBEDDED
from mta_ray.personalize.base_model import open_base
from mta_ray.serving.args import ServingArgs
from mta_ray.serving.database import open_database
from mta_ray.serving.local import APP_NAME, free_port, start
from mta_ray.serving.user_store import UserStore

log = logging.getLogger(__name__)
PROMPT = "description: a lonely robot finds a friend tag:"
TIMEOUT_S = 180.0
ANSWER_S = 1.0
"""A replica that does not tell its process id in this time is starting."""
WATCH_S = 0.5
"""Between two looks at how many replicas run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KillConfig:
    """How much load, and how many deaths."""

    seconds: float = 120.0
    """How long clients ask."""
    every: float = 15.0
    """Seconds from one kill to the next; the first one after half of this."""
    at_once: int = 1
    """Replicas that are killed together."""
    replicas: int = 2
    clients: int = 16
    """Each with one request under way, every other one a stream."""
    users: int = 24
    """Whom the clients ask as."""
    new_tokens: int = 24
    base: str = "default"
    """`default`, the embedded base model, or `tiny`, a random one of two layers."""
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One request."""

    user: str
    text: str | None
    """None: lost."""
    failures: tuple[str, ...]
    """Why the first try, and the second, gave no answer."""
    took_s: float
    """With the retry, and the wait before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """One blow."""

    at_s: float
    replicas: int
    back_after_s: float | None = None
    """When as many replicas as before ran again; None: not before the next blow, or the end."""


class Unanswered(Exception):
    """A try that gave no answer."""

    def __init__(self, why: str, *, wait_s: float = 0.0, is_final: bool = False) -> None:
        super().__init__(why)
        self.why, self.wait_s, self.is_final = why, wait_s, is_final


def kill_replicas(config: KillConfig) -> dict[str, Any]:
    """What became of the requests."""
    with tempfile.TemporaryDirectory(prefix="mta-kill-") as name, connect(ClusterConfig(cpus=config.replicas + 2)):
        # 1. a base, a bank, and the service
        folder = Path(name)
        source = EMBEDDED if config.base == "default" else tiny_llama(folder / "model")
        base = open_base(make_base(folder / "base", source))
        bank = make_bank(folder / "bank", source, seed=config.seed)
        args = ServingArgs(
            base=str(base.path),
            bank=str(folder / "bank"),
            store=str(folder / "users.db"),
            replicas=config.replicas,
            cpus_per_replica=0.5,
            stack_slots=max(config.clients, config.users // 2),  # fewer than users: stacks come and go
        )
        port = free_port("127.0.0.1")
        try:
            start(args, "127.0.0.1", port)

            # 2. users
            url = f"http://127.0.0.1:{port}"
            store = UserStore(open_database(args.database))
            with httpx.Client(base_url=url, timeout=TIMEOUT_S, trust_env=False) as http:
                answers = mark_users(
                    http,
                    config.users,
                    store=store,
                    tenant=args.tenant,
                    backbone=base.load(),
                    bank=bank,
                    ask=PROMPT,
                    tokens=config.new_tokens,
                )

            # 3. load and deaths
            began_s = time.monotonic()
            outcomes, kills = asyncio.run(_run(config, url, list(answers)))
            seconds = time.monotonic() - began_s
        finally:
            serve.shutdown()
    return _report(config, answers, outcomes, kills, seconds)


async def _run(config: KillConfig, url: str, users: Sequence[str]) -> tuple[list[Outcome], list[Kill]]:
    until_s = time.monotonic() + config.seconds
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits, trust_env=False) as http:
        killing = asyncio.create_task(_kill_now_and_then(config, until_s))
        outcomes = await asyncio.gather(
            *(_client(config, http, users, number, until_s) for number in range(config.clients))
        )
        return [outcome for each in outcomes for outcome in each], await killing


async def _client(
    config: KillConfig, http: httpx.AsyncClient, users: Sequence[str], number: int, until_s: float
) -> list[Outcome]:
    draw = random.Random(f"{config.seed} {number}")
    outcomes: list[Outcome] = []
    while time.monotonic() < until_s:
        user, streams = draw.choice(users), len(outcomes) % 2 == number % 2
        body = {"model": "mta", "user": user, "prompt": PROMPT, "max_tokens": config.new_tokens, "temperature": 0}
        began_s = time.monotonic()
        text: str | None = None
        failures: list[str] = []
        for tries_left in (1, 0):
            try:
                text = await (_stream(http, body) if streams else _whole(http, body))
                break
            except Unanswered as error:
                failures.append(error.why)
                if error.is_final or not tries_left:
                    break
                await asyncio.sleep(error.wait_s)
        took_s = time.monotonic() - began_s
        outcomes.append(Outcome(user=user, text=text, failures=tuple(failures), took_s=took_s))
    return outcomes


async def _whole(http: httpx.AsyncClient, body: Mapping[str, Any]) -> str:
    try:
        answer = await http.post("/v1/completions", json=body)
    except httpx.TransportError as error:
        raise Unanswered(type(error).__name__) from None
    _check(answer)
    return str(answer.json()["choices"][0]["text"]).strip()


async def _stream(http: httpx.AsyncClient, body: Mapping[str, Any]) -> str:
    text = ""
    try:
        async with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            _check(answer)
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    return text.strip()
                chunk = json.loads(line.removeprefix("data: ") or "{}")
                if "error" in chunk:
                    raise Unanswered("broken stream")
                text += "".join(choice["text"] for choice in chunk.get("choices", ()))
    except httpx.TransportError as error:
        raise Unanswered(type(error).__name__) from None
    raise Unanswered("stream without an end")


def _check(answer: httpx.Response) -> None:
    if answer.status_code != 200:
        wait_s = float(answer.headers.get("retry-after", 0))
        raise Unanswered(f"status {answer.status_code}", wait_s=wait_s, is_final=answer.status_code != 503)


async def _kill_now_and_then(config: KillConfig, until_s: float) -> list[Kill]:
    began_s = time.monotonic()
    pids: dict[str, int] = {}
    kills: list[Kill] = []
    next_s = began_s + config.every / 2
    while next_s < until_s:
        await asyncio.sleep(next_s - time.monotonic())
        pids = await asyncio.to_thread(_replica_pids, pids)
        victims = list(pids.values())[: config.at_once]
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        at_s, next_s = time.monotonic() - began_s, next_s + config.every
        log.info("%.1f s: killed %d of %d replicas", at_s, len(victims), len(pids))
        back_after_s = await _back(config.replicas, min(next_s, until_s))
        kills.append(Kill(at_s=at_s, replicas=len(victims), back_after_s=back_after_s))
    return kills


def _replica_pids(known: Mapping[str, int]) -> dict[str, int]:
    """The processes of the replicas that run, the oldest first; one that is starting does not answer yet."""
    names = [a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if f"{APP_NAME}#Model#" in a["name"]]
    pids = {name: pid for name, pid in known.items() if name in names}
    asked = {}
    for name in names:
        if name not in pids:
            asked[ray.get_actor(name, namespace="serve").__ray_call__.remote(lambda _: os.getpid())] = name
    told, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S) if asked else ([], [])
    return pids | {asked[pid]: ray.get(pid) for pid in told}


async def _back(replicas: int, until_s: float) -> float | None:
    """Seconds until that many replicas run, after fewer did."""
    began_s, were_fewer = time.monotonic(), False
    while time.monotonic() < until_s - WATCH_S:
        await asyncio.sleep(WATCH_S)
        status = await asyncio.to_thread(serve.status)
        running = status.applications[APP_NAME].deployments["Model"].replica_states.get("RUNNING", 0)
        if were_fewer and running >= replicas:
            return time.monotonic() - began_s
        were_fewer = were_fewer or running < replicas
    return None


def _report(
    config: KillConfig, answers: Mapping[str, str], outcomes: Sequence[Outcome], kills: Sequence[Kill], seconds: float
) -> dict[str, Any]:
    took_ms = [outcome.took_s * 1e3 for outcome in outcomes]
    back_s = [kill.back_after_s for kill in kills if kill.back_after_s is not None]
    others = set(answers.values())
    return {
        "requests": len(outcomes),
        "answered_first_time": sum(o.text is not None and not o.failures for o in outcomes),
        "answered_at_the_retry": sum(o.text is not None and bool(o.failures) for o in outcomes),
        "lost": sum(o.text is None for o in outcomes),
        "wrong": sum(o.text is not None and o.text != answers[o.user] for o in outcomes),
        "wrong_and_another_users": sum(o.text != answers[o.user] and o.text in others for o in outcomes),
        "failures": dict(Counter(why for o in outcomes for why in o.failures)),
        "ms_p50": float(np.percentile(took_ms, 50)),
        "ms_p99": float(np.percentile(took_ms, 99)),
        "ms_max": max(took_ms),
        "kills": sum(kill.replicas for kill in kills),
        "replicas_back_s_p50": float(np.median(back_s)) if back_s else None,
        "seconds": seconds,
        "each_kill": [asdict(kill) for kill in kills],
        "config": asdict(config),
    }


def main() -> int:
    """Print and write what became of the requests; 1 where one was lost or wrong."""
    config, file = settings_from_words(KillConfig, __doc__)
    result = kill_replicas(config)
    show(result, file)
    return 1 if result["lost"] or result["wrong"] else 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    log.setLevel(logging.INFO)
    sys.exit(main())
