"""The peak is that of the whole run: what a worker of the cluster takes is in it, and stays in it."""

from __future__ import annotations

import numpy as np
import psutil
import ray

from mta_ray.pipeline.memory import PeakMemory


def test_a_workers_memory_counts_and_the_peak_stays(ray_local):
    @ray.remote(num_cpus=0)
    class Worker:
        def take(self, mib: int) -> None:
            self.held = np.ones(mib * 2**20, np.uint8)

    worker = Worker.remote()
    ray.get(worker.take.remote(0))
    memory = PeakMemory()
    memory.look()
    before = memory.peak_mib
    assert before > 0

    mib = 1000 + psutil.Process().memory_info().rss // 2**20  # the worker is the largest, whatever ran here before
    ray.get(worker.take.remote(mib))
    memory.look()
    assert mib - 300 < memory.peak_mib - before < mib + 300  # other workers of the session come and go meanwhile

    assert mib < memory.process_peak_mib < mib + 600  # the worker's, with its libraries
    assert memory.process_peak_name.startswith("ray::")

    peak = memory.peak_mib
    ray.kill(worker)
    memory.look()
    assert memory.peak_mib == peak
