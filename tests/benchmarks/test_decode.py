"""The contestants of the decoding benchmark say the same: a faster one that says something else would win nothing."""

from __future__ import annotations

from mta_ray.benchmarks.decode import BenchmarkConfig, benchmark


def test_the_rivals_answer_as_we_do_and_every_figure_is_there() -> None:
    config = BenchmarkConfig(users=4, anchors=6, prompt_tokens=24, new_tokens=6, rounds=1, merge_users=2)
    figures = benchmark(config)
    assert figures["same_answers_as_peft"] == figures["same_answers_as_merge"] == 1
    ratios = ("base", "peft", "merge", "peft_traffic")
    assert all(figures[f"mixed_over_{rival}"] > 0 for rival in ratios) and figures["base_over_peft"] > 0
    assert {"mixed", "base", "peft", "merge", "traffic", "peft_traffic"} <= set(figures["decode_tokens_per_s"])
