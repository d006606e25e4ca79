"""The benchmark of bank training: PEFT's loop is a fair rival, and what its parts conclude from what they see."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mta_ray.benchmarks.bank_groups import Seen, tokens_per_s
from mta_ray.benchmarks.bank_kills import Ledger, do_all_train
from mta_ray.benchmarks.bank_training import BARS, table
from mta_ray.benchmarks.growth import spread
from mta_ray.benchmarks.pack_training import Batch, PackBenchmarkConfig, pack_benchmark, summary
from mta_ray.benchmarks.zero3 import held_share
from mta_ray.pipeline.bank.snapshot import GroupRow, Snapshot


def test_pack_alone_and_peft_give_the_same_adapters_and_the_worst_case_counts() -> None:
    batches = (Batch(rows=1, tokens=8), Batch(rows=2, tokens=8))
    config = PackBenchmarkConfig(shape="64", batches=batches, adapters=3, alone=2, rounds=1, seconds=0.1, equal_steps=4)
    found = pack_benchmark(config)
    assert 0 < found["pack_alone"] < 1e-3 and 0 < found["pack_peft"] < 1e-3
    figures = summary({"64": found, "other": {"batches": {"4x8": {"ratio": 0.25, "is_small": False}}}})
    assert figures["pack_over_sequential"] == 0.25
    assert figures["pack_over_sequential_small_batch"] == found["batches"]["1x8"]["ratio"] > 0
    assert figures["pack_equals_alone"] == found["pack_alone"]


def test_an_adapter_that_goes_or_comes_anew_is_counted_once() -> None:
    ledger = Ledger()
    ledger.look({1: (10, 100, "a")}, {2: 50})
    ledger.look({1: (10, 100, "a"), 2: (11, 110, "b")}, {1: 90})  # a checkpoint that a kill left behind
    assert not ledger.lost and not ledger.retrained
    ledger.look({2: (12, 120, "b")}, {})
    ledger.look({2: (12, 120, "b")}, {})
    assert ledger.lost == {1} and ledger.retrained == {2}
    ledger.look({1: (10, 100, "a"), 2: (12, 120, "b")}, {1: 130})
    assert ledger.retrained == {1, 2}


@pytest.mark.parametrize(
    ("since", "kept", "unfinished", "trains"),
    [
        ([], [], 6, False),
        ([10.0], [11.0, 11.0], 6, False),  # the other group is not there yet
        ([10.0, 20.0], [21.0, 21.0], 6, False),  # all of the older group's, for all that is known
        ([10.0, 20.0], [21.0, 21.0, 22.0], 6, True),
        ([10.0, 20.0], [19.0, 21.0, 22.0], 6, False),
        ([10.0], [11.0], 2, True),  # no work for another
    ],
)
def test_a_kill_waits_until_every_group_trains(
    since: list[float], kept: list[float], unfinished: int, trains: bool
) -> None:
    assert do_all_train(since, kept, lanes=2, unfinished=unfinished) is trains


def seen(at_s: float, tokens: int, *states: str) -> Seen:
    rows = tuple(
        GroupRow(
            group=number,
            state=state,  # type: ignore[arg-type]
            reason="",
            workers=1,
            devices=1,
            lanes_busy=1,
            lanes=1,
            adapters_done=0,
            tokens_per_s=0.0,
            loss=None,
        )
        for number, state in enumerate(states)
    )
    return Seen(
        at_s,
        Snapshot(
            groups=rows,
            adapters=4,
            adapters_done=0,
            adapters_done_here=0,
            failures={},
            steps=0,
            tokens=tokens,
            tokens_per_s=0.0,
            elapsed_s=at_s,
            devices=1,
            device_seconds=0.0,
            eta_s=None,
        ),
    )


def test_the_rate_of_groups_is_that_of_the_time_in_which_all_train() -> None:
    looks = [seen(float(at), 10 * at, "training") for at in range(5)]  # one alone, slowly
    looks += [seen(5.0 + at, 50 + 100 * at, "training", "training") for at in range(8)]
    looks += [seen(13.0 + at, 750 + 10 * at, "training", "ended") for at in range(5)]
    assert tokens_per_s(looks, 2) == pytest.approx(100)
    with pytest.raises(ValueError, match="more steps"):
        tokens_per_s(looks[:8], 2)


def test_what_is_sharded_counts_by_its_piece_and_what_is_gathered_as_a_whole_too() -> None:
    whole, away, gathered = (nn.Parameter(torch.zeros(shape)) for shape in ((10,), (0,), (20,)))
    for parameter, size in ((away, 10), (gathered, 20)):
        parameter.ds_tensor, parameter.ds_shape, parameter.ds_numel = torch.zeros(size // 2), torch.Size([size]), size
    assert held_share([whole]) == 1
    assert held_share([whole, away, gathered]) == (10 + 5 + 10 + 20) / 40


def test_the_table_has_a_line_for_each_figure_and_says_what_was_missed() -> None:
    assert spread({8: 1.0, 16: 1.1}) == pytest.approx(0.1)
    lines = table({"group_scaling": 1.9, "pack_over_sequential": 0.5, "seconds": {}}, BARS).splitlines()
    assert len(lines) == 2
    assert "0.5" in lines[0] and "MISSED" in lines[0]
    assert "1.9" in lines[1] and " ok " in lines[1]
