"""Arrivals, and the share of a Zipf crowd that finds its stack, against a shelf that is played through."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest

from mta_ray.population.capacity.arrivals import (
    TrafficConfig,
    draw_users,
    hit_share,
    poisson_arrivals,
    sample_arrivals,
    zipf_shares,
)


@pytest.mark.parametrize(("zipf", "slots"), [(0.0, 60), (0.9, 20), (0.9, 200), (1.3, 20)])
def test_hits_are_those_of_a_shelf_played_through(zipf: float, slots: int) -> None:
    users = 1000
    rng = np.random.default_rng(0)
    shelf: OrderedDict[int, None] = OrderedDict()
    hits = []
    for user in draw_users(zipf, users, 60_000, rng).tolist():
        hits.append(user in shelf)
        shelf[user] = None
        shelf.move_to_end(user)
        if len(shelf) > slots:
            shelf.popitem(last=False)
    assert hit_share(zipf_shares(zipf, users), slots) == pytest.approx(np.mean(hits[10_000:]), abs=0.012)


def test_a_shelf_for_all_always_hits_and_none_never() -> None:
    assert hit_share(zipf_shares(1.0, 10), 10) == 1.0
    assert hit_share(zipf_shares(1.0, 10), 0) == 0.0


@pytest.mark.parametrize("lengths", ["fixed", "geometric", "lognormal"])
def test_arrivals_are_what_was_asked_for(lengths: str) -> None:
    traffic = TrafficConfig(prompt_tokens=40.0, answer_tokens=20.0, lengths=lengths, stream_share=0.25, stack_share=0.5)
    arrivals = poisson_arrivals(traffic, per_s=50.0, seconds=400.0, users=300, seed=3)
    assert arrivals == poisson_arrivals(traffic, per_s=50.0, seconds=400.0, users=300, seed=3)
    assert len(arrivals) == pytest.approx(20_000, abs=4 * 20_000**0.5)
    gaps = np.diff([a.at_s for a in arrivals])
    assert gaps.min() >= 0 and gaps.std() == pytest.approx(gaps.mean(), rel=0.05)  # as exponential ones have it
    assert np.mean([a.prompt_tokens for a in arrivals]) == pytest.approx(40, rel=0.03)
    assert np.mean([a.answer_tokens for a in arrivals]) == pytest.approx(20, rel=0.03)
    assert np.mean([a.is_stream for a in arrivals]) == pytest.approx(0.25, abs=0.02)
    has_stack = {}
    for arrival in arrivals:
        assert has_stack.setdefault(arrival.user, arrival.has_stack) == arrival.has_stack
    assert np.mean(list(has_stack.values())) == pytest.approx(0.5, abs=0.12)


def test_a_shape_thins_arrivals_where_it_says() -> None:
    half = poisson_arrivals(TrafficConfig(), per_s=100.0, seconds=100.0, users=5, seed=1, shape=lambda t: float(t < 50))
    assert max(a.at_s for a in half) < 50 and len(half) == pytest.approx(5000, abs=300)


def test_another_rate_stretches_the_same_sample() -> None:
    slow, fast = (sample_arrivals(TrafficConfig(), per_s=r, requests=100, users=10, seed=2) for r in (1.0, 4.0))
    assert [a.at_s for a in slow] == pytest.approx([4 * a.at_s for a in fast])
    assert [a.answer_tokens for a in slow] == [a.answer_tokens for a in fast]
