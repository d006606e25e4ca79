"""Whatever is sent to the service is served or refused in OpenAI's words, and leaves nothing behind.

The requests are drawn from a seed, by number: `shot(17)` is the same in every run.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import string
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import psutil
from running import QUESTION, Service, say, until

from mta_ray.serving.schema import ChatRequest, CompletionRequest, HistoryRequest

REQUESTS = int(os.environ.get("MTA_BAD_REQUESTS", "1000"))
WARM_UP = min(500, REQUESTS // 2)
"""After so many, what is loaded and cached once is there."""
GROWTH_MIB = 24
"""Of each process, at most, from then to the end. (13 after 6,000; with a heap for each thread 28, and ever more.)"""
CLIENTS = 6
ANSWERED_WITHIN_S = 120.0
MARKED = "ann"
"""Has a history and a stack; nothing that is sent changes them."""


@dataclass(frozen=True, kw_only=True)
class Shot:
    """A request."""

    kind: str = ""
    method: str = "POST"
    path: str = "/v1/chat/completions"
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    in_chunks: bool = False
    leaves_after: int | None = None
    """Events of the answer that the client waits for before it goes away."""
    wire: bytes | None = None
    """What is sent byte by byte in place of all this, KEY standing for the key; then the client says no more."""


IN_FRONT = (b"Invalid HTTP", b"Failed to open a WebSocket", b"Path '*' not found")
"""How Ray Serve's HTTP server refuses what is no request that it could hand over to us."""

# ---- what is sent

CHAT = {
    "model": "mta",
    "user": MARKED,
    "max_tokens": 3,
    "temperature": 0,
    "messages": [{"role": "user", "content": QUESTION}],
}
GOOD = (
    ("POST", "/v1/chat/completions", ChatRequest, CHAT),
    ("POST", "/v1/completions", CompletionRequest, {"model": "mta", "user": MARKED, "max_tokens": 3, "prompt": "x"}),
    ("PUT", "/v1/users/storm/history", HistoryRequest, {"items": [{"text": "a", "id": "1"}, "b"], "mode": "replace"}),
)
VALUES = [None, True, False, 0, 1, -1, 5, 21, 0.5, 1e308, 2**31, 2**63, -(2**63) - 1, 10**400, float("nan")]
VALUES += [-float("inf"), "", "a", "1", "\0", "\ud800", "a\udfff", "x" * 257, "😀" * 300, "2024-13-01", "LaMP-2"]
VALUES += [[], {}, [[]], [{}], [None], [1], ["a"], ["a"] * 5, [""], ["a", 1], {"a": 1}, [{"text": "a"}, 1]]
VALUES += [[{"role": "user"}], [{"role": "robot", "content": "x"}], [{"role": "user", "content": "x " * 300}]]
VALUES += [[{"role": "user", "content": [{"type": "image_url"}]}], [{"text": "a" * 20_001}], {"include_usage": 1}]
VALUES += [{"type": "json_object"}, {"type": "text"}]
TEXTS = [
    b'{"model":"mta","model":5,"messages":[]}',
    b'{"model":"mta","prompt":"x","max_tokens":1,"max_tokens":"1"}',
    b'{"model":"mta","prompt":"x","temperature":NaN}',
    b'{"model":"mta","prompt":"x","temperature":-Infinity}',
    b'{"model":"mta","prompt":"x","top_p":1e999}',
    b'{"model":"mta","prompt":"x","seed":' + b"9" * 5000 + b"}",
    b'{"model":"mta","prompt":"x","max_tokens":1.0}',
    b'{"model":"mta","prompt":"x",}',
    b"{'model':'mta'}",
    b'{"model":"mta" /* no */}',
    b'\xef\xbb\xbf{"model":"mta","prompt":"x"}',
    '{"model":"mta","prompt":"x"}'.encode("utf-16"),
    b'{"model":"mta","prompt":"\\ud800"}',
    b'{"model":"mta","prompt":"x","user":"\\u0000"}',
    b'{"model":"mta","prompt":"x","user":"\\udc00\\ud800"}',
    b"null",
    b"[]",
    b"0",
    b'"text"',
    b"model=mta&prompt=x",
    b"--x\r\nContent-Disposition: form-data; name=model\r\n\r\nmta\r\n--x--",
    b"[" * 60_000,
    b'{"a":' * 40_000,
    b'[{"a":' * 30_000,
    b'{"model":"mta","prompt":"x","a":' + b'[{"b":[' * 9000 + b"]}]" * 9000 + b"}",
    b'{"messages":[{"content":[' * 8000,
]
OPTIONS: dict[str, list[Any]] = {
    "stop": ["a", "\n", " ", "\0", "é", ["a"], ["a", "b", "c", "d"], ["a"] * 5, "", "x" * 256],
    "seed": [0, -1, 2**63 - 1, -(2**63), 2**63],
    "temperature": [0, 1e-300, 1e-9, 2, 2.0001, -0.0],
    "top_p": [1e-300, 1e-9, 1, 1.0001],
    "logprobs": [True, False, 0, 5, 6],
    "top_logprobs": [0, 20, 21],
    "max_tokens": [1, 2, 190, 191],
    "stream": [True, False],
    "stream_options": [{"include_usage": True}, {}],
    "user": ["nobody", "é" * 256, "a/../b", "\u202e", None],
}
NO_TEXT = [b"\xff", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf4\x90\x80\x80", b"\xe2\x82", b"\0", b"\x1f", b"\\u12", b'"']
ALPHABETS = ["ab", "./", "a/.%", "é名😀", "\0a", "\ud800a", "?#&+ ;=", "\"\\'<>", "\u202e\u200b\ufffe\n"]
ENDS = ["%FF", "%C3", "%zz", "%", "%ED%A0%80", "%00", "%2F..%2F", "//", "/../x", "/./history/"]
PATHS = ["/", "//", "/v1", "/v1/", "/v2/models", "/v1/users", "/v1/users/", "/v1/chat/completions/", "/V1/MODELS"]
PATHS += ["/v1/models/mta", "/v1/embeddings", "/openapi.json/x", "/docs", "/../etc/passwd", "/%2e%2e/x", "/v1//models"]
PATHS += ["/v1/models?user=%FF", "/v1/models?" + "a=1&" * 500, "/" + "x" * 5000, "/v1/completions;x", "/v1/completions"]
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND", "LOCK"]


def shot(number: int) -> Shot:
    """The request of this number."""
    dice = random.Random(number)
    kind = dice.choices(tuple(KINDS), weights=tuple(KINDS.values()))[0]
    made: Shot = kind(dice)
    return Shot(**{**vars(made), "kind": kind.__name__})


def wrong_fields(dice: random.Random) -> Shot:
    method, path, model, good = dice.choice(GOOD)
    names = [*model.model_fields, "unknown"]
    wrong = {dice.choice(names): dice.choice(VALUES) for _ in range(dice.randint(1, 3))}
    return Shot(method=method, path=path, body=json.dumps(good | wrong).encode())


def odd_options(dice: random.Random) -> Shot:
    """Each at the edge of what is served, or just beyond."""
    path, good = dice.choice([(path, good) for _, path, kind, good in GOOD if kind is not HistoryRequest])
    names = dice.sample(tuple(OPTIONS), dice.randint(1, 4))
    return Shot(path=path, body=json.dumps(good | {name: dice.choice(OPTIONS[name]) for name in names}).encode())


def missing_fields(dice: random.Random) -> Shot:
    method, path, _, good = dice.choice(GOOD)
    kept = {name: value for name, value in good.items() if dice.random() < 0.5}
    return Shot(method=method, path=path, body=json.dumps(kept).encode())


def broken_json(dice: random.Random) -> Shot:
    method, path, _, good = dice.choice(GOOD)
    body = json.dumps(good).encode()
    place = dice.randrange(len(body))
    broken = dice.choice(
        (body[:place], body[place:], body[:place] + dice.randbytes(3) + body[place:], body * 2, dice.randbytes(place))
    )
    return Shot(method=method, path=path, body=broken)


def broken_text(dice: random.Random) -> Shot:
    method, path, _, good = dice.choice(GOOD)
    body = json.dumps(good).encode()
    places = [place for place, byte in enumerate(body) if chr(byte) in string.ascii_letters]
    place = dice.choice(places)
    return Shot(method=method, path=path, body=body[:place] + dice.choice(NO_TEXT) + body[place:])


def odd_text(dice: random.Random) -> Shot:
    method, path, _, _ = dice.choice(GOOD)
    return Shot(method=method, path=path, body=dice.choice(TEXTS), in_chunks=dice.random() < 0.3)


def too_large(dice: random.Random) -> Shot:
    method, path, _, good = dice.choice(GOOD)
    filler = dice.choice((" ", "x", '"', "[", "\\", "é")) * dice.randint(2**18, 2**21)
    body = json.dumps(good)[:-1] + f',"a":"{filler}"}}'
    return Shot(method=method, path=path, body=body.encode(), in_chunks=dice.random() < 0.5)


def odd_id(dice: random.Random) -> Shot:
    alphabet = dice.choice(ALPHABETS)
    name = "".join(dice.choice(alphabet) for _ in range(dice.choice((1, 2, 3, 20, 255, 256, 257, 300))))
    if dice.random() < 0.2:
        return Shot(body=json.dumps(CHAT | {"user": name}).encode())
    method, end = dice.choice((("GET", ""), ("DELETE", ""), ("PUT", "/history"), ("POST", "/stack"), ("POST", "/x")))
    if end == "/stack":
        name = "~" + name  # nobody: no stack is trained here
    safe = dice.choice(("", "/", "/.", "/.%"))
    path = "/v1/users/" + quote(name, safe=safe, errors="surrogatepass")
    if dice.random() < 0.2:
        path += dice.choice(ENDS)
    return Shot(method=method, path=path + end, body=b'{"items":["a"]}' if method == "PUT" else b"")


def odd_adapter(dice: random.Random) -> Shot:
    head = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, dice.choice((4, 5, 2**62))]}}).encode()
    size = dice.choice((len(head), 0, 2**63, len(head) + 9))
    body = dice.choice((b"", b"{}", dice.randbytes(100), size.to_bytes(8, "little") + head + bytes(4), bytes(2**19)))
    query = dice.choice(
        ("", "?alpha=0", "?alpha=nan", "?alpha=2", "?alpha=%FF", "?base_fingerprint=%00", "?alpha=1&alpha=")
    )
    return Shot(method="PUT", path=f"/v1/users/{dice.choice((MARKED, 'storm', 'nobody'))}/stack{query}", body=body)


def odd_path(dice: random.Random) -> Shot:
    body = dice.choice((b"", b"{}", b"x" * 1000))
    return Shot(method=dice.choice(METHODS), path=dice.choice(PATHS), body=body)


def odd_headers(dice: random.Random) -> Shot:
    more = dice.choice(
        (
            {"authorization": ""},
            {"authorization": "Bearer"},
            {"authorization": "Bearer mta_0123456789ab_" + "A" * 43},
            {"authorization": "Basic bXRhOm10YQ=="},
            {"authorization": "bearer " + "x" * 5000},
            {"content-type": "text/plain"},
            {"content-type": "application/json; charset=utf-16"},
            {"content-type": "multipart/form-data; boundary=x"},
            {"content-type": ";;;/"},
            {"content-encoding": "gzip"},
            {"accept": "text/html"},
            {"expect": "100-continue"},
            {"x-request-id": "x" * 2000},
            {"x-request-timeout-seconds": "soon"},
            {"serve_multiplexed_model_id": "y" * 2000},
            {"cookie": "a=" + "b" * 20_000},
            {"x-forwarded-for": "10.0.0.1"},
            {f"x-{number}": "1" for number in range(90)},
        )
    )
    return Shot(body=dice.choice((json.dumps(CHAT).encode(), b"{}", b"")), headers=more)


def odd_wire(dice: random.Random) -> Shot:
    """What is no HTTP, or lies about its length."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer KEY\r\n"
    body = b'{"model":"mta","prompt":"x","max_tokens":1}'
    return Shot(
        wire=dice.choice(
            (
                head + b"Content-Length: 5000\r\n\r\n" + body,
                head + b"Content-Length: 5\r\n\r\n" + body,
                head + b"Content-Length: -1\r\n\r\n" + body,
                head + b"Content-Length: " + b"9" * 40 + b"\r\n\r\n" + body,
                head + b"Content-Length: 43\r\nContent-Length: 44\r\n\r\n" + body,
                head + b"Content-Length: 43\r\nTransfer-Encoding: chunked\r\n\r\n2b\r\n" + body + b"\r\n0\r\n\r\n",
                head + b"Transfer-Encoding: chunked\r\n\r\nffff\r\n" + body,
                head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + body,
                head + b"Transfer-Encoding: chunked\r\n\r\n5\r\n" + body + b"\r\n0\r\n\r\n",
                head + b"Content-Length: 43\r\n",
                head + b"X-Odd: \xff\xfe\r\nContent-Length: 43\r\n\r\n" + body,
                head + b"X-Request-Id: \xff\xfe\r\nContent-Length: 43\r\n\r\n" + body,
                head + b"Serve-Multiplexed-Model-Id: \xff\r\nContent-Length: 43\r\n\r\n" + body,
                head + b"X-\xff: 1\r\nContent-Length: 43\r\n\r\n" + body,
                head.replace(b"KEY", b" ") + b"Content-Length: 43\r\n\r\n" + body,
                head + b"X-Nul: \0\r\n\r\n",
                head + b" folded: yes\r\n\r\n",
                head.replace(b"KEY", b"\xff\xfe") + b"Content-Length: 43\r\n\r\n" + body,
                head.replace(b"1.1", b"1.0") + b"Content-Length: 43\r\n\r\n" + body,
                head.replace(b"1.1", b"9.9") + b"\r\n",
                head.replace(b"POST", b"BREW") + b"Content-Length: 43\r\n\r\n" + body,
                head.replace(b"/v1/completions", b"/v1/users/\xe9") + b"\r\n",
                head.replace(b"/v1/completions", b"*") + b"\r\n",
                head.replace(b"/v1/completions", b"http://else/v1/models") + b"\r\n",
                head + b"Upgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
                b"GET /v1/models\r\n\r\n",
                b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + dice.randbytes(200),
                dice.randbytes(dice.randint(1, 2000)) + b"\r\n\r\n",
                b"\r\n" * 50,
            )
        )
    )


def cut_body(dice: random.Random) -> Shot:
    """A client that goes away in the middle of sending its body."""
    body = json.dumps(CHAT | {"a": "x" * dice.choice((10, 1000, 200_000))}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer KEY\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    return Shot(wire=head.encode() + body[: dice.randrange(len(body))])


def hung_up(dice: random.Random) -> Shot:
    """A client that goes away in the middle of its answer."""
    body = json.dumps(CHAT | {"max_tokens": 180, "stream": True}).encode()
    return Shot(body=body, leaves_after=dice.choice((0, 1, 2, 5)))


KINDS = {
    wrong_fields: 20,
    odd_options: 12,
    missing_fields: 3,
    broken_json: 10,
    broken_text: 8,
    odd_text: 10,
    too_large: 2,
    odd_id: 15,
    odd_adapter: 5,
    odd_path: 10,
    odd_headers: 6,
    odd_wire: 8,
    cut_body: 4,
    hung_up: 4,
}


# ---- how it is sent


@dataclass(frozen=True)
class Told:
    """What came back; no status: the connection was closed."""

    status: int | None
    headers: httpx.Headers
    body: bytes


GONE = Told(None, httpx.Headers(), b"")


async def send(client: httpx.AsyncClient, service: Service, shot: Shot) -> Told:
    if shot.wire is not None:
        return await send_bytes(service, shot.wire.replace(b"KEY", service.keys["acme"].encode()))
    request = client.build_request(
        shot.method,
        "/",
        content=in_chunks(shot.body) if shot.in_chunks else shot.body,
        headers=shot.headers,
        extensions={"target": shot.path.encode()},
    )
    answer = await client.send(request, stream=True)
    try:
        if shot.leaves_after is None or answer.status_code != 200:
            return Told(answer.status_code, answer.headers, await answer.aread())
        lines = answer.aiter_lines()
        for _ in range(shot.leaves_after):
            await anext(lines, None)
        return GONE
    finally:
        await answer.aclose()


async def in_chunks(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), 5000):
        yield body[start : start + 5000]


async def send_bytes(service: Service, wire: bytes) -> Told:
    """Everything at once, then the end; what comes back is read to its end."""
    url = httpx.URL(service.url)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    try:
        writer.write(wire)
        writer.write_eof()
        told = await reader.read()
    except ConnectionError:
        return GONE
    finally:
        writer.close()
    head, _, body = told.partition(b"\r\n\r\n")
    if not head:
        return GONE
    first, *lines = head.decode("latin-1").split("\r\n")
    return Told(int(first.split()[1]), httpx.Headers([line.split(": ", 1) for line in lines]), body)


async def send_all(service: Service, numbers: Iterable[int]) -> tuple[Counter[tuple[str, int | None]], list[str]]:
    """How often each kind of request had which status, and what should not have been."""
    waiting = iter(numbers)
    counts: Counter[tuple[str, int | None]] = Counter()
    wrong: list[str] = []

    async def work() -> None:
        headers = {"authorization": f"Bearer {service.keys['acme']}"}
        async with httpx.AsyncClient(
            base_url=service.url, headers=headers, timeout=ANSWERED_WITHIN_S, trust_env=False
        ) as client:
            for number in waiting:
                one = shot(number)
                try:
                    async with asyncio.timeout(ANSWERED_WITHIN_S):
                        told = await send(client, service, one)
                except (TimeoutError, httpx.HTTPError) as error:
                    wrong.append(f"{number} {one.kind}: {error!r}")
                    continue
                counts[one.kind, told.status] += 1
                if (what := fault(one, told)) is not None:
                    where = f"{number} {one.kind} {one.method} {one.path[:60]} {(one.wire or b'')[-100:]!r}"
                    wrong.append(f"{where}: {told.status} {what}, {told.body[:200]!r}")

    await asyncio.gather(*(work() for _ in range(CLIENTS)))
    return counts, wrong


def fault(shot: Shot, told: Told) -> str | None:
    """What is wrong with an answer."""
    if told.status is None:
        return None if shot.wire is not None or shot.leaves_after is not None else "no answer"
    if 200 <= told.status < 300:
        return None
    if told.status not in range(400, 500) and told.status != 503:
        return "is neither served nor refused"
    if shot.method == "HEAD":
        return None
    if shot.wire is not None and told.body.lstrip(b"0123456789abcdef\r\n").startswith(IN_FRONT):
        return None
    try:
        error = json.loads(told.body)["error"]
    except (ValueError, KeyError, TypeError):
        return "is not in OpenAI's shape"
    if set(error) != {"message", "type", "param", "code"} or not error["message"]:
        return "has other fields than OpenAI's"
    if told.status == 503 and not told.headers.get("retry-after"):
        return "does not say when to come again"
    if told.status == 405 and not told.headers.get("allow"):
        return "does not say what is allowed"
    return None


# ---- laws


def test_bad_requests_are_refused_and_leave_nothing_behind(service: Service) -> None:
    from ray import serve

    model = serve.get_deployment_handle("Model", "mta")
    with service.http() as http:
        assert http.post(f"/v1/users/{MARKED}/stack").status_code == 202
        until(lambda: http.get(f"/v1/users/{MARKED}").json()["stack_status"] == "ready")
        view = http.get(f"/v1/users/{MARKED}").json()
    before = say(service, MARKED)

    # 1. all of them, with a look at the memory on the way
    counts, wrong = asyncio.run(send_all(service, range(WARM_UP)))
    behind_it = processes()
    warm = resident_mib(behind_it)
    began_s = time.monotonic()
    more, more_wrong = asyncio.run(send_all(service, range(WARM_UP, REQUESTS)))
    took_s = time.monotonic() - began_s
    counts += more
    assert not (wrong + more_wrong), "\n".join((wrong + more_wrong)[:40])

    # 2. nothing is held, and nothing has changed
    def is_idle() -> bool:
        stats = model.engine_stats.remote().result()
        return stats.running + stats.waiting + stats.cached_tokens + model.stack_slots.remote().result().pinned == 0

    until(is_idle, ANSWERED_WITHIN_S)
    assert say(service, MARKED) == before
    with service.http() as http:
        assert http.get(f"/v1/users/{MARKED}").json() == view
    after = resident_mib(behind_it)
    statuses = Counter(dict.fromkeys({status for _, status in counts}, 0))
    for (_, status), times in counts.items():
        statuses[status] += times
    print(f"{REQUESTS - WARM_UP} requests in {took_s:.0f} s; MiB after {WARM_UP}: {warm}, after {REQUESTS}: {after}")
    print(f"statuses: {dict(statuses)}")
    assert min(statuses[200], statuses[404], statuses[None]) > REQUESTS // 50 and statuses[400] > REQUESTS // 4
    for name, mib in after.items():
        assert mib - warm[name] <= GROWTH_MIB, (name, warm, after)


def processes() -> dict[str, psutil.Process]:
    """Those that a request passes through."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        title = " ".join(process.cmdline())
        for name in ("ServeReplica:mta:Ingress", "ServeReplica:mta:Model", "ProxyActor"):
            if title.startswith(f"ray::{name}"):
                found[name] = process
    assert len(found) == 3, found
    return found


def resident_mib(found: dict[str, psutil.Process]) -> dict[str, int]:
    """Their memory; an error where one has ended."""
    return {name: process.memory_info().rss // 2**20 for name, process in found.items()}


def test_every_answer_is_as_described(service: Service, tmp_path: Path) -> None:
    """By schemathesis: no server error; statuses, bodies, headers and content types as described; wrong is refused."""
    not_for_us = (
        "positive_data_acceptance",  # what a schema cannot say (a date, a label, an option that needs another)
        "unsupported_method",  # GET /v1/users/x/stack reads the user x/stack
    )
    said = subprocess.run(
        ["st", "run", f"{service.url}/openapi.json", "--header", f"Authorization: Bearer {service.keys['acme']}"]
        + ["--exclude-checks", ",".join(not_for_us), "--max-examples", "20", "--generation-deterministic"]
        + ["--suppress-health-check", "all", "--request-timeout", str(ANSWERED_WITHIN_S), "--warnings", "off"]
        + ["--no-color", "--report", "har", "--report-har-path", str(tmp_path / "asked.har")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert said.returncode == 0, said.stdout + said.stderr

    asked = json.loads((tmp_path / "asked.har").read_text())["log"]["entries"]
    seen = Counter(
        (one["request"]["method"] + " /" + one["request"]["url"].split("/", 3)[3], one["response"]["status"], kind)
        for one in asked
        for kind in [one["response"]["content"]["mimeType"].partition(";")[0]]
    )
    for path in ("/v1/chat/completions", "/v1/completions"):
        for status, kind in ((200, "application/json"), (200, "text/event-stream"), (400, "application/json")):
            assert seen[f"POST {path}", status, kind], seen
