"""Two replicas over PostgreSQL: histories, routes, stacks and deletions are the same in every process."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import sqlalchemy as sa
from ray import serve

from mta_ray.benchmarks.marked_users import make_bank, make_base, mark_users, tiny_llama
from mta_ray.model.settings import EngineConfig
from mta_ray.personalize.base_model import open_base
from mta_ray.serving.args import ServingArgs
from mta_ray.serving.database import open_database
from mta_ray.serving.identity import UserId
from mta_ray.serving.local import APP_NAME, free_port, start
from mta_ray.serving.user_state import ANY_BANK
from mta_ray.serving.user_store import UserStore

PROMPT = "description: a lonely robot finds a friend tag:"
WAIT_S = 600.0


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
    database = open_database(args.database)
    users = UserStore(database)
    try:
        start(args, "127.0.0.1", port)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=WAIT_S, trust_env=False) as http:

            def ask(user: str) -> str:
                body = {"model": "mta", "user": user, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
                answer = http.post("/v1/completions", json=body).raise_for_status()
                return str(answer.json()["choices"][0]["text"]).strip()

            # 1. histories, routes and stacks, on both replicas
            answers = mark_users(
                http,
                10,
                store=users,
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
                for _ in range(20):  # on a busy machine questions may come one after the other
                    assert set(pool.map(ask, ["user-0"] * 8)) == {answers["user-0"]}
                    if all(now > then for now, then in zip(tokens_of_each_replica(), before, strict=True)):
                        break
                else:
                    raise AssertionError("one replica answered all")

            # 3. a user's questions go where the user's stack is
            before = stacks_of_each_replica()
            own = [user for user in answers if http.get(f"/v1/users/{user}").json()["stack_bytes"]]
            fresh = [f"{user}-again" for user in own]
            for user in fresh:
                view = http.put(f"/v1/users/{user}/history", json={"items": [user]}).raise_for_status().json()
                one = users.read_stack(UserId(tenant=args.tenant, id=user.removesuffix("-again")))
                one = replace(one, bank_version=ANY_BANK, history_version=view["version"])
                users.put_stack(UserId(tenant=args.tenant, id=user), one)
                ask(user)
            time.sleep(3)  # until the ingress has heard which replica has whom
            for user in fresh * 3:
                ask(user)
            assert sum(stacks_of_each_replica()) - sum(before) <= len(fresh) + 1  # at random it would be 7 or 8 for 4

            # 4. the database goes away for a while
            url, name = sa.make_url(postgresql_url), sa.make_url(postgresql_url).database
            admin = sa.create_engine(url.set(drivername="postgresql+psycopg", database="postgres"))

            def connections(are_allowed: bool) -> None:
                with admin.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                    connection.execute(sa.text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS {are_allowed}"))
                    ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"
                    connection.execute(sa.text(ended), {"name": name})

            connections(False)
            body = {"model": "mta", "user": "user-0", "prompt": PROMPT, "max_tokens": 2}
            history = {"items": ["x"]}
            told = [
                http.post("/v1/completions", json=body),
                http.get("/v1/users/user-0"),
                http.put("/v1/users/user-0/history", json=history),
                http.post("/v1/users/user-0/stack"),
                http.delete("/v1/users/user-0"),
                http.get("/v1/models"),
            ]
            assert [answer.status_code for answer in told] == [503] * 6
            assert all(int(answer.headers["retry-after"]) > 0 for answer in told)
            assert {answer.json()["error"]["code"] for answer in told} == {"busy"}
            connections(True)
            admin.dispose()
            assert ask("user-0") == answers["user-0"]

            # 5. deletions: a user, and an anchor
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


def stacks_of_each_replica() -> list[int]:
    slots = serve.get_deployment_handle("Model", APP_NAME).broadcast("stack_slots").results()
    assert len(slots) == 2
    return [each.held for each in slots]


def tokens_of_each_replica() -> list[int]:
    stats = serve.get_deployment_handle("Model", APP_NAME).broadcast("engine_stats").results()
    assert len(stats) == 2
    return [each.tokens for each in stats]
