"""Banks cut down and routed through in other ways answer as what is left of them says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mta_ray.benchmarks.marked_users import make_bank, make_base, plain_answer, tiny_llama
from mta_ray.lamp.users import User
from mta_ray.lora.adapter import Adapter
from mta_ray.lora.fusion import fuse
from mta_ray.lora.fusion_config import FusionConfig
from mta_ray.personalize.base_model import open_base
from mta_ray.pipeline.actors import ActorConfig
from mta_ray.pipeline.embed_users import item_texts
from mta_ray.population.drift import FRESH, REBUILT, STALE, findings
from mta_ray.population.judge import BARE, JudgeConfig, Question, judge, spread
from mta_ray.population.people import WorldConfig, simulate_user
from mta_ray.population.what_if import WhatIfConfig, questions, sections
from mta_ray.similarity.embedding import Encoder

NEAREST = FusionConfig(k=1)


def test_anchors_that_cover_the_others_are_chosen_greedily() -> None:
    """Against the definition, in plain loops: each next one is the farthest from those before."""
    points = np.random.default_rng(0).standard_normal((12, 4))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    chosen = list(spread(points, 12))
    assert sorted(chosen) == list(range(12))
    assert chosen[0] == max(range(12), key=lambda i: float(points[i] @ points.mean(axis=0)))
    for n in range(1, 12):
        before, rest = chosen[:n], [i for i in range(12) if i not in chosen[:n]]
        assert chosen[n] == min(rest, key=lambda i: max(float(points[i] @ points[j]) for j in before))
    assert spread(points, 5) == tuple(chosen[:5])
    with pytest.raises(ValueError, match="13 of 12 anchors"):
        spread(points, 13)


def _user(number: int) -> User:
    """With queries that have a label of `make_base`."""
    user = simulate_user(WorldConfig(seed=9, queries=2, max_items=12), number)
    return replace(user, queries=tuple(replace(query, target="sci-fi") for query in user.queries))


def test_each_question_is_answered_by_the_adapters_that_it_leaves(ray_local: None, tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "model")
    base = open_base(make_base(tmp_path / "base", source))
    bank = make_bank(tmp_path / "bank", source, seed=3)
    # the nearest anchor of a user by plain cosines; those of one, then those of another
    encoder, near = Encoder(bank.encoder), {}
    for user in map(_user, range(16)):
        mean = encoder.embed_users([item_texts(user, 8, 32)])[0] - bank.center
        near.setdefault(int((bank.embeddings @ mean).argmax()), []).append(user)
    (one, some), (other, more) = list(near.items())[:2]
    users, nearest = [some[0], more[0]], [one, other]
    how = JudgeConfig(
        base=str(tmp_path / "base"),
        bank=str(tmp_path / "bank"),
        max_items=8,
        max_words=32,
        workers=ActorConfig(actors=1),
    )
    asked = [
        Question(name=BARE, fusion=None),
        Question(name="one anchor", fusion=NEAREST, anchors=(4,)),
        Question(name="one anchor, rank 2", fusion=NEAREST, anchors=(4,), rank=2),
        Question(name="by others", fusion=NEAREST, known="others"),
        Question(name="by themselves", fusion=NEAREST),
    ]
    others = users[::-1]
    scores = judge(how, asked, users, {"others": others})

    backbone, wording = base.load(), base.wording
    cut = fuse([bank.adapter(4)], [1.0], mode="svd", rank=2)
    assert cut.rank == 2

    def said(adapter: Adapter) -> list[str]:
        prompts = [example.prompt for user in users for example in wording.queries(user)]
        return [plain_answer(backbone, adapter, prompt, wording.task.max_new_tokens) for prompt in prompts]

    found = {name: rows["prediction"].to_list() for name, rows in scores.groupby("method", sort=False)}
    assert found["one anchor"] == said(bank.adapter(4))
    assert found["one anchor, rank 2"] == said(cut)
    assert found["one anchor, rank 2"] != found["one anchor"] != found[BARE]

    # Routed by somebody else's history, a user is answered by that one's anchor.
    of_anchor = {anchor: said(bank.adapter(anchor)) for anchor in nearest}
    for name, anchors in (("by themselves", nearest), ("by others", nearest[::-1])):
        asked_of = [anchor for user, anchor in zip(users, anchors, strict=True) for _ in user.queries]
        assert found[name] == [of_anchor[anchor][place] for place, anchor in enumerate(asked_of)], name
    assert found["by themselves"] != found["by others"]


def test_what_is_varied_never_exceeds_the_bank(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "bank", tiny_llama(tmp_path / "model"), seed=3)
    found = questions(WhatIfConfig(anchors=(2, 6, 64), k=(1, 9), temperature=(), rank=(2, 9), history=()), bank)
    assert list(found) == [("anchors", 2), ("anchors", 6), ("k", 1), ("k", 6), ("rank", 2), ("rank", 4)]
    assert found["anchors", 2].fusion.k == 2 and len(found["anchors", 2].anchors) == 2
    assert found["anchors", 6].anchors is None
    with pytest.raises(ValueError, match="nothing is varied"):
        WhatIfConfig(anchors=(), k=(), temperature=(), rank=(), history=())
    with pytest.raises(ValueError, match="rank must be above 0"):
        WhatIfConfig(rank=(0, 1))


def test_the_page_names_the_best_value() -> None:
    def row(value: float, score: float) -> dict[str, object]:
        return {
            "sweep": "k", "value": value, "score": score, "gain": score - 0.5, "gain_low": 0.0, "gain_high": 0.2,
            "route_bytes": 8 * value,
        }  # fmt: skip

    report = {
        "metric": "accuracy", "score_without": 0.5, "rows": [row(1, 0.6), row(4, 0.7), row(8, 0.65)], "users": 9,
        "queries": 18, "task": "movie_tagging", "bytes_per_user": {"route alone": 32, "stack of rank 1": 18_000},
    }  # fmt: skip
    first, costs = sections(report)
    assert "best at 4 (0.700; without personalising 0.500)" in first.lead
    assert ("stack of rank 1", "18,000", f"{2**30 // 18_000:,}") in costs.rows


def test_drift_is_told_by_the_week_from_which_on_intervals_exclude_zero() -> None:
    def row(week: int, line: str, low: float) -> dict[str, object]:
        return {"week": week, "line": line, "score": 0.5, "gain": low + 0.05, "gain_low": low, "gain_high": low + 0.1}

    rows = [row(0, STALE, 0.1), row(4, FRESH, -0.01), row(8, FRESH, 0.02), row(16, FRESH, 0.04), row(8, REBUILT, -0.02)]
    said = findings({"rows": rows})
    assert said[0].startswith("From week 8 on routing users anew")
    by_chance = [row(4, FRESH, 0.01), row(8, FRESH, 0.02), row(16, FRESH, -0.04)]
    assert findings({"rows": by_chance}) == [
        "In week 4, 8 of those that were looked at (4, 8, 16) routing users anew by fresh history paid, and later not."
    ]
    assert said[1] == "In no week that was looked at (8) building the bank anew can be told from not doing so."
