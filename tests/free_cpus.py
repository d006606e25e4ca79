"""The CPUs of the small cluster that the tests share."""

from __future__ import annotations

import time

import ray

FREE_S = 90.0
"""Nothing is set apart for anybody for much longer than it lives."""


def free_cpus() -> float:
    """As soon as all are free, or those that are after a while."""
    deadline_s = time.monotonic() + FREE_S
    whole = ray.cluster_resources()["CPU"]
    while (free := ray.available_resources().get("CPU", 0)) < whole and time.monotonic() < deadline_s:
        time.sleep(0.1)
    return free
