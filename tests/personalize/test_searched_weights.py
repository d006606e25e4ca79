"""Searched weights against a plain search for each user alone, over merged weights."""

from __future__ import annotations

from dataclasses import replace

import cma
import numpy as np
import pytest
import torch
from routed_people import bank_of, people

from mta_ray.lora.fusion import fuse
from mta_ray.lora.slots import Route
from mta_ray.model.backbone import RoutedModel, merge
from mta_ray.personalize.lanes import seed_of
from mta_ray.personalize.searched_weights import SearchConfig, search_weights

CONFIG = SearchConfig(generations=3, candidates=4, spread=0.5, max_examples=2)


def mean_loss(tiny_model, adapters, route: Route, rows) -> float:  # noqa: ANN001
    """Through a model that has the route merged into its weights."""
    model = tiny_model().model
    merge(model, fuse([adapters[slot] for slot in route.slots], route.weights))
    total = 0.0
    for row in rows:
        with torch.no_grad():
            logs = torch.log_softmax(model(input_ids=torch.tensor([row.ids])).logits[0], dim=-1)
        start = len(row.ids) - row.target_tokens
        total -= sum(float(logs[place - 1, row.ids[place]]) for place in range(start, len(row.ids)))
    return total / sum(row.target_tokens for row in rows)


def test_each_user_gets_the_best_weights_that_a_search_of_their_own_meets(tiny_model):
    routed = RoutedModel(tiny_model())
    adapters = bank_of(routed)
    users = people(routed.backbone)
    state = np.random.get_state()[1].copy()
    found = search_weights(routed, users, CONFIG)
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # nobody else's draws were taken
    assert found[2] == users[2][2]  # one anchor: nothing to weigh

    for route, (user_id, examples, own) in list(zip(found, users, strict=True))[:2]:
        rng = np.random.default_rng(seed_of(CONFIG.seed, user_id))
        options = {"popsize": 4, "randn": lambda *shape, rng=rng: rng.standard_normal(shape), "seed": np.nan}
        search = cma.CMAEvolutionStrategy(list(own.weights), 0.5, options | {"verbose": -9})
        met = [(mean_loss(tiny_model, adapters, own, examples[-2:]), own)]
        for _ in range(3):
            asked = search.ask()
            tried = [replace(own, weights=tuple(weights)) for weights in asked]
            met += [(mean_loss(tiny_model, adapters, one, examples[-2:]), one) for one in tried]
            search.tell(asked, [loss for loss, _ in met[-4:]])
        best = min(met, key=lambda pair: pair[0])
        assert best[0] < met[0][0]
        assert route.slots == own.slots
        assert route.weights == pytest.approx(best[1].weights, abs=1e-6)


def test_a_user_without_examples_is_refused(tiny_model):
    routed = RoutedModel(tiny_model())
    bank_of(routed)
    with pytest.raises(ValueError, match="user u has no training example"):
        search_weights(routed, [("u", [], Route(slots=(0, 1), weights=(0.5, 0.5)))], CONFIG)
