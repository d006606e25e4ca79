"""What a test may not hold: questions that stand in somebody's profile, and users who are other users over again.

Texts are compared as hashes of what a model has of them: without case, accents, signs and ways of encoding, and cut as
prompts are. Only questions and the tested users' own items are held, so teachers may be millions and are read once.
"""

from __future__ import annotations

import html
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from mta_ray.lamp.prompts import MAX_WORDS
from mta_ray.lamp.tasks import normalise_label
from mta_ray.lamp.users import HistoryItem, Query, User

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
TWIN_ITEMS, TWIN_SHARE, TWIN_AGREEMENT = 3, 0.5, 0.8
"""Users are twins who share at least so many items (content and target) and this share of the shorter profile, and
whose targets agree on this share of the contents that both have; or whose profiles, of two items or more, are equal."""


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


def check_leaks(
    dataset: str,
    tested: Sequence[User],
    teachers: Iterable[User],
    *,
    allow: Iterable[str] = (),
    max_words: int = MAX_WORDS,
) -> Leaks:
    """The counts of a data set; raises ValueError if there are any and `allow` does not name it.

    Call it before anything is trained, with tested users as they are tested: all of their history, all their queries.
    """
    found = find_leaks(tested, teachers, max_words=max_words)
    is_allowed = dataset in set(allow)
    if not found.is_clean and not is_allowed:
        raise ValueError(
            f"data set {dataset}: {found.told()}. Mend the data, or pass --allow-leaks {dataset} to go on; the report "
            "says so"
        )
    return Leaks(**asdict(found) | {"is_allowed": is_allowed})


def find_leaks(tested: Sequence[User], teachers: Iterable[User], *, max_words: int = MAX_WORDS) -> Leaks:
    """The counts, whatever they are. `max_words`: words of each text that prompts keep.

    Semantics:
      a question stands in a profile: an item's content is the question's content, as a whole or as far as the prompt
      has it; where the item has no content (tweets), its target is the question's gold answer
    """
    # 1. what is asked, of whom
    asked: defaultdict[bytes, set[Question]] = defaultdict(set)
    golds: dict[Question, bytes] = {}
    by_gold: defaultdict[bytes, set[Question]] = defaultdict(set)
    for place, user in enumerate(tested):
        for number, query in enumerate(user.queries):
            golds[place, number] = _hash(_answer(query))
            by_gold[golds[place, number]].add((place, number))
            for key in _keys(query.content, max_words):
                asked[key].add((place, number))
    for blank in (asked, by_gold):
        blank.pop(_hash(""), None)  # a question without a text, or without a known answer, is like no other

    hits: dict[str, set[Question]] = {kind: set() for kind in KINDS}
    answered: set[Question] = set()
    known = _Profiles(tested)
    twins: set[int] = set()

    def like(text: str) -> set[Question]:
        return {question for key in _keys(text, max_words) for question in asked.get(key, ())}

    def told_by(item: HistoryItem) -> set[Question]:
        return like(item.content) if item.content else by_gold.get(_hash(item.target), set())

    def meet(kind: str, questions: Iterable[Question], answer: str) -> None:
        for question in questions:
            hits[kind].add(question)
            if answer and _hash(answer) == golds[question]:
                answered.add(question)

    # 2. tested users among themselves
    for place, user in enumerate(tested):
        for item in user.history:
            meet("own_profile", (q for q in told_by(item) if q[0] == place), item.target)
            meet("tested_profile", (q for q in told_by(item) if q[0] != place), item.target)
        twins |= known.twins_of(user) - {place}
        for query in user.queries:
            meet("tested_query", (q for q in like(query.content) if q[0] != place), _answer(query))

    # 3. teachers against them
    for teacher in teachers:
        for item in teacher.history:
            meet("teacher_profile", told_by(item), item.target)
        twins |= known.twins_of(teacher)
        for query in teacher.queries:
            meet("teacher_query", like(query.content), _answer(query))

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
    known = _Profiles(tested)
    pairs = [(place, twin) for place, user in enumerate(tested) for twin in known.twins_of(user)]
    one, other = zip(*pairs, strict=True) if pairs else ((), ())
    links = coo_array((np.ones(len(pairs)), (one, other)), shape=(len(tested), len(tested)))
    found = connected_components(links, directed=False)[1].tolist()
    return {user.id: tested[found.index(group)].id for user, group in zip(tested, found, strict=True)}


class _Profiles:
    """Whose profile holds what: hashes of whole items, and of their contents, to the tested users' places."""

    def __init__(self, tested: Sequence[User]) -> None:
        self._sizes: list[int] = []
        self._items: defaultdict[bytes, set[int]] = defaultdict(set)
        self._contents: defaultdict[bytes, set[int]] = defaultdict(set)
        for place, user in enumerate(tested):
            items, contents = _profile(user)
            self._sizes.append(len(items))
            for owners, keys in ((self._items, items), (self._contents, contents)):
                for key in keys:
                    owners[key].add(place)

    def twins_of(self, user: User) -> set[int]:
        """Places of the tested users who are this user over again; a tested user is among them."""
        items, contents = _profile(user)
        same = Counter(place for key in items for place in self._items.get(key, ()))
        seen = Counter(place for key in contents for place in self._contents.get(key, ()))
        return {place for place, count in same.items() if self._is_twin(len(items), place, count, seen[place])}

    def _is_twin(self, size: int, place: int, same: int, seen: int) -> bool:
        if same == size == self._sizes[place] and size > 1:
            return True
        shorter = min(size, self._sizes[place])
        return same >= max(TWIN_ITEMS, TWIN_SHARE * shorter) and same >= TWIN_AGREEMENT * seen


def _profile(user: User) -> tuple[set[bytes], set[bytes]]:
    """Hashes of the items, and of their contents; what has no content (tweets) goes by its target."""
    pairs = [(_hash(item.content or item.target), _hash(item.target)) for item in user.history]
    return {content + target for content, target in pairs}, {content for content, _ in pairs}


def _answer(query: Query) -> str:
    """The gold answer; of two options ([1], [2]), the text of the right one, as profiles have it."""
    numbered = {str(number): option for number, option in enumerate(query.options, start=1)}
    target = query.target or ""
    return numbered.get(normalise_label(target), target)


def _keys(text: str, max_words: int) -> set[bytes]:
    """Of the whole text, and of what a prompt has of it."""
    words = text.split(maxsplit=max_words)
    return {_hash(text), _hash(" ".join(words[:max_words]))} if len(words) > max_words else {_hash(text)}


def _hash(text: str) -> bytes:
    return blake2b(_plain(text).encode(), digest_size=16).digest()


def _plain(text: str) -> str:
    """The text without what a reader hardly sees: HTML's and Unicode's ways to write the same, accents, case, signs."""
    if "&" in text:
        text = html.unescape(text)
    if not text.isascii():
        apart = unicodedata.normalize("NFKD", text)
        text = "".join(sign for sign in apart if unicodedata.category(sign) not in _UNSEEN).casefold()
    return normalise_label(text) or text.strip()  # some texts are signs alone


_UNSEEN = ("Mn", "Cf")
"""Unicode's combining marks, and marks of format: zero-width spaces, soft hyphens."""
