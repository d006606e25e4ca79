"""The peak is that of the whole run: what a worker of the cluster takes is in it, and stays in it."""

from __future__ import annotations

import ray

from mta_ray.pipeline.memory import PeakMemory


def test_a_workers_memory_counts_and_the_peak_stays(ray_local):
    @ray.remote(num_cpus=0)
    class Worker:
        def take(self, mib: int) -> None:
            self.held = bytearray(b"x" * (mib * 2**20))

    worker = Worker.remote()
    ray.get(worker.take.remote(0))
    memory = PeakMemory()
    memory.look()
    before = memory.peak_mb
    assert before > 0

    ray.get(worker.take.remote(400))
    memory.look()
    assert 350 < memory.peak_mb - before < 900  # while the bytes are made, they are there twice

    peak = memory.peak_mb
    ray.kill(worker)
    memory.look()
    assert memory.peak_mb == peak
