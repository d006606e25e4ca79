"""The whole service on loopback, for tests that talk to it: real Ray Serve before a tiny random model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import httpx
import openai

from mta_ray.benchmarks.marked_users import make_bank, make_base, tiny_llama
from mta_ray.lora.bank import Bank
from mta_ray.model.settings import EngineConfig
from mta_ray.personalize.train_config import TrainConfig
from mta_ray.serving.args import ServingArgs
from mta_ray.serving.database import DatabaseConfig, open_database
from mta_ray.serving.keys import Keys
from mta_ray.serving.local import free_port, start
from mta_ray.serving.schema import Limits
from mta_ray.serving.user_store import UserStore

ANCHORS = ("anna", "bert", "cleo")
FILMS = {
    "ann": ["robots rise in a dark future", "a spaceship lost between the stars"],
    "bob": ["two lovers meet in Paris", "a wedding nobody wanted"],
    "cid": ["a heist told backwards"],
}
QUESTION = "a lonely robot finds a friend"
WAIT_S = 600.0
"""Far more than anything takes on an idle machine."""


@dataclass(frozen=True)
class Service:
    url: str
    folder: Path
    base: Path
    bank: Bank
    store: str
    keys: dict[str, str]

    def http(self, tenant: str = "acme") -> httpx.Client:
        return httpx.Client(
            base_url=self.url, headers={"authorization": f"Bearer {self.keys[tenant]}"}, timeout=WAIT_S, trust_env=False
        )

    def openai(self, tenant: str = "acme", **options) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1",
            api_key=self.keys[tenant],
            timeout=WAIT_S,
            http_client=httpx.Client(trust_env=False),
            **{"max_retries": 0, **options},
        )

    def users(self) -> UserStore:
        return UserStore(open_database(DatabaseConfig(url=self.store)))


@contextmanager
def serving(folder: Path) -> Iterator[Service]:
    """The service on a port of its own, with a history for each of FILMS, until the end of the block."""
    from ray import serve

    base = make_base(folder / "base", tiny_llama(folder / "model"))
    bank = make_bank(folder / "bank", str(folder / "model"), seed=1, anchors=ANCHORS)
    store = str(folder / "users.db")
    database = open_database(DatabaseConfig(url=store))
    keys = {tenant: Keys(database).make(tenant, requests_per_minute=100_000) for tenant in ("acme", "other")}
    keys["slow"] = Keys(database).make("acme", requests_per_minute=2)
    database.close()
    args = ServingArgs(
        base=str(base),
        bank=str(folder / "bank"),
        store=store,
        tenant="acme",
        engine=EngineConfig(max_requests=4, max_waiting=2, max_tokens=200, max_step_tokens=64),
        stack=TrainConfig(rank=1, alpha=2.0, learning_rate=0.3, steps=2, examples_per_step=2),
        stack_slots=6,
        limits=Limits(body_mib=0.25, default_tokens=12, max_tokens=190),
    )
    port = free_port("127.0.0.1")
    try:
        start(args, "127.0.0.1", port)
        service = Service(f"http://127.0.0.1:{port}", folder, base, bank, store, keys)
        with service.http() as http:
            for user, films in FILMS.items():
                assert put(http, user, films).status_code == 200
        yield service
    finally:
        serve.shutdown()


def put(http: httpx.Client, user: str, films: list[str], **more) -> httpx.Response:
    items = [{"description": film, "tag": "sci-fi"} for film in films]
    return http.put(f"/v1/users/{quote(user, safe='')}/history", json={"task": "LaMP-2", "items": items, **more})


def say(service: Service, user: str | None, *, tenant: str = "acme", tokens: int = 12, **more) -> str:
    answer = service.openai(tenant).chat.completions.create(
        model="mta",
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=tokens,
        **({"user": user} if user else {}),
        **more,
    )
    return answer.choices[0].message.content


def until(is_so, timeout_s: float = WAIT_S) -> None:  # noqa: ANN001
    deadline_s = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline_s, "it did not come about"
        time.sleep(0.2)
