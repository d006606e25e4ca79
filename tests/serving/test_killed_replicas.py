"""Replicas die under load, in two real processes: nothing is lost, and nobody is answered by another user's model."""

from __future__ import annotations

from mta_ray.benchmarks.killed_replicas import KillConfig, kill_replicas


def test_killed_replicas_lose_no_request_and_mix_up_no_users(ray_local: None) -> None:
    told = kill_replicas(KillConfig(seconds=20.0, every=10.0, base="tiny"))
    assert told["kills"] == 2
    assert told["lost"] == 0 and told["wrong"] == 0 and told["requests"] > 16, told
