"""The simulated world: pure in (seed, number), graded by its own truth, and not solved by copying."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from mta_ray.lamp.metrics import query_score
from mta_ray.lamp.tasks import task_named
from mta_ray.population.people import SIMULATED_TASKS, WorldConfig, main_archetype, simulate_user


@pytest.mark.parametrize("task", SIMULATED_TASKS)
def test_a_user_is_the_same_whenever_asked_and_differs_by_number_and_seed(task):
    world = WorldConfig(task=task, seed=3)
    assert simulate_user(world, 17) == simulate_user(world, 17)
    assert simulate_user(world, 17) != simulate_user(world, 18)
    assert simulate_user(world, 17).history != simulate_user(WorldConfig(task=task, seed=4), 17).history


@pytest.mark.parametrize("task", SIMULATED_TASKS)
def test_the_best_answer_beats_the_crowds_and_the_users_habit(task):
    world = WorldConfig(task=task, seed=5)
    table = task_named(task)
    users = [simulate_user(world, n) for n in range(150)]
    crowd = Counter(i.target for u in users for i in u.history).most_common(1)[0][0]
    best, habit, common = [], [], []
    for user in users:
        own = Counter(i.target for i in user.history).most_common(1)[0][0]
        for query in user.queries:
            best.append(query_score(table, query.best, query.target))
            habit.append(query_score(table, own, query.target))
            common.append(query_score(table, crowd, query.target))
    assert np.mean(best) > np.mean(habit) + 0.15
    assert np.mean(best) > np.mean(common) + 0.15


def test_taste_decides_given_the_same_content():
    """Of two users shown the same three themes, each answers with the one they like; they often differ."""
    world = WorldConfig(seed=6, answer_noise=0.0, own_taste=0.0, purity=1.0)
    kinds = {main_archetype(world, n) for n in range(100)}
    assert kinds == set(range(world.archetypes))
    tags = {kind: Counter() for kind in kinds}
    for n in range(300):
        tags[main_archetype(world, n)].update(i.target for i in simulate_user(world, n).history)
    assert len({counter.most_common(1)[0][0] for counter in tags.values()}) >= 3


def test_histories_are_long_tailed_and_half_of_the_users_few_shot():
    lengths = [len(simulate_user(WorldConfig(seed=1), n).history) for n in range(600)]
    assert np.mean([length <= 10 for length in lengths]) == pytest.approx(0.5, abs=0.06)
    assert max(lengths) > 4 * np.median(lengths)


def test_taste_moves_with_the_weeks_and_the_user_stays_who_they_are():
    world = WorldConfig(seed=7, moves=0.1, fashion=0.0)
    later = WorldConfig(seed=7, moves=0.1, fashion=0.0, week=10)
    now, then = ([simulate_user(w, n) for n in range(400)] for w in (world, later))
    assert [u.id for u in now] == [u.id for u in then]
    assert [len(u.history) for u in now] == [len(u.history) for u in then]
    assert all(a.history != b.history for a, b in zip(now, then, strict=True))

    # Ten weeks at one in ten: (1 - 1/10)^10 of the users never moved; few who did are back.
    same = np.mean([main_archetype(world, n) == main_archetype(later, n) for n in range(2000)])
    never = 0.9**10
    assert never < same < never + (1 - never) / (world.archetypes - 1) + 0.03

    still = WorldConfig(seed=7, moves=0.0, fashion=0.0, week=10)
    assert all(main_archetype(world, n) == main_archetype(still, n) for n in range(50))


def test_fashion_changes_what_an_archetype_likes_little_by_little():
    """How often the best answer of the same user in one week is the favourite of the first one falls with the weeks."""
    shares = []
    for week in (0, 5, 60):
        world = WorldConfig(seed=8, moves=0.0, fashion=0.05, own_taste=0.0, purity=1.0, answer_noise=0.0, week=week)
        first = WorldConfig(seed=8, moves=0.0, own_taste=0.0, purity=1.0, answer_noise=0.0)
        hits = []
        for n in range(120):
            favourite = Counter(i.target for i in simulate_user(first, n).history).most_common(1)[0][0]
            hits += [item.target == favourite for item in simulate_user(world, n).history]
        shares.append(np.mean(hits))
    assert shares[0] > shares[1] > shares[2]


def test_unknown_tasks_and_shares_are_refused():
    with pytest.raises(ValueError, match="movie_tagging"):
        WorldConfig(task="poetry")
    with pytest.raises(ValueError, match="purity"):
        WorldConfig(purity=1.5)
