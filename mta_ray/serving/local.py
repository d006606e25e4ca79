"""`mta serve` and `mta bank publish`: the service on this machine in one command, and another bank without a stop."""

from __future__ import annotations

import ipaddress
import logging
import os
import shlex
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace

import ray
from ray import serve

from mta_ray.artifacts import located
from mta_ray.cluster import ClusterConfig, connect
from mta_ray.personalize.base_model import open_base
from mta_ray.serving.app import build_app
from mta_ray.serving.args import ServingArgs
from mta_ray.serving.banks import Banks
from mta_ray.serving.database import STORE, Database, DatabaseConfig, is_path, is_there, open_database
from mta_ray.serving.identity import DEFAULT_TENANT
from mta_ray.serving.keys import Keys
from mta_ray.serving.served_bank import describe

log = logging.getLogger(__name__)
APP_NAME = "mta"
LOGGING = {"enable_access_log": False}
"""Of Ray Serve: its access log would hold users' names, which stand in paths."""
SERVE_SETTINGS = {
    # Ray's workers run at 15: beside other work on the machine a first token comes twice as late.
    "RAY_worker_niceness": "0",
    # Fewer threads and processes that wake each other up, 2 ms together: one event loop a process (what we run on it is
    # short), and gRPC from the proxy to the ingress instead of objects in Ray's store.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    # A header that is no text is no reason for a 500.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "mta_ray.serving.front:middlewares",
    # glibc gives threads heaps of their own, up to 8 for each CPU, and each keeps what it needed at its worst moment:
    # over many thousands of requests every process seems to grow; two heaps keep two such moments.
    "MALLOC_ARENA_MAX": "2",
}
"""Environment of a cluster that serves, most of it for the time to first token (benchmarks/serve_overhead.py).

Not RAY_SERVE_ENABLE_HA_PROXY, though it saves 5 ms more: with that of Ray 2.60 every third whole answer whose client
went away was decoded to its end; its admin socket is open to every user of the machine; and it hides who is local.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig(ServingArgs):
    """The service on this machine."""

    host: str = "127.0.0.1"
    """Where to listen; anything but this machine itself needs an API key (mta keys make)."""
    port: int = 8000
    """0: any that is free."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where to run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishBankConfig:
    """Another bank for a service that runs, or will."""

    bank: str
    """The bank's artifact."""
    base: str = "runs/quickstart/base"
    """The `base` artifact that the service holds."""
    store: str = STORE
    """The service's store."""
    tenant: str = DEFAULT_TENANT
    """Whose users the bank's anchors are."""
    version: str | None = None
    """Its name, in the header of every answer; none: the beginning of the artifact's hash."""


def serve_here(config: ServeConfig) -> str:
    """Serve until Ctrl-C; prints where, and how to ask."""
    # 1. what would go wrong later is told now
    config = located(config, "base", "bank", "store") if is_path(config.store) else located(config, "base", "bank")
    fingerprint = open_base(config.base).fingerprint
    with closing(open_database(config.database)) as database:
        has_keys = Keys(database).are_configured()
        if not has_keys and not is_loopback(config.host):
            raise ValueError(
                f"host is {config.host} and no API key is configured: make one with `mta keys make --tenant NAME "
                f"--database.url {config.store}`, or leave host at 127.0.0.1"
            )
        _adopt(config, database, fingerprint)
    if config.port and not _is_free(config.host, config.port):
        raise ValueError(f"port {config.port} of {config.host} is taken; give another --port, or 0 for any")
    port = config.port or free_port(config.host)

    # 2. run
    cluster = config.cluster
    if cluster.cpus is None and cluster.address is None:
        replicas = max(config.replicas, config.autoscale.max_replicas)
        needed = int(replicas * config.cpus_per_replica * 1.5 + 1)
        cluster = replace(cluster, cpus=max(needed, os.cpu_count() or 1))
    with serving_environment(), connect(cluster):
        try:
            start(config, config.host, port)
            print(_welcome(config, port, has_keys), flush=True)
            nodes = [(node["NodeManagerAddress"], node["MetricsExportPort"]) for node in ray.nodes() if node["Alive"]]
            print("\n".join(f"metrics: http://{address}:{at}/metrics" for address, at in nodes), flush=True)
            threading.Event().wait()
        except KeyboardInterrupt:
            log.info("ending, after the answers under way")
        finally:
            serve.delete(APP_NAME)  # no more: on a cluster that was joined, others may be served too
    return "ended"


def start(args: ServingArgs, host: str, port: int) -> None:
    """Serve at that address, on the cluster that is connected; returns when the replicas are ready."""
    serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port}, logging_config=LOGGING)
    serve.run(build_app(args), name=APP_NAME, route_prefix="/", logging_config=LOGGING)


@contextmanager
def serving_environment() -> Iterator[None]:
    """What a cluster that is started within the block inherits; a variable that is set already stays as it is."""
    before = os.environ.copy()
    os.environ.update(SERVE_SETTINGS | before)
    try:
        yield
    finally:
        for name in SERVE_SETTINGS.keys() - before.keys():
            os.environ.pop(name, None)


def publish_bank(config: PublishBankConfig) -> str:
    """Put a bank in force. Replicas load it beside the old one, and change between two requests."""
    config = located(config, "bank", "base")
    fingerprint = open_base(config.base).fingerprint
    place = DatabaseConfig(url=config.store)
    if not is_there(place):
        print(f"a new database: {config.store}", file=sys.stderr)
    with closing(open_database(place)) as database:
        banks = Banks(database)
        new = describe(config.bank, base_fingerprint=fingerprint, tenant=config.tenant, version=config.version)
        banks.publish(new)
        before = banks.state().active_version
        banks.activate(new.version)
        retired = len(banks.get(new.version).retired_slots)
    out = f", {retired} of them out of service" if retired else ""
    return f"bank {new.version} is in force ({len(new.anchors)} anchors{out}); before: {before or 'none'}"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches that address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def free_port(host: str) -> int:
    """A port of that address where nobody listens yet."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _adopt(config: ServeConfig, database: Database, fingerprint: str) -> None:
    """A bank that the store has not seen (a new run at the old place) is in force; a known one changes nothing."""
    banks = Banks(database)
    new = describe(config.bank, base_fingerprint=fingerprint, tenant=config.tenant)
    known = banks.known_as(new.hash)
    if known is None:
        banks.publish(new)
        banks.activate(new.version)
        return
    banks.publish(replace(new, version=known))  # it may have moved since
    active = banks.state().active_version
    if active != known:
        log.info("bank %s stays in force; `mta bank publish --bank %s` changes it", active, shlex.quote(config.bank))


def _welcome(config: ServeConfig, port: int, has_keys: bool) -> str:
    host = f"[{config.host}]" if ":" in config.host else config.host
    url = f"http://{host}:{port}/v1"
    key = " -H 'Authorization: Bearer YOUR_KEY'" if has_keys else ""
    who = "API keys are asked for" if has_keys else "no API key is configured: only this machine is served"
    body = (
        f'{{"model": "{config.model_name}", "user": "alice", "max_tokens": 16, "temperature": 0, '
        '"messages": [{"role": "user", "content": "a lonely robot finds a friend"}]}'
    )
    return (
        f"serving at {url} ({who}); Ctrl-C ends it\n"
        f"curl {url}/chat/completions{key} -H 'Content-Type: application/json' -d {shlex.quote(body)}"
    )


def _is_free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
