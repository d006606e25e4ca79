"""Actors on real Ray: who is called, in which order the results come, and that nobody keeps a CPU afterwards."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import ray
from free_cpus import free_cpus
from ray.exceptions import RayActorError

from mta_ray.cluster import ClusterConfig
from mta_ray.pipeline.actors import ActorConfig, Crew, crew, lets_go

TWO = {"workers": ActorConfig(actors=2), "cluster": ClusterConfig()}


def _squares() -> type:
    """Made here, so that it goes to the workers as it is: they cannot import this file."""

    class Squares:
        def __init__(self, offset: int) -> None:
            self.offset = offset

        def of(self, number: int, wait_s: float | int = 0, kills: Path | None = None) -> int:
            time.sleep(wait_s)
            if kills is not None and (kills.suffix == ".always" or not kills.exists()):
                kills.touch()
                os._exit(1)
            if number < 0:
                raise ValueError(f"{number} is negative")
            return number**2 + self.offset

    return Squares


def _call(actor, given: tuple) -> ray.ObjectRef:
    return actor.of.remote(*given)


def test_results_come_in_order_or_as_they_are_ready(ray_local) -> None:
    work = [(0, 1.5), (1, 0.0), (2, 0.0), (3, 0.0)]  # the first takes longer than all others
    with crew(_squares(), 10, **TWO) as actors:
        _both_up(actors)
        assert list(actors.map(_call, work)) == [10, 11, 14, 19]
        assert list(actors.map_unordered(_call, work))[-1] == 10
        assert list(actors.map(_call, [])) == []
    assert free_cpus() == 2


def test_one_that_finds_no_room_keeps_no_call_waiting(ray_local) -> None:
    other = ray.remote(num_cpus=1)(_squares()).remote(0)
    assert ray.get(other.of.remote(2)) == 4
    with crew(_squares(), 0, **TWO) as actors:
        assert list(actors.map(_call, [(n,) for n in range(8)])) == [n**2 for n in range(8)]
    del other
    assert free_cpus() == 2


def test_an_error_comes_as_it_was_raised_and_keeps_no_cpu(ray_local) -> None:
    with pytest.raises(ValueError, match="-1 is negative") as error, crew(_squares(), 0, **TWO) as actors:
        list(actors.map(_call, [(1,), (-1,), (3,)]))
    assert free_cpus() == 2
    del error  # until here it keeps the traceback


def test_what_a_dead_one_was_at_another_does_again(ray_local, tmp_path) -> None:
    work = [(1, 0), (2, 0, tmp_path / "once"), (3, 0), (4, 0)]
    with crew(_squares(), 0, **TWO) as actors:
        assert list(actors.map(_call, work)) == [1, 4, 9, 16]
        assert (tmp_path / "once").exists() and len(actors.actors) == 3
        with pytest.raises(RayActorError):
            list(actors.map(_call, [(1, 0), (2, 0, tmp_path / "x.always")]))
        assert len(actors.actors) == 5  # two more have tried it
    assert free_cpus() == 2


@lets_go
def _rated() -> list:
    class Rater:
        def __call__(self, batch: dict) -> dict:
            raise ValueError("nothing is rated")

    rows = ray.data.range(4).map_batches(Rater, compute=ray.data.ActorPoolStrategy(size=1), num_cpus=1)
    return list(rows.iter_rows())


def test_nor_does_one_of_ray_data(ray_local) -> None:
    with pytest.raises(ValueError, match="nothing is rated") as error:
        _rated()
    assert free_cpus() == 2
    del error  # until here it keeps the traceback


def _both_up(actors: Crew) -> None:
    def own_id(_: object) -> str:
        return ray.get_runtime_context().get_actor_id()

    seen: set[str] = set()
    while len(seen) < 2:
        seen |= set(actors.map(lambda actor, _: actor.__ray_call__.remote(own_id), range(4)))
