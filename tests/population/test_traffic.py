"""The schedule: its rate, its users and its sessions against closed forms, and the same again for the same seed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from scipy import integrate, stats

from mta_ray.population.load.traffic import (
    PHASES,
    TrafficConfig,
    arrivals,
    expected_sessions,
    phase_at,
    rate,
    sessions,
    zipf_user,
)

BUSY = TrafficConfig(seconds=2000.0, sessions_per_s=5.0, day_s=700.0, diurnal=0.6, flash_factor=4.0, users=50)


@pytest.mark.parametrize("span", [(0.0, 2000.0), (130.0, 460.0), (850.0, 950.0), (0.0, 1000.0), (1500.0, 1800.0)])
def test_expected_sessions_are_the_integral_of_the_rate(span: tuple[float, float]) -> None:
    edges = [edge for edge in BUSY.bounds_s if span[0] < edge < span[1]]
    area, _ = integrate.quad(lambda at_s: rate(BUSY, at_s), *span, points=edges or None, limit=400)
    assert expected_sessions(BUSY, *span) == pytest.approx(area, rel=1e-6)


def test_arrivals_are_poisson_with_that_rate() -> None:
    """Bins of equal expected number hold Poisson numbers, in the flash crowd and out of it."""
    times = np.array(list(arrivals(BUSY, np.random.default_rng(7))))
    assert (np.diff(times) > 0).all() and times[0] > 0 and times[-1] < BUSY.seconds
    # by the integrated rate, any such process is one of rate 1
    unit = np.array([expected_sessions(BUSY, 0.0, at_s) for at_s in times])
    assert stats.kstest(np.diff(unit), "expon").pvalue > 0.01
    _, start_s, end_s = BUSY.bounds_s
    in_flash = ((times >= start_s) & (times < end_s)).sum()
    wanted = expected_sessions(BUSY, start_s, end_s)
    assert abs(in_flash - wanted) < 4 * wanted**0.5


@pytest.mark.parametrize("exponent", [1.05, 1.6])
def test_users_are_zipf_distributed_over_the_population_alone(exponent: float) -> None:
    config = replace(BUSY, users=300, zipf=exponent)
    rng = np.random.default_rng(3)
    draws = np.array([zipf_user(config, rng) for _ in range(20_000)])
    exact = np.arange(1, 301) ** -exponent / (np.arange(1, 301) ** -exponent).sum()
    assert draws.min() == 0 and draws.max() < 300
    for head in (1, 5, 30):
        share = exact[:head].sum()
        assert np.mean(draws < head) == pytest.approx(share, abs=4 * (share * (1 - share) / len(draws)) ** 0.5)


def test_a_population_of_a_billion_is_drawn_from_as_well() -> None:
    config = replace(BUSY, users=10**9)
    rng = np.random.default_rng(3)
    assert max(zipf_user(config, rng) for _ in range(300)) > 10**4


def test_the_same_seed_is_the_same_schedule_and_another_another() -> None:
    assert list(sessions(BUSY, known=10)) == list(sessions(BUSY, known=10))
    assert list(islice(sessions(BUSY), 5)) != list(islice(sessions(replace(BUSY, seed=1)), 5))


def test_sessions_have_their_means_and_shares() -> None:
    config = replace(BUSY, seconds=4000.0, new_share=0.2, update_share=0.1, stack_share=0.05, delete_share=0.05)
    found = list(sessions(config, known=config.users))  # so that only newcomers are seen for the first time
    asks = [sum(request.kind == "ask" for request in session.requests) for session in found]
    talks = [count for count in asks if count]
    assert np.mean(talks) == pytest.approx(config.questions, rel=0.03)
    assert (
        stats.chisquare(
            [talks.count(1), talks.count(2), len(talks) - talks.count(1) - talks.count(2)],
            len(talks) * np.array([(p := 1 / 1.8), p * (1 - p), (1 - p) ** 2]),
        ).pvalue
        > 0.001
    )
    first = Counter(session.requests[0].kind for session in found)
    assert first["history"] / len(found) == pytest.approx(0.3, abs=0.015)
    assert first["stack"] / len(found) == pytest.approx(0.05, abs=0.007)
    assert first["delete"] / len(found) == pytest.approx(0.05, abs=0.007)
    questions = [request for session in found for request in session.requests if request.kind == "ask"]
    assert np.mean([question.is_stream for question in questions]) == pytest.approx(0.5, abs=0.02)
    assert {question.tokens for question in questions} == set(range(8, 25))
    thinks = [
        b.at_s - a.at_s for session in found for a, b in zip(session.requests, session.requests[1:], strict=False)
    ]
    assert np.mean(thinks) == pytest.approx(config.think_s, rel=0.03)


def test_nobody_asks_before_a_history_and_only_who_is_there_is_changed() -> None:
    config = replace(BUSY, new_share=0.2, stack_share=0.1, delete_share=0.1)
    there: set[int] = set(range(10))
    for session in sessions(config, known=10):
        kind = session.requests[0].kind
        if kind == "history":
            there.add(session.user)
        assert session.user in there
        if kind in ("stack", "delete"):
            assert session.user >= 10
        if kind == "delete":
            there.remove(session.user)
        assert [request.at_s for request in session.requests] == sorted(request.at_s for request in session.requests)


def test_phases_follow_one_another() -> None:
    config = TrafficConfig(seconds=900.0)
    assert config.bounds_s == pytest.approx((60.0, 405.0, 525.0))
    assert [phase_at(config, at_s) for at_s in (0.0, 59.9, 60.0, 404.9, 405.0, 524.9, 525.1, 1000.0)] == [
        *[PHASES[0]] * 2, *[PHASES[1]] * 2, *[PHASES[2]] * 2, *[PHASES[3]] * 2,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"zipf": 1.0}, "zipf must be above 1"),
        ({"sessions_per_s": 0.0}, "sessions_per_s"),
        ({"flash_start": 0.9, "flash_share": 0.2}, "flash crowd"),
        ({"new_share": 0.9, "update_share": 0.2}, "1 together"),
        ({"least_tokens": 30}, "least_tokens"),
    ],
)
def test_traffic_that_cannot_be_is_refused(settings: dict[str, float], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        TrafficConfig(**settings)
