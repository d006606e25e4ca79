"""Simulated users whose taste is known: user i is a pure function of (seed, i).

A world has a few archetypes. An archetype decides the label, the rating or the style *given the same content*; a user
is a mixture of archetypes with a little of their own. What a user comes across leans towards what they like.
The best possible answer to each query is known (`Query.best`), so an oracle's score is too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy import ndarray

from mta_ray.lamp.users import HistoryItem, Query, User
from mta_ray.population import words

SIMULATED_TASKS = ("movie_tagging", "product_rating", "news_headline")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldConfig:
    """What the simulated people are like."""

    task: str = "movie_tagging"
    """One of movie_tagging, product_rating, news_headline."""
    seed: int = 0
    """Of the world and everybody in it."""
    archetypes: int = 6
    """Kinds of taste."""
    purity: float = 0.9
    """Average share of a user's main archetype in their taste; the rest is of another one."""
    own_taste: float = 0.25
    """Standard deviation of a user's own deviation, next to 1 for the archetypes'."""
    exposure: float = 1.2
    """How much what a user comes across leans towards what they like; 0: not at all."""
    answer_noise: float = 0.05
    """Share of answers that do not follow the user's taste."""
    few_shot_share: float = 0.5
    """Share of users with at most 10 history items."""
    median_items: int = 40
    """Median history of the other users; lengths are log-normal."""
    max_items: int = 120
    """Longest history."""
    queries: int = 6
    """Queries of each user."""
    week: int = 0
    """When it is, in weeks since the world began; histories and queries are of the week before."""
    moves: float = 0.02
    """Of a user's main archetype, in each week: the chance that another one takes its place for good."""
    fashion: float = 0.02
    """Of what an archetype likes, in each week: the share that changes, for everybody who has it."""

    def __post_init__(self) -> None:
        if self.task not in SIMULATED_TASKS:
            raise ValueError(f"task {self.task!r} cannot be simulated; choose one of {', '.join(SIMULATED_TASKS)}")
        for name in ("purity", "answer_noise", "few_shot_share", "moves", "fashion"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        for name, least in (
            ("archetypes", 1),
            ("median_items", 1),
            ("max_items", 1),
            ("queries", 0),
            ("seed", 0),
            ("week", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("own_taste", "exposure"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {getattr(self, name)}")


def user_name(seed: int, number: int) -> str:
    """The id of a world's user."""
    return f"sim-{seed}-{number}"


def simulate_user(config: WorldConfig, number: int) -> User:
    """User `number` of the world: the same whenever, wherever and in whatever order it is asked for.

    In a later week the same user, with the taste of then and other items and queries.
    """
    rng = np.random.default_rng([config.seed, 1, number])
    taste = _taste(config, rng, number)
    items = _history_length(config, rng)
    user_id = user_name(config.seed, number)
    prefix = user_id
    if config.week:
        prefix = f"{user_id}-w{config.week}"
        rng = np.random.default_rng([config.seed, 2, number, config.week])
    events = [_event(config, taste, rng) for _ in range(items + config.queries)]
    history = tuple(
        HistoryItem(id=f"{prefix}-{n}", content=content, target=answer)
        for n, (content, answer, _) in enumerate(events[:items])
    )
    queries = tuple(
        Query(id=f"{prefix}-q{n}", content=content, target=answer, best=best)
        for n, (content, answer, best) in enumerate(events[items:])
    )
    return User(id=user_id, task=config.task, history=history, queries=queries)


def main_archetype(config: WorldConfig, number: int) -> int:
    """The archetype that user `number` has most of: the latent truth, for maps and tests."""
    rng = np.random.default_rng([config.seed, 1, number])
    return _moved(config, int(rng.integers(config.archetypes)), number)


def _moved(config: WorldConfig, main: int, number: int) -> int:
    """The main archetype in the week that it is: each week it may have become another one."""
    rng = np.random.default_rng([config.seed, 3, number])
    for _ in range(config.week):
        chance, step = rng.random(), int(rng.integers(1, max(config.archetypes, 2)))
        if chance < config.moves:
            main = (main + step) % config.archetypes
    return main


def _taste(config: WorldConfig, rng: np.random.Generator, number: int) -> ndarray:
    """The user's preference over the task's traits: a mixture of two archetypes and something of their own."""
    main = _moved(config, int(rng.integers(config.archetypes)), number)
    other = int(rng.integers(config.archetypes))
    share = float(np.clip(rng.normal(config.purity, 0.05), 0.5, 1.0))
    world = _archetypes(config)
    own = rng.normal(0, config.own_taste, world.shape[1])
    return share * world[main] + (1 - share) * world[other] + own


def _archetypes(config: WorldConfig) -> ndarray:
    """(archetypes, traits): standard scores, so that no archetype is more opinionated than another.

    Fashion leads each of them from one order of its traits towards another one.
    """
    traits = {
        "movie_tagging": len(words.THEMES),
        "product_rating": len(words.ASPECTS),
        "news_headline": len(words.HEADLINE_STYLES),
    }[config.task]
    rng = np.random.default_rng([config.seed, 0])
    ranked = np.linspace(-1.6, 1.6, traits)
    now = np.stack([rng.permutation(ranked) for _ in range(config.archetypes)])
    if not config.week:
        return now
    later = np.stack([rng.permutation(ranked) for _ in range(config.archetypes)])
    kept = (1 - config.fashion) ** config.week
    order = (kept * now + (1 - kept) * later).argsort(axis=1).argsort(axis=1)
    return ranked[order]


def _history_length(config: WorldConfig, rng: np.random.Generator) -> int:
    if rng.random() < config.few_shot_share:
        return int(rng.integers(4, 11))
    return int(np.clip(rng.lognormal(np.log(config.median_items), 0.5), 11, config.max_items))


def _event(config: WorldConfig, taste: ndarray, rng: np.random.Generator) -> tuple[str, str, str]:
    """(content, answer, best answer)."""
    make = {"movie_tagging": _movie, "product_rating": _review, "news_headline": _article}[config.task]
    return make(config, taste, rng)


def _movie(config: WorldConfig, taste: ndarray, rng: np.random.Generator) -> tuple[str, str, str]:
    """Three themes are in every film; the user's tag is the one they care about most."""
    tags = list(words.THEMES)
    lean = np.exp(config.exposure * taste)
    shown = rng.choice(len(tags), size=3, replace=False, p=lean / lean.sum())
    a, b, c = (_pick(rng, words.THEMES[tags[i]]) for i in shown)
    content = _pick(rng, words.MOVIE_TEMPLATES).format(
        a=a, b=b, c=c, who=_pick(rng, words.PEOPLE), where=_pick(rng, words.PLACES), when=_pick(rng, words.FILLERS)
    )
    best = tags[max(shown, key=lambda i: taste[i])]
    is_noise = rng.random() < config.answer_noise
    return content, tags[int(rng.choice(shown))] if is_noise else best, best


def _review(config: WorldConfig, taste: ndarray, rng: np.random.Generator) -> tuple[str, str, str]:
    """Three aspects, each said well or badly; the user weighs them by what matters to them."""
    aspects = list(words.ASPECTS)
    lean = np.exp(config.exposure * taste)
    shown = rng.choice(len(aspects), size=3, replace=False, p=lean / lean.sum())
    signs = rng.choice([-1, 1], size=3)
    a, b, c = (_pick(rng, words.ASPECTS[aspects[i]][0 if s > 0 else 1]) for i, s in zip(shown, signs, strict=True))
    content = _pick(rng, words.REVIEW_TEMPLATES).format(
        a=a, b=b, c=c, product=_pick(rng, words.PRODUCTS), when=_pick(rng, words.FILLERS),
        who=_pick(rng, words.PEOPLE), number=int(rng.integers(2, 100)),
    )  # fmt: skip
    weight = np.exp(1.5 * taste[shown])
    best = str(int(np.clip(np.rint(3 + 2 * (weight * signs).sum() / weight.sum()), 1, 5)))
    is_noise = rng.random() < config.answer_noise
    return content, str(int(rng.integers(1, 6))) if is_noise else best, best


def _article(config: WorldConfig, taste: ndarray, rng: np.random.Generator) -> tuple[str, str, str]:
    """The facts of an article, headlined in the user's favourite style, or now and then in the second one."""
    where = _pick(rng, words.PLACES)
    facts = {
        "subject": _pick(rng, words.SUBJECTS),
        "event": _pick(rng, words.EVENTS),
        "reason": _pick(rng, words.REASONS),
        "where": where,
        "place": where.split(" ", 1)[1],
        "who": _pick(rng, words.PEOPLE),
        "when": _pick(rng, words.FILLERS),
        "month": _pick(rng, words.MONTHS),
        "day": int(rng.integers(1, 29)),
    }
    content = _pick(rng, words.ARTICLE_TEMPLATES).format(**facts)
    order = np.argsort(-taste)
    best = words.HEADLINE_STYLES[order[0]].format(**facts)
    is_noise = rng.random() < config.answer_noise
    return content, words.HEADLINE_STYLES[order[1]].format(**facts) if is_noise else best, best


def _pick(rng: np.random.Generator, choices: tuple[str, ...]) -> str:
    return choices[int(rng.integers(len(choices)))]
