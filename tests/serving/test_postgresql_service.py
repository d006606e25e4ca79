"""Two replicas over PostgreSQL: histories, routes, stacks and deletions are the same in every process."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from ray import serve

from mta_ray.benchmarks.marked_users import make_bank, make_base, mark_users, tiny_llama
from mta_ray.model.settings import EngineConfig
from mta_ray.personalize.base_model import open_base
from mta_ray.serving.args import ServingArgs
from mta_ray.serving.database import open_database
from mta_ray.serving.local import APP_NAME, free_port, start
from mta_ray.serving.user_store import UserStore

PROMPT = "description: a lonely robot finds a friend tag:"
WAIT_S = 240.0


def test_replicas_share_their_users_through_postgresql(ray_local: None, postgresql_url: str, tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "model")
    base = open_base(make_base(tmp_path / "base", source))
    bank = make_bank(tmp_path / "bank", source, seed=1)
    args = ServingArgs(
        base=str(base.path),
        bank=str(tmp_path / "bank"),
        store=postgresql_url,
        replicas=2,
        cpus_per_replica=0.5,
        engine=EngineConfig(max_requests=2, max_waiting=16),
    )
    port = free_port("127.0.0.1")
    url = f"http://127.0.0.1:{port}"
    database = open_database(args.database)
    try:
        start(args, "127.0.0.1", port)
        with httpx.Client(base_url=url, timeout=WAIT_S, trust_env=False) as http:

            def ask(user: str) -> str:
                body = {"model": "mta", "user": user, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
                answer = http.post("/v1/completions", json=body).raise_for_status()
                return str(answer.json()["choices"][0]["text"]).strip()

            # 1. histories, routes and stacks, on both replicas
            answers = mark_users(
                http,
                10,
                store=UserStore(database),
                tenant=args.tenant,
                backbone=base.load(),
                bank=bank,
                ask=PROMPT,
                tokens=12,
            )
            with ThreadPoolExecutor(4) as pool:
                assert dict(zip(answers, pool.map(ask, answers), strict=True)) == answers
                before = tokens_of_each_replica()
                assert min(before) > 0

                # 2. a user whose own replica has no free row is answered by the other one
                assert set(pool.map(ask, ["user-0"] * 8)) == {answers["user-0"]}
                assert min(now - then for now, then in zip(tokens_of_each_replica(), before, strict=True)) > 0

            # 3. deletions: a user, and an anchor
            assert http.delete("/v1/users/user-9").json()["was_anchor"] is False
            assert http.get("/v1/users/user-9").status_code == 404
            assert ask("user-9") == ask("nobody")
            [cited, *_] = http.get("/v1/users/user-1").json()["anchors"]
            assert http.delete(f"/v1/users/{cited['user']}").json()["was_anchor"] is True
            view = http.get("/v1/users/user-1").json()
            assert view["is_route_current"] and cited["user"] not in {anchor["user"] for anchor in view["anchors"]}
            assert ask("user-1") != answers["user-1"]
    finally:
        serve.shutdown()
        database.close()


def tokens_of_each_replica() -> list[int]:
    stats = serve.get_deployment_handle("Model", APP_NAME).broadcast("engine_stats").results()
    assert len(stats) == 2
    return [each.tokens for each in stats]
