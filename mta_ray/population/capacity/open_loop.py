"""A client in a process of its own: asks at set times whatever becomes of earlier requests, or as a few who wait.

    python -m mta_ray.population.capacity.open_loop < plan.json > told.json

Needs httpx (extra `test`); knows nothing of the package.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import Any

import httpx

TIMEOUT_S = 120.0
KEPT_S = 60.0
"""An idle connection stays: a new one would be what a late first token is made of."""


async def run(plan: dict[str, Any]) -> dict[str, Any]:
    """What became of each request, in the plan's order, and the CPU time that it took here: with the requests alone,
    and with all that the process has done since it began."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=256, keepalive_expiry=KEPT_S)
    async with httpx.AsyncClient(base_url=plan["url"], timeout=TIMEOUT_S, limits=limits, trust_env=False) as http:
        for _ in range(plan.get("warm", 3)):
            await _ask(http, plan["requests"][0], time.perf_counter())
        cpu_s, began_s = time.process_time(), time.perf_counter()
        worked_ns = _worked_ns()
        if plan["clients"]:
            told = await _closed(http, plan["requests"], plan["clients"])
        else:
            told = await asyncio.gather(*(_at(http, request, began_s) for request in plan["requests"]))
        python_ms = (_worked_ns() - worked_ns) / 1e6
        return {
            "requests": told,
            "seconds": time.perf_counter() - began_s,
            "python_ms": python_ms,
            "cpu_ms": (time.process_time() - cpu_s) * 1e3,
            "life_cpu_ms": time.process_time() * 1e3,
        }


async def _closed(http: httpx.AsyncClient, requests: list[dict[str, Any]], clients: int) -> list[dict[str, Any]]:
    coming, told = iter(list(enumerate(requests))), {}

    async def client() -> None:
        for number, request in coming:
            told[number] = await _ask(http, request, time.perf_counter())

    await asyncio.gather(*(client() for _ in range(clients)))
    return [told[number] for number in range(len(requests))]


async def _at(http: httpx.AsyncClient, request: dict[str, Any], began_s: float) -> dict[str, Any]:
    due_s = began_s + request["at_s"]
    await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
    return await _ask(http, request, due_s)  # what the client itself is late by counts too


async def _ask(http: httpx.AsyncClient, request: dict[str, Any], due_s: float) -> dict[str, Any]:
    body = request["body"]
    first_s = 0.0
    data = b""
    try:
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            async for chunk in answer.aiter_raw():
                first_s = first_s or time.perf_counter()
                data += chunk
            status = answer.status_code
    except httpx.TransportError as error:
        return {"status": 0, "ttft_ms": 0.0, "total_ms": 0.0, "pieces": 0, "why": type(error).__name__}
    ended_s = time.perf_counter()
    usage = json.loads(data.split(b"data: ")[-2])["usage"] if status == 200 and body.get("stream") else {}
    if status == 200 and not body.get("stream"):
        usage = json.loads(data)["usage"]
    return {
        "status": status,
        "ttft_ms": (first_s - due_s) * 1e3,
        "total_ms": (ended_s - due_s) * 1e3,
        "tokens": usage.get("completion_tokens", 0),
        "prompt_tokens": usage.get("prompt_tokens", 0),
        "pieces": data.count(b"data: "),
    }


def _worked_ns() -> int:
    """CPU time of this thread, which runs the loop."""
    with open(f"/proc/self/task/{os.getpid()}/schedstat") as file:
        return int(file.read().split()[0])


if __name__ == "__main__":
    json.dump(asyncio.run(run(json.load(sys.stdin))), sys.stdout)
