"""How many adapters fit: the bytes that are counted are those that autograd really keeps; what is remembered counts."""

from __future__ import annotations

import gc
import sys

import pytest
import ray
import torch

from mta_ray.model.backbone import RoutedModel
from mta_ray.model.batches import Tokens
from mta_ray.personalize.train_config import TrainConfig
from mta_ray.pipeline.bank.files import AdapterFiles
from mta_ray.pipeline.bank.foreman import hire_foreman
from mta_ray.pipeline.bank.lane_count import (
    BYTES_PER_WEIGHT,
    SHARE,
    container_free_bytes,
    fit_lanes,
    free_bytes,
    is_out_of_memory,
    lane_bytes,
)
from mta_ray.pipeline.bank.plan import Plan
from mta_ray.pipeline.bank.tracking import TrackingConfig
from mta_ray.pipeline.bank.train_adapters import _Group
from mta_ray.pipeline.group import GroupConfig

ROWS = [Tokens(tuple(range(100, 148)), 4), Tokens(tuple(range(200, 230)), 2)]


def plan(folder: str, **changes) -> Plan:  # noqa: ANN003
    settings = {
        "base": "base",
        "files": AdapterFiles(root=folder, key="k"),
        "train": TrainConfig(rank=4),
        "group": GroupConfig(),
        "lanes": 0,
        "max_lanes": 10**9,
        "anchors": 10**9,
        "groups": 1,
        "checkpoint_every_s": 1.0,
        "max_failures": 0,
        "tracking": TrackingConfig(),
    }
    return Plan(**settings | changes)


def test_the_bytes_of_a_lane_grow_with_rows_and_rank_and_leave_no_trace(tiny_model):
    routed = RoutedModel(tiny_model())
    one = lane_bytes(routed, ROWS[:1], rank=4, workers=1)
    two = lane_bytes(routed, ROWS[:1] * 2, rank=4, workers=1)
    weights = 4 * sum(layer.base.in_features + layer.base.out_features for layer in routed.layers.values())
    assert two - one == pytest.approx(one - weights * BYTES_PER_WEIGHT, rel=0.15)  # activations, twice
    assert lane_bytes(routed, ROWS[:1] * 2, rank=4, workers=2) - weights * BYTES_PER_WEIGHT == pytest.approx(
        (two - weights * BYTES_PER_WEIGHT) / 2, rel=0.01
    )
    assert all(not layer.shelves for layer in routed.layers.values())
    assert not any(p.requires_grad for p in routed.model.parameters())


def test_what_is_counted_is_what_a_graph_holds(tiny_model):
    """The truth: how much less memory torch's own tensors take once the graph of a step is gone."""
    routed = RoutedModel(tiny_model())
    counted = lane_bytes(routed, ROWS, rank=4, workers=1)
    held = _held_by_a_step(routed)
    assert 0.5 * held < counted < 2.5 * held


def _held_by_a_step(routed: RoutedModel) -> int:
    from mta_ray.lora.slots import Route
    from mta_ray.model.batches import collate, row_losses

    routed.add_shelf("probe", slots=1, rank=4, alpha=4.0)
    for layer in routed.layers.values():
        for p in layer.shelves["probe"].parameters():
            p.requires_grad_(True)
    routing = routed.routing([Route(slots=(0,), weights=(1.0,))] * len(ROWS))
    gc.collect()  # what other tests have left behind is not freed while we count
    seen = torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU])
    with routed.router.using(probe=routing), seen:
        loss = row_losses(routed.model, collate(routed.backbone, ROWS)).sum()
        gc.collect()
    del loss
    return sum(event.self_cpu_memory_usage for event in seen.key_averages())


def test_the_plan_comes_first_then_what_is_remembered_then_the_measure(tiny_model, tmp_path):
    routed = RoutedModel(tiny_model())
    where = str(tmp_path / "bank.adapters")

    def never() -> list[Tokens]:
        raise AssertionError("measured although it was known")

    assert fit_lanes(routed, plan(where, lanes=5), "cpu", never) == 5
    assert fit_lanes(routed, plan(where, lanes=5, max_lanes=3), "cpu", never) == 3
    assert fit_lanes(routed, plan(where, group=GroupConfig(zero_stage=3)), "cpu", never) == 8
    measured = fit_lanes(routed, plan(where), "cpu", lambda: ROWS)
    cost = lane_bytes(routed, ROWS, rank=4, workers=1)
    assert measured == pytest.approx(SHARE * free_bytes(routed) / cost, rel=0.2)
    plan(where).files.remember_lanes("cpu", 6)
    assert fit_lanes(routed, plan(where), "cpu", never) == 6
    assert plan(where).files.known_lanes() == {"cpu": 6}
    other = AdapterFiles(root=where, key="other settings")
    assert other.known_lanes() == {}


def test_a_measure_that_finds_no_memory_means_one_lane_and_leaves_no_trace(tiny_model, tmp_path, monkeypatch):
    routed = RoutedModel(tiny_model())

    def full(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("mta_ray.pipeline.bank.lane_count.row_losses", full)
    assert fit_lanes(routed, plan(str(tmp_path / "bank.adapters")), "cpu", lambda: ROWS) == 1
    assert all(not layer.shelves for layer in routed.layers.values())


@pytest.mark.parametrize(
    ("lanes", "between", "wanted"),
    [
        (0, "", [{}, {"a GPU": 4}, {"a GPU": 2}]),
        (0, "another got on", [{}, {"a GPU": 4}, {"a GPU": 2}]),
        (0, "it got on", [{}, {}, {}]),
        (8, "", [{}, {}, {}]),
    ],
)
def test_a_group_that_dies_again_and_again_without_getting_on_has_half_of_its_lanes(
    ray_local, tmp_path, lanes, between, wanted
):
    """A process that Linux or Ray ends for its memory says nothing."""
    own = plan(str(tmp_path / "bank.adapters"), lanes=lanes, max_failures=3)
    foreman = hire_foreman([0, 1], 0, TrackingConfig(), "run")
    group = _Group(0, own, foreman, 1)
    known = []
    for death in range(3):
        now = min(own.files.known_lanes().get("a GPU", 8), 8)
        ray.get(foreman.came.remote(0, None))
        ray.get(foreman.join.remote(0, nodes=["n"], workers=1, devices=1, lanes=now, device_name="a GPU"))
        if death and between:
            ray.get(foreman.kept.remote(0 if between == "it got on" else 1))
        group.failed(ray.exceptions.ActorDiedError())
        known.append(own.files.known_lanes())
    assert known == wanted
    ray.get(foreman.came.remote(0, None))  # and dies before it has any lanes: that is no sign
    for _ in range(4):
        ray.get(foreman.kept.remote(1))
        group.failed(ray.exceptions.ActorDiedError())
    assert own.files.known_lanes() == wanted[-1]


def test_no_memory_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**50)
    assert is_out_of_memory(error.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"))
    assert not is_out_of_memory(RuntimeError("Connection closed by peer"))


@pytest.mark.parametrize(
    ("folder", "names"), [("", ("max", "current")), ("memory", ("limit_in_bytes", "usage_in_bytes"))]
)
def test_a_containers_limit_counts_and_its_droppable_cache_is_free(tmp_path, folder, names):
    assert container_free_bytes(tmp_path) == sys.maxsize
    home = tmp_path / folder
    home.mkdir(exist_ok=True)
    (home / f"memory.{names[1]}").write_text("700\n")
    (home / "memory.stat").write_text("anon 500\ninactive_file 150\nactive_file 50\n")
    (home / f"memory.{names[0]}").write_text("1000\n")
    assert container_free_bytes(tmp_path) == 450
    (home / f"memory.{names[0]}").write_text("max\n" if not folder else f"{2**63 - 4096}\n")
    assert container_free_bytes(tmp_path) > 2**62
