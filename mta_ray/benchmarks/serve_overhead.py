"""What Ray Serve adds to the time to first token: the service of `mta serve` next to its engine in plain Python.

    python -m mta_ray.benchmarks.serve_overhead --json FILE

One client asks, as one user with a route and a stack, by HTTP and then at an engine of this process, again and again by
turns: a busy machine slows both alike. Needs httpx (extra `test`).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch

from mta_ray.benchmarks.marked_users import make_bank, make_base, random_adapter
from mta_ray.cluster import JOB_VARIABLE
from mta_ray.lora.adapter import from_bytes, to_bytes
from mta_ray.lora.slots import Route
from mta_ray.model.backbone import EMBEDDED, RoutedModel
from mta_ray.model.engine import Engine
from mta_ray.model.requests import Request
from mta_ray.model.settings import Sampling
from mta_ray.personalize.base_model import open_base
from mta_ray.personalize.merge_then_adapt import BANK
from mta_ray.serving.args import ServingArgs
from mta_ray.serving.banks import Banks
from mta_ray.serving.database import open_database
from mta_ray.serving.exchange import Ask, Turn
from mta_ray.serving.identity import UserId
from mta_ray.serving.personal import open_personaliser
from mta_ray.serving.replica import STACKS
from mta_ray.serving.speaker import Speaker
from mta_ray.serving.user_state import UserStack
from mta_ray.serving.user_store import UserStore
from mta_ray.serving.wording import Prompts

log = logging.getLogger(__name__)
ROUNDS, QUICK_ROUNDS, WARM_ROUNDS = 200, 50, 10
NEW_USERS, QUICK_NEW_USERS = 50, 15
TOKENS = 8
"""Of each answer: enough for a first text, and read to the end, so that the next round finds an idle engine."""
USER = "ann"
FILMS = ("robots rise in a dark future", "a spaceship lost between the stars")
QUESTION = "a lonely robot finds a friend"
START_S = 180.0
"""Far more than a service needs to start on an idle machine."""


def serve_overhead(*, quick: bool = False) -> dict[str, Any]:
    """`serve_ttft_overhead_ms`, the median through Ray Serve less that of the engine alone, and `new_user_ms`.

    The latter is from a history that is sent to the first text of an answer to a user who was not known before.
    """
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="mta-overhead-") as name:
        folder = Path(name)
        args = ServingArgs(base=str(folder / "base"), bank=str(folder / "bank"), store=str(folder / "serving.db"))
        make_base(folder / "base", EMBEDDED)
        make_bank(folder / "bank", EMBEDDED, seed=1)
        torch.set_num_threads(args.threads)
        try:
            with _service(args, folder) as url, httpx.Client(base_url=url, timeout=START_S, trust_env=False) as http:
                _introduce(http, args)
                with closing(BareEngine(args)) as bare:
                    figures = _compare(http, bare, QUICK_ROUNDS if quick else ROUNDS)
                return figures | _new_users(http, QUICK_NEW_USERS if quick else NEW_USERS)
        finally:
            torch.set_num_threads(threads)


class BareEngine:
    """The engine that a replica has, with the same user's route and stack, and nothing around it."""

    def __init__(self, args: ServingArgs) -> None:
        base = open_base(args.base)
        routed = RoutedModel(base.load(), base.targets)
        with closing(open_database(args.database)) as database:
            store = UserStore(database, args.history)
            personaliser = open_personaliser(
                args, store, Banks(database), base_fingerprint=base.fingerprint, device="cpu"
            )
            user = UserId(tenant=args.tenant, id=USER)
            personal, stack = personaliser.model_of(user), store.read_stack(user)
        assert personal.route is not None and stack is not None
        personal.served.bank.load_into(routed.layers, BANK)
        routed.add_shelf(STACKS, slots=args.stack_slots, rank=args.stack.rank, alpha=args.stack.alpha)
        self._engine = Engine(routed, (BANK, STACKS), args.engine)
        self._engine.start()
        self._engine.load(STACKS, 0, from_bytes(stack.tensors, stack.scale)).result()

        prompts = Prompts(
            backbone=routed.backbone, wording=base.wording, chat=args.wording, max_tokens=self._engine.max_tokens
        )
        self._ask = Ask(
            user=user,
            turns=(Turn(role="user", text=QUESTION),),
            max_tokens=TOKENS,
            sampling=Sampling(temperature=0.0),
        )
        self._prompts = prompts
        self._request = Request(
            prompt=prompts.of_chat(self._ask.turns, (), TOKENS),
            max_new_tokens=TOKENS,
            routes={BANK: personal.route, STACKS: Route(slots=(0,), weights=(1.0,))},
            sampling=self._ask.sampling,
            stop_ids=frozenset({routed.backbone.end_id}),
            owner=USER,
        )

    def ask(self) -> tuple[float, str]:
        """Seconds to the first text, and the answer."""
        speaker, texts, first_s = Speaker(self._prompts, self._ask), [], 0.0
        began_s = time.perf_counter()
        for piece in self._engine.submit(self._request):
            if (part := speaker.part(piece)) is not None:
                first_s = first_s or time.perf_counter() - began_s
                texts.append(part.text)
        return first_s, "".join(texts)

    def close(self) -> None:
        """End the engine's thread."""
        self._engine.close()


def _compare(http: httpx.Client, bare: BareEngine, rounds: int) -> dict[str, Any]:
    served_s, engine_s = [], []
    for number in range(WARM_ROUNDS + rounds):
        (serve_s, said), (bare_s, wanted) = _ask(http), bare.ask()
        if said != wanted:
            raise RuntimeError(f"the service said {said!r}, its engine alone {wanted!r}: not the same work")
        if number >= WARM_ROUNDS:
            served_s.append(serve_s)
            engine_s.append(bare_s)
    serve, engine = _told(served_s), _told(engine_s)
    return {
        "serve_ttft_overhead_ms": round(serve["p50"] - engine["p50"], 2),
        "serve_ttft_ms": serve,
        "engine_ttft_ms": engine,
        "n": rounds,
        "load_average": round(os.getloadavg()[0], 1),
        "cpus": os.cpu_count(),
    }


def _new_users(http: httpx.Client, users: int) -> dict[str, Any]:
    took_s = []
    for number in range(users):
        user = f"new {number}"
        items = [{"description": f"{film} {number}", "tag": "sci-fi"} for film in FILMS]
        began_s = time.perf_counter()
        answer = http.put(f"/v1/users/{user}/history", json={"task": "movie_tagging", "items": items})
        answer.raise_for_status()
        stored_s = time.perf_counter() - began_s
        first_s, _ = _ask(http, user)
        took_s.append(stored_s + first_s)
    told = _told(took_s)
    return {"new_user_ms": told["p50"], "new_user": told}


def _ask(http: httpx.Client, user: str = USER) -> tuple[float, str]:
    body = {
        "model": "mta",
        "user": user,
        "max_tokens": TOKENS,
        "temperature": 0,
        "stream": True,
        "messages": [{"role": "user", "content": QUESTION}],
    }
    began_s = time.perf_counter()
    with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        chunks = answer.iter_raw()
        events = [next(chunks)]
        first_s = time.perf_counter() - began_s
        events += chunks
    if answer.status_code != 200:
        raise RuntimeError(f"the service answered {answer.status_code}: {b''.join(events).decode()}")
    told = [json.loads(event) for event in b"".join(events).decode().split("data: ")[1:-1]]
    return first_s, "".join(event["choices"][0]["delta"].get("content") or "" for event in told)


def _told(seconds: list[float]) -> dict[str, float]:
    return {
        "p50": round(statistics.median(seconds) * 1e3, 2),
        "p95": round(statistics.quantiles(seconds, n=20)[-1] * 1e3, 2),
        "least": round(min(seconds) * 1e3, 2),
    }


# ---- the service


@contextmanager
def _service(args: ServingArgs, folder: Path) -> Iterator[str]:
    """`mta serve` in a process and on a Ray cluster of its own; its URL."""
    command = [sys.executable, "-m", "mta_ray.cli", "serve", "--port", "0"]
    command += ["--base", args.base, "--bank", args.bank, "--store", args.store]
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", JOB_VARIABLE)}
    with open(folder / "serve.log", "w+") as told:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=told, text=True, env=environment)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()  # it says where, or ends
            if not line.startswith("serving at "):
                process.wait()
                told.seek(0)
                raise RuntimeError(f"the service did not start: {told.read()[-2000:]}")
            yield line.split()[2].removesuffix("/v1")
        finally:
            process.terminate()
            try:
                process.wait(timeout=START_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _introduce(http: httpx.Client, args: ServingArgs) -> None:
    """The user's history by HTTP, as anybody's; the stack, which would take training, into the store."""
    items = [{"description": film, "tag": "sci-fi"} for film in FILMS]
    answer = http.put(f"/v1/users/{USER}/history", json={"task": "movie_tagging", "items": items})
    answer.raise_for_status()
    base, user = open_base(args.base), UserId(tenant=args.tenant, id=USER)
    adapter = random_adapter(base.load(), rank=args.stack.rank, generator=torch.Generator().manual_seed(2))
    with closing(open_database(args.database)) as database:
        store = UserStore(database, args.history)
        stack = UserStack(
            tensors=to_bytes(adapter),
            kind="lora",
            rank=adapter.rank,
            scale=adapter.scale,
            base_fingerprint=base.fingerprint,
            bank_version=answer.json()["bank_version"],
            history_version=store.read(user).version,
        )
        store.put_stack(user, stack)


def main() -> None:
    """Print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--quick", action="store_true", help="fewer rounds: within a minute on two cores")
    asked = parser.parse_args()
    result = serve_overhead(quick=asked.quick)
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=2))
    print(json.dumps(result))


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main()
