"""The peak is that of the whole run: what a worker of the cluster takes is in it, and stays in it."""

from __future__ import annotations

import numpy as np
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
    before = memory.peak_mb
    assert before > 0

    ray.get(worker.take.remote(1000))
    memory.look()
    assert 700 < memory.peak_mb - before < 1300  # other workers of the session come and go meanwhile

    assert 1000 < memory.process_peak_mb < 1600  # the worker's, with its libraries
    assert memory.process_peak_name.startswith("ray::")

    peak = memory.peak_mb
    ray.kill(worker)
    memory.look()
    assert memory.peak_mb == peak
