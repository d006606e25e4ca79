"""The metrics of a bank's training, as they stand on the metrics page of a real Ray node."""

from __future__ import annotations

import re
import time

import httpx
import pytest
import ray
from ray.actor import ActorHandle

from mta_ray.pipeline.bank.ledger import Ledger
from mta_ray.pipeline.bank.meters import Meters


def keeper() -> ActorHandle:
    """An actor with a ledger and its meters. (Its class stands in here, so that it travels to the worker.)"""

    class Keeper:
        def __init__(self) -> None:
            self.now_s = 0.0
            self.ledger = Ledger(total=4, already_done=1, clock=lambda: self.now_s)
            self.meters = Meters()

        def worker_id(self) -> str:
            return ray.get_runtime_context().get_worker_id()

        def begin(self) -> None:
            self.ledger.group_started(0, workers=1, devices=2, lanes=2)
            self.ledger.group_started(1, workers=1, devices=1, lanes=2)
            for adapter in (0, 1):
                self.ledger.adapter_started(0, adapter, budget=10, done=0)
            self.ledger.adapter_started(1, 2, budget=10, done=0)
            self.meters.observe(self.ledger.snapshot())

        def go_on(self) -> None:
            self.now_s = 3.0
            self.ledger.stepped(0, {0: 1, 1: 1}, {0: 1.0, 1: 2.0}, tokens=70, seconds=3.0)
            self.meters.observe(self.ledger.snapshot())
            self.ledger.stepped(0, {}, {}, tokens=0, seconds=0.0)
            self.now_s = 4.0
            self.ledger.stepped(0, {0: 2, 1: 2}, {0: 0.5, 1: 2.0}, tokens=30, seconds=1.0)
            self.ledger.adapter_failed(1, 2, "no")
            self.ledger.adapter_finished(0, 1)
            self.meters.observe(self.ledger.snapshot())

    return ray.remote(num_cpus=0)(Keeper).remote()


def page(worker_id: str) -> dict[str, float]:
    """What the node tells of that worker's: `name` or `name{group}` -> value. (Those of workers that have ended stay
    on the page for a while.)"""
    [node] = [node for node in ray.nodes() if node["Alive"]]
    told = httpx.get(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", trust_env=False).text
    found = {}
    for name, labels, value in re.findall(r"^ray_(mta_bank_\w+){(.*)} (\S+)$", told, flags=re.MULTILINE):
        if f'WorkerId="{worker_id}"' not in labels:
            continue
        group = re.search(r'\bgroup="(\w+)"', labels)
        found[f"{name}{{{group[1]}}}" if group else name] = float(value)
    return found


def until(worker_id: str, wanted: dict[str, float]) -> dict[str, float]:
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        found = page(worker_id)
        if all(found.get(name) == value for name, value in wanted.items()):
            return found
        time.sleep(0.5)
    raise AssertionError(f"wanted {wanted}, found {found}")


@pytest.mark.usefixtures("ray_local")
def test_the_node_tells_how_the_training_stands() -> None:
    actor = keeper()
    worker_id = ray.get(actor.worker_id.remote())
    ray.get(actor.begin.remote())
    found = until(worker_id, {"mta_bank_lanes_busy{0}": 2, "mta_bank_lanes_busy{1}": 1, "mta_bank_adapters_done": 1})
    assert not any(name.startswith(("mta_bank_eta", "mta_bank_loss")) for name in found)

    ray.get(actor.go_on.remote())
    found = until(
        worker_id,
        {
            "mta_bank_adapters_done": 2,
            "mta_bank_adapters_failed": 1,
            "mta_bank_tokens_total": 100,
            "mta_bank_device_seconds_total": 12,
            "mta_bank_lanes_busy{0}": 1,
            "mta_bank_lanes_busy{1}": 0,
            "mta_bank_loss{0}": 0.5,
            "mta_bank_eta_seconds": 8,
        },
    )
    assert "mta_bank_loss{1}" not in found
    ray.kill(actor)
