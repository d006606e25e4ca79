"""Drawn tokens follow the distribution they are said to follow, row by row."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mta_ray.model.sampling import choose_tokens
from mta_ray.model.settings import Sampling


def slow(logits: list[float], temperature: float, top_p: float, uniform: float) -> int:
    """Inverse of the cumulative distribution in plain Python; by rank where top_p cuts, else by token id."""
    shares = torch.softmax(torch.tensor(logits, dtype=torch.float64) / temperature, 0).tolist()
    order = sorted(range(len(shares)), key=lambda t: -shares[t]) if top_p < 1 else list(range(len(shares)))
    kept, before = [], 0.0
    for token in order:
        if before < top_p:
            kept.append(token)
        before += shares[token]
    point, total = uniform * sum(shares[t] for t in kept), 0.0
    for token in kept:
        total += shares[token]
        if total > point:
            return token
    return kept[-1]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.floats(0.2, 3.0), st.sampled_from([0.1, 0.5, 0.93, 1.0]))
def test_draws_are_the_inverse_of_the_distribution(seed, temperature, top_p):
    draw = random.Random(seed)
    rows = [[draw.gauss(0, 2) for _ in range(7)] for _ in range(5)]
    uniforms = [draw.random() for _ in rows]
    asked = [Sampling(temperature=temperature, top_p=top_p), Sampling(), Sampling(temperature=1.0)] * 2
    got = choose_tokens(torch.tensor(rows), asked[:5], uniforms)
    for row, sampling, uniform, choice in zip(rows, asked, uniforms, got, strict=False):
        if sampling.temperature == 0:
            assert choice.token == max(range(7), key=lambda t: row[t])
        else:
            wanted = slow(row, sampling.temperature, sampling.top_p, uniform)
            # A uniform within rounding of a border may fall on either side.
            near = {slow(row, sampling.temperature, sampling.top_p, uniform + e) for e in (-1e-5, 1e-5)}
            assert choice.token in near | {wanted}


def test_tokens_without_probability_are_never_drawn():
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]])
    for uniform in (0.0, 0.5, 0.9999999999):
        for top_p in (0.9, 1.0):
            got = choose_tokens(logits, [Sampling(temperature=1.0, top_p=top_p)], [uniform])[0]
            assert got.token in (1, 3)
            assert got.is_finite


def test_rows_that_are_not_finite_are_told_apart():
    logits = torch.zeros(4, 5)
    logits[1, 2], logits[2, 3], logits[3] = float("nan"), float("inf"), float("-inf")
    got = choose_tokens(logits, [Sampling(temperature=t, logprobs=1) for t in (0.0, 0.0, 1.0, 1.0)], [0.5] * 4)
    assert [choice.is_finite for choice in got] == [True, False, False, False]


@pytest.mark.parametrize("temperature", [1e-6, 1e-37, 1e-300])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_tiny_temperature_is_greedy(temperature, top_p):
    logits = torch.tensor([[999.0, -1000.0, 1000.0, 998.0]])
    for uniform in (0.0, 0.999):
        assert choose_tokens(logits, [Sampling(temperature=temperature, top_p=top_p)], [uniform])[0].token == 2


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"logprobs": 99}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)
