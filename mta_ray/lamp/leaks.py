"""What a test may not hold: questions that stand in somebody's profile, and users who are other users over again.

Texts are compared as hashes of their normalised form. Only questions and the tested users' own items are held, so
teachers may be millions and are read once.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from mta_ray.lamp.tasks import normalise_label
from mta_ray.lamp.users import HistoryItem, User

KINDS = {
    "own_profile": "stand in the asked user's own profile",
    "tested_profile": "stand in another tested user's profile",
    "teacher_profile": "stand in a teacher's profile",
    "tested_query": "are asked of another tested user too",
    "teacher_query": "are asked of a teacher too",
}
"""Kinds of leak of a question, and how a report says it of some questions."""
Question = tuple[int, int]
"""Place of the tested user, and of the question among the user's."""
TWIN_ITEMS, TWIN_SHARE = 3, 0.5
"""A user is a twin of another whose profile holds at least so many of the user's items, and this share of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaks:
    """Counts of one data set."""

    users: int
    """Tested users."""
    queries: int
    """Their questions."""
    leaked: int
    """Questions with a leak of any kind."""
    with_answer: int
    """Of those, the ones that stand somewhere with their own gold answer."""
    kinds: dict[str, int]
    """Kind of `KINDS` -> questions with such a leak; a question may have several."""
    twins: int
    """Tested users who are another tested user, or a teacher, over again: no evidence of their own."""
    is_allowed: bool = False
    """Whether the benchmark was told to go on all the same."""

    @property
    def is_clean(self) -> bool:
        return not self.leaked and not self.twins

    def told(self) -> str:
        """In a sentence."""
        counts = [f"{count} {KINDS[kind]}" for kind, count in self.kinds.items() if count]
        counts += [f"{self.twins} of {self.users} tested users are another user over again"] if self.twins else []
        known = f"of {self.queries} questions {self.leaked} leak ({self.with_answer} with their answer)"
        return f"{known}: {'; '.join(counts)}" if counts else known


def check_leaks(dataset: str, tested: Sequence[User], teachers: Iterable[User], *, allow: Iterable[str] = ()) -> Leaks:
    """The counts of a data set; raises ValueError if there are any and `allow` does not name it.

    Call it before anything is trained, with tested users as they are tested: all of their history, all their queries.
    """
    found = find_leaks(tested, teachers)
    is_allowed = dataset in set(allow)
    if not found.is_clean and not is_allowed:
        raise ValueError(
            f"data set {dataset}: {found.told()}. Mend the data, or pass --allow-leaks {dataset} to go on; the report "
            "says so"
        )
    return Leaks(**asdict(found) | {"is_allowed": is_allowed})


def find_leaks(tested: Sequence[User], teachers: Iterable[User]) -> Leaks:
    """The counts, whatever they are.

    Semantics:
      a question stands in a profile: an item's content is the question's content; where the item has no content
      (tweets), its target is the question's gold answer
    """
    # 1. what is asked, of whom
    asked: defaultdict[bytes, set[Question]] = defaultdict(set)
    golds: dict[Question, bytes] = {}
    by_gold: defaultdict[bytes, set[Question]] = defaultdict(set)
    owners: defaultdict[bytes, set[int]] = defaultdict(set)
    sizes = []
    for place, user in enumerate(tested):
        for number, query in enumerate(user.queries):
            golds[place, number] = _hash(query.target)
            by_gold[_hash(query.target)].add((place, number))
            asked[_hash(query.content)].add((place, number))
        keys = {_key_of_item(item) for item in user.history}
        sizes.append(len(keys))
        for key in keys:
            owners[key].add(place)
    for blank in (asked, by_gold):
        blank.pop(_hash(""), None)  # a question without a text, or without a known answer, is like no other

    hits: dict[str, set[Question]] = {kind: set() for kind in KINDS}
    answered: set[Question] = set()
    twins: set[int] = set()

    def told_by(item: HistoryItem) -> set[Question]:
        return asked.get(_hash(item.content), set()) if item.content else by_gold.get(_hash(item.target), set())

    def meet(kind: str, questions: Iterable[Question], answer: str | None) -> None:
        for question in questions:
            hits[kind].add(question)
            if answer and _hash(answer) == golds[question]:
                answered.add(question)

    # 2. tested users among themselves
    for place, user in enumerate(tested):
        for item in user.history:
            meet("own_profile", (q for q in told_by(item) if q[0] == place), item.target)
            meet("tested_profile", (q for q in told_by(item) if q[0] != place), item.target)
        twins |= _twins_in(user, owners, sizes) - {place}
        for query in user.queries:
            meet("tested_query", (q for q in asked.get(_hash(query.content), ()) if q[0] != place), query.target)

    # 3. teachers against them
    for teacher in teachers:
        for item in teacher.history:
            meet("teacher_profile", told_by(item), item.target)
        twins |= _twins_in(teacher, owners, sizes)
        for query in teacher.queries:
            meet("teacher_query", asked.get(_hash(query.content), ()), query.target)

    return Leaks(
        users=len(tested),
        queries=len(golds),
        leaked=len(set().union(*hits.values())),
        with_answer=len(answered),
        kinds={kind: len(questions) for kind, questions in hits.items()},
        twins=len(twins),
    )


def persons(tested: Sequence[User]) -> dict[str, str]:
    """User id to the first id, in the order given, of the tested users who are that user over again (twins)."""
    owners: defaultdict[bytes, set[int]] = defaultdict(set)
    sizes = []
    for place, user in enumerate(tested):
        keys = {_key_of_item(item) for item in user.history}
        sizes.append(len(keys))
        for key in keys:
            owners[key].add(place)
    pairs = [(place, twin) for place, user in enumerate(tested) for twin in _twins_in(user, owners, sizes)]
    one, other = zip(*pairs, strict=True) if pairs else ((), ())
    links = coo_array((np.ones(len(pairs)), (one, other)), shape=(len(tested), len(tested)))
    found = connected_components(links, directed=False)[1].tolist()
    return {user.id: tested[found.index(group)].id for user, group in zip(tested, found, strict=True)}


def _twins_in(user: User, owners: Mapping[bytes, set[int]], sizes: Sequence[int]) -> set[int]:
    """Places of the tested users whose items stand in this user's profile."""
    shared = Counter(place for key in {_key_of_item(item) for item in user.history} for place in owners.get(key, ()))
    return {place for place, count in shared.items() if count >= max(TWIN_ITEMS, TWIN_SHARE * sizes[place])}


def _key_of_item(item: HistoryItem) -> bytes:
    return _hash(item.content or item.target)


def _hash(text: str | None) -> bytes:
    text = text or ""
    plain = normalise_label(text) or text.strip()  # some texts are signs alone
    return blake2b(plain.encode(), digest_size=16).digest()
