"""What each method of the report answers, against merged weights and plain rules; a pack changes nothing."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from mta_ray.evaluation.asker import MERGED, STACK
from mta_ray.evaluation.methods import RELEASED_STACK, Methods, Pack
from mta_ray.lamp.prompts import nearest_items
from mta_ray.lamp.tasks import MOVIE_TAGS, task_named
from mta_ray.lora.adapter import Adapter, Factors
from mta_ray.lora.bank import assemble
from mta_ray.lora.fusion import stack
from mta_ray.lora.slots import Route, take
from mta_ray.model.backbone import RoutedModel, merge
from mta_ray.model.generate import answer
from mta_ray.personalize.base_model import PromptConfig, Wording, tokenised
from mta_ray.personalize.merge_then_adapt import fused_adapter, stack_users
from mta_ray.personalize.train_config import TrainConfig
from mta_ray.pipeline.adapt_users import UserState
from mta_ray.population.people import WorldConfig, simulate_user

OPPU = TrainConfig(rank=2, alpha=4.0, steps=2, examples_per_step=2, learning_rate=1e-2)
WORDING = Wording(task=task_named("movie_tagging"), labels=MOVIE_TAGS, prompts=PromptConfig(rag_items=1))


def an_adapter(routed: RoutedModel, seed: int, rank: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    factors = {
        name: Factors(
            down=torch.randn(rank, layer.base.in_features, generator=generator),
            up=torch.randn(layer.base.out_features, rank, generator=generator),
        )
        for name, layer in routed.layers.items()
    }
    return Adapter(factors=factors, scale=0.3)


@pytest.fixture
def scene(tiny_model):
    """A tiny base with a bank of three random anchors, and a pack of three users of 4 to 40 items with their states."""
    routed = RoutedModel(tiny_model())
    bank = assemble(
        [an_adapter(routed, seed, 4) for seed in range(3)],
        anchor_ids=("a", "b", "c"),
        embeddings=np.eye(3, dtype=np.float32),
        center=np.zeros(3, dtype=np.float32),
        base_fingerprint="",
        encoder="",
    )
    bank.load_into(routed.layers)
    everyone = [simulate_user(WorldConfig(seed=4, queries=3, answer_noise=0.3), number) for number in range(40)]
    users = [min(everyone, key=lambda u: len(u.history)), everyone[3], max(everyone, key=lambda u: len(u.history))]
    vectors = np.array([[0.8, 0.6, 0], [0.28, 0.96, 0], [0.6, 0, 0.8]], dtype=np.float32)
    states = {
        user.id: UserState(
            user_id=user.id,
            route=Route(slots=(n, (n + 1) % 3), weights=(0.7, 0.3)),
            stack=an_adapter(routed, 10 + n, 1),
            bytes=100 + n,
            seconds=1.0,
        )
        for n, user in enumerate(users)
    }
    return Methods(routed, bank, WORDING, OPPU), Pack(users, vectors, states)


def alone(tiny_model, adapter: Adapter | None, prompts: list[str]) -> list[str]:  # noqa: ANN001
    """What a model with the adapter in its weights answers."""
    backbone = tiny_model()
    if adapter is not None:
        merge(backbone.model, adapter)
    return answer(RoutedModel(backbone), prompts, max_new_tokens=WORDING.task.max_new_tokens)


def test_fusion_and_stack_answer_as_a_model_with_the_sum_merged_into_its_weights(scene, tiny_model):
    methods, pack = scene
    fusion, mta, nearest = methods.mta_fusion(pack), methods.mta(pack), methods.nearest_anchor(pack)
    start = 0
    for n, user in enumerate(pack.users):
        prompts = [example.prompt for example in WORDING.queries(user)]
        state = pack.states[user.id]
        fused = fused_adapter(state.route, methods.bank, "exact")
        wanted = (
            (fusion, fused),
            (mta, stack(fused, state.stack)),
            (nearest, methods.bank.adapter((0, 1, 2)[int(np.argmax(pack.vectors[n]))])),
        )
        for answers, adapter in wanted:
            assert answers.predictions[start : start + len(prompts)] == alone(tiny_model, adapter, prompts)
        start += len(prompts)
    assert mta.predictions != fusion.predictions != methods.non_personalised(pack).predictions
    assert (fusion.bytes_per_user, mta.bytes_per_user) == (8, 101)


def test_as_released_swaps_the_shares_of_the_two_nearest_averages_apart_and_stacks(scene, tiny_model, monkeypatch):
    # at the released rate, a stack of a few steps would not show in any answer
    monkeypatch.setattr("mta_ray.evaluation.methods.RELEASED_STACK", replace(RELEASED_STACK, learning_rate=0.3))
    methods, pack = scene
    pack = replace(pack, users=[replace(user, history=user.history[:8]) for user in pack.users])  # one step each
    predictions = methods.as_released(pack).predictions
    stacks = [take(methods.routed.layers, STACK, n) for n in range(3)]
    assert stacks[0].rank == 4

    # By hand, of the cosines in `scene`: slot to the share of the other one of the two.
    shares = ({0: 0.6 / 1.4, 1: 0.8 / 1.4}, {1: 0.28 / 1.24, 0: 0.96 / 1.24}, {2: 0.6 / 1.4, 0: 0.8 / 1.4})
    without_stack = []
    for n, user in enumerate(pack.users):
        merged = {
            m: Factors(
                down=sum(share * methods.bank.down[m][slot] for slot, share in shares[n].items()),
                up=sum(share * methods.bank.up[m][slot] for slot, share in shares[n].items()),
            )
            for m in methods.routed.layers
        }
        below = Adapter(factors=merged, scale=methods.bank.scale)
        prompts = [example.prompt for example in WORDING.queries(user)]
        assert predictions[3 * n : 3 * n + 3] == alone(tiny_model, stack(below, stacks[n]), prompts)
        without_stack += alone(tiny_model, below, prompts)
    assert predictions != without_stack


def test_the_released_stack_takes_one_epoch_of_each_users_own_items_whoever_shares_the_pack(scene):
    methods, pack = scene
    methods.as_released(pack)
    together = [take(methods.routed.layers, STACK, n) for n in range(3)]

    for n, user in enumerate(pack.users):
        examples = tokenised(methods.routed.backbone, WORDING.history(user))
        one_epoch = replace(RELEASED_STACK, steps=math.ceil(len(examples) / RELEASED_STACK.examples_per_step))
        below = {MERGED: Route(slots=(n,), weights=(1.0,))}
        own = stack_users(methods.routed, [(user.id, examples, below)], one_epoch).adapters[0]
        for module, factors in own.factors.items():
            torch.testing.assert_close(factors.up, together[n].factors[module].up, rtol=1e-3, atol=1e-7)


def test_rag_asks_the_bare_model_with_the_nearest_item_before_each_query(scene, tiny_model):
    methods, pack = scene
    prompts = [
        f"description: {near.content} tag: {near.target} description: {query.content} tag:"
        for user in pack.users
        for query in user.queries
        for near in nearest_items(user, query, WORDING.prompts.rag_items)
    ]
    assert methods.rag(pack).predictions == alone(tiny_model, None, prompts)
    assert methods.rag(pack).predictions != methods.non_personalised(pack).predictions


def test_the_controls_are_what_they_say(scene):
    methods, pack = scene
    assert any(query.best != query.target for user in pack.users for query in user.queries)
    majority, nearest, oracle = methods.majority_label(pack), methods.nearest_item(pack), methods.oracle(pack)
    start = 0
    for user in pack.users:
        targets = [item.target for item in user.history]
        for query in user.queries:
            assert targets.count(majority.predictions[start]) == max(map(targets.count, targets))
            assert nearest.predictions[start] in targets
            assert oracle.predictions[start] == query.best
            start += 1
    assert [answers.method for answers in methods.run(pack)] == [
        "non_personalised",
        "majority_label",
        "nearest_item",
        "rag",
        "oppu",
        "nearest_anchor",
        "mta_fusion",
        "mta",
        "as_released",
        "oracle",
    ]


def test_a_user_without_a_stack_is_answered_by_the_fused_anchors_and_the_others_keep_theirs(scene) -> None:  # noqa: ANN001
    methods, pack = scene
    fused, stacked = methods.mta_fusion(pack).predictions, methods.mta(pack).predictions
    queries = [len(user.queries) for user in pack.users]
    assert fused[queries[0] :] != stacked[queries[0] :]
    first = pack.users[0].id
    states = {**pack.states, first: replace(pack.states[first], stack=None)}
    mixed = methods.mta(replace(pack, states=states)).predictions
    assert mixed[: queries[0]] == fused[: queries[0]] and mixed[queries[0] :] == stacked[queries[0] :]
