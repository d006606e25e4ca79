"""What each user must be told, computed by a merged model that knows nothing of serving, and whether they were.

A user's answers are known as long as anchors, weights and stack are: of users who were marked before the run, and of
those who come, change or go in it. The anchors are computed from the history that was sent; only where it cannot be
known what of it is stored are they those that the service told. A user whose stack is trained by the service is not
judged from then on.
"""

from __future__ import annotations

import copy
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import httpx
import numpy as np
import torch

from mta_ray.benchmarks.marked_users import random_adapter
from mta_ray.lora.adapter import Adapter, from_bytes, save_peft, to_bytes
from mta_ray.lora.bank import Bank
from mta_ray.lora.fusion import fuse, stack
from mta_ray.lora.fusion_config import FusionConfig
from mta_ray.model.backbone import Backbone, merge
from mta_ray.model.batches import whole_prompt_ids
from mta_ray.personalize.merge_then_adapt import encode, route_users
from mta_ray.population.load.rows import Row
from mta_ray.similarity.embedding import Encoder

Anchors = tuple[tuple[int, float], ...]
"""Slot and weight of each; empty: nobody's, every anchor alike."""
CERTAIN = 2e-4
"""Two best tokens whose logits are closer than this may change places by rounding: no answer is judged by them."""
NEAR = 1e-4
"""Two cosines that are closer than this may change places by rounding."""
SAME_WEIGHT = 1e-3
"""Weights that differ by less are the same but for rounding."""
ATTEMPTS = 8
"""Stacks that are drawn for a user before there must be one whose answer is nobody else's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What plain greedy generation says."""

    tokens: tuple[int, ...]
    certain: int
    """So many of them, from the beginning, do not hang on rounding."""


class AnswerBook:
    """Expected answers of all users, each computed when it is first asked for."""

    def __init__(
        self, backbone: Backbone, bank: Bank, prompts: Sequence[str], *, tokens: int, fusion: FusionConfig
    ) -> None:
        self.backbone, self._bank, self._prompts, self._tokens = backbone, bank, prompts, tokens
        self._fusion, self._encoder = fusion, Encoder(bank.encoder)
        self._vectors: dict[str, np.ndarray] = {}
        self.marked: dict[int, Anchors] = {}
        """Users who were introduced before the run, with their anchors."""
        self.items: dict[int, str] = {}
        """Their histories."""
        self.stacks: dict[int, Adapter] = {}
        """Those of them who have a stack."""
        self._texts: dict[tuple[int, int], Counter[str]] = {}
        self._known: dict[tuple[Anchors, int | None, int], Expected] = {}
        self._users_of: dict[tuple[Anchors, int | None], set[int]] = {}
        """Who was or is to be answered by these anchors, and whose stack."""

    def anchors_of(self, items: Sequence[str], told: Anchors) -> Anchors:
        """Those that a history of these items leads to; `told` where they differ by no more than rounding."""
        for item in items:
            if item not in self._vectors:
                self._vectors[item] = self._encoder.embed_users([[item]])[0]
        mean = np.mean([self._vectors[item] for item in items], axis=0, keepdims=True)
        vectors, count = encode(mean, self._bank.center), [len(items)]
        everywhere = route_users(vectors, self._bank, self._fusion, items=count)[0]
        computed = tuple(zip(everywhere.slots, everywhere.weights, strict=True))
        weights, slots = dict(told), {slot for slot, _ in told}
        if not self.has(told) or not len(slots) == len(told) == len(computed):
            return computed
        cosines, others = self._bank.embeddings @ vectors[0], set(range(len(self._bank))) - slots
        if others and min(cosines[list(slots)]) < max(cosines[list(others)]) - NEAR:
            return computed
        route = route_users(vectors, self._bank, self._fusion, without=others, items=count)[0]
        is_same = all(
            abs(weights[slot] - weight) < SAME_WEIGHT for slot, weight in zip(route.slots, route.weights, strict=True)
        )
        return told if is_same else computed

    def has(self, anchors: Anchors) -> bool:
        """Whether the bank has all of them."""
        return all(0 <= slot < len(self._bank) for slot, _ in anchors)

    def expected(self, user: int, anchors: Anchors) -> Expected:
        """The answer that this user gets with these anchors, and with their own stack if there is one."""
        whose = user if user in self.stacks else None
        self._users_of.setdefault((anchors, whose), set()).add(user)
        return self._said(anchors, whose, user % len(self._prompts))

    def _said(self, anchors: Anchors, whose: int | None, prompt: int) -> Expected:
        key = anchors, whose, prompt
        if key not in self._known:
            self._known[key] = self._compute(self._adapter(anchors, whose), self._prompts[prompt])
        return self._known[key]

    def agrees(self, text: str, expected: Expected, tokens: int) -> bool | None:
        """Whether an answer of at most so many tokens is that one; none where it hangs on rounding."""
        if expected.certain >= min(tokens, len(expected.tokens)):
            return text == self.text(expected, tokens)
        # the last certain token may be the beginning of a longer word
        return None if text.startswith(self.text(expected, expected.certain - 1)) else False

    def text(self, expected: Expected, tokens: int) -> str:
        """The beginning of the answer, of so many tokens."""
        told = expected.tokens[: max(tokens, 0)]
        decoded = self.backbone.tokenizer.decode(told, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(decoded).strip()

    def give(self, user: int, own: Adapter) -> None:
        """The user has that stack from now on."""
        self.stacks[user] = own
        self._known = {key: expected for key, expected in self._known.items() if key[1] != user}
        self._users_of = {state: users for state, users in self._users_of.items() if state[1] != user}
        self._texts.clear()

    def is_anothers(self, text: str, tokens: int, user: int) -> bool:
        """Whether that is what somebody else in the book must be told, or would be if they asked what this user asks.

        What the user alone was once to be told is stale, and not another's.
        """
        others = [state for state, users in self._users_of.items() if users - {user}]
        prompts = range(len(self._prompts))
        asked = [self._said(*state, user % len(self._prompts)) for state in others]
        known = [
            self._known[*state, prompt] for state in others for prompt in prompts if (*state, prompt) in self._known
        ]
        return any(text == self.text(expected, tokens) for expected in (*asked, *known))

    def tells_apart(self, user: int, tokens: int) -> bool:
        """Whether the beginning of this marked user's answer would be no other marked user's at the same prompt."""
        prompt = user % len(self._prompts)
        if (prompt, tokens) not in self._texts:
            said = [
                self.text(self._said(anchors, one if one in self.stacks else None, prompt), tokens)
                for one, anchors in self.marked.items()
            ]
            self._texts[prompt, tokens] = Counter(said)
        return self._texts[prompt, tokens][self.text(self.expected(user, self.marked[user]), tokens)] == 1

    def _adapter(self, anchors: Anchors, whose: int | None) -> Adapter:
        """All that makes a user's model, as one adapter."""
        slots = [slot for slot, _ in anchors] or range(len(self._bank))
        weights = [weight for _, weight in anchors] or [1 / len(self._bank)] * len(self._bank)
        fused = fuse([self._bank.adapter(slot) for slot in slots], weights)
        return fused if whose is None else stack(fused, self.stacks[whose])

    def _compute(self, adapter: Adapter, prompt: str) -> Expected:
        backbone = self.backbone
        model = copy.deepcopy(backbone.model)
        merge(model, adapter)
        ids = whole_prompt_ids(backbone, prompt)
        out = model.generate(  # type: ignore[operator]
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            max_new_tokens=self._tokens,
            do_sample=False,
            eos_token_id=backbone.end_id,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
        best = torch.cat(out.scores).topk(2).values  # (tokens, 2)
        is_close = (best[:, 0] - best[:, 1] < CERTAIN).tolist()
        certain = is_close.index(True) if True in is_close else len(is_close)
        return Expected(tokens=tuple(out.sequences[0, len(ids) :].tolist()), certain=certain)


def introduce(
    http: httpx.Client,
    users: int,
    *,
    prefix: str,
    tastes: Sequence[str],
    book: AnswerBook | None,
    seed: int,
    rank: int,
    tokens: int,
) -> None:
    """Users of a running service, through its endpoint alone: a history each, and with a book a stack that marks them.

    With a book no two of them are answered alike, in the first so many tokens. Without stacks are the first ones, as
    far as that makes no two alike.
    """
    seen: set[str] = set()
    for user in range(users):
        name = f"{prefix}{user}"
        item = f"{tastes[user % len(tastes)]} {user} 0"
        view = http.put(f"/v1/users/{name}/history", json={"items": [item]}).raise_for_status().json()
        if book is None:
            continue
        book.items[user] = item
        told = tuple((anchor["slot"], anchor["weight"]) for anchor in view["anchors"])
        anchors = book.anchors_of([item], told)
        if anchors != told:
            raise ValueError(
                f"the history of {name} leads to the anchors {anchors}, the service says {told}; give the bank that "
                "is in force there, none of its anchors out of service, and its own fusion"
            )
        generator = torch.Generator().manual_seed(seed * 1_000_003 + user)
        for attempt in range(ATTEMPTS):
            if user >= len(tastes) or attempt:
                own = random_adapter(book.backbone, rank=rank, generator=generator)
                book.give(user, from_bytes(to_bytes(own), own.scale))  # rounded, as it is kept
            expected = book.expected(user, anchors)
            text = book.text(expected, tokens)
            if text not in seen and expected.certain == len(expected.tokens):
                break
        else:
            raise ValueError(f"of {users} users some are answered alike; ask for more tokens (traffic.least_tokens)")
        seen.add(text)
        book.marked[user] = anchors
        if user in book.stacks:
            put_stack(http, name, book.stacks[user])


def put_stack(http: httpx.Client, name: str, own: Adapter) -> None:
    """Send an adapter as the user's stack, as PEFT writes it."""
    with tempfile.TemporaryDirectory(prefix="mta-stack-") as folder:
        body = (save_peft(own, folder, base_model="") / "adapter_model.safetensors").read_bytes()
    http.put(f"/v1/users/{name}/stack", params={"alpha": own.scale * own.rank}, content=body).raise_for_status()


def judge(rows: Sequence[Row], book: AnswerBook | None) -> list[str]:
    """Of each row: ok, wrong, wrong_user (what another user must be told), 503, failed, or unchecked.

    A history is wrong where it was told to lead to other anchors than it does; what else is not a question is ok by its
    status. A question that met a change of its user may have been answered by the user as before or as after.
    """
    rows, misled = (rows, set()) if book is None else _rightly_routed(rows, book)
    if book is not None:
        for user, anchors in book.marked.items():
            book.expected(user, anchors)
    changes: dict[int, list[Row]] = {}
    for row in rows:
        if row.kind != "ask":
            changes.setdefault(row.user, []).append(row)
    verdicts = [_verdict(row, changes.get(row.user, []), book) for row in rows]

    for place in misled:
        verdicts[place] = "wrong"

    # only now does the book know what everybody else must be told
    for place, row in enumerate(rows):
        if book is None or verdicts[place] != "wrong" or row.kind != "ask":
            continue
        if book.is_anothers(row.text.strip(), row.most_tokens, row.user):
            verdicts[place] = "wrong_user"
    return verdicts


def telling(rows: Sequence[Row], verdicts: Sequence[str], book: AnswerBook) -> float | None:
    """Of the right answers to marked users who did not change: the share that no other marked user would have got."""
    changed = {row.user for row in rows if row.kind != "ask"}
    told = [
        book.tells_apart(row.user, row.most_tokens)
        for row, verdict in zip(rows, verdicts, strict=True)
        if row.kind == "ask" and verdict == "ok" and row.user in book.marked and row.user not in changed
    ]
    return sum(told) / len(told) if told else None


def _rightly_routed(rows: Sequence[Row], book: AnswerBook) -> tuple[list[Row], set[int]]:
    """The rows, each history with the anchors that it leads to, and the places of those that were told others."""
    changes: dict[int, list[Row]] = {}
    for row in rows:
        if row.kind in ("history", "delete"):
            changes.setdefault(row.user, []).append(row)
    found, misled = list(rows), set()
    for place, row in enumerate(rows):
        if row.kind != "history" or not _is_done(row) or row.anchors is None:
            continue
        items, told = _items(row, changes[row.user], book), tuple(row.anchors)
        if items:
            anchors: Anchors | None = book.anchors_of(items, told)
        else:
            anchors = told if book.has(told) else None
        if anchors != told:
            misled.add(place)
            found[place] = replace(row, anchors=None if anchors is None else list(anchors))
    return found, misled


def _items(row: Row, changes: Sequence[Row], book: AnswerBook) -> list[str] | None:
    """The user's history when that one was stored; none where it cannot be known."""
    items = [book.items[row.user]] if row.user in book.items else []
    ended_s = 0.0
    for change in sorted(changes, key=lambda change: change.sent_s):
        if change.sent_s >= row.ended_s:
            break
        # one beside another, or sent twice, or lost: who knows what is stored, and in which order
        if change.sent_s < ended_s or change.retried or not _is_done(change):
            return None
        if change.kind == "history" and not change.item:
            return None
        ended_s = change.ended_s
        items = [*items, change.item] if change.kind == "history" else []
    return items


def _verdict(row: Row, changes: Sequence[Row], book: AnswerBook | None) -> str:
    if row.status == 503:
        return "503"
    if row.status == 404 and row.kind in ("stack", "delete") and not _is_certain_to_be_there(row, changes):
        return "unchecked"
    if not 200 <= row.status < 300 or row.error:
        return "failed"
    if row.kind != "ask":
        return "ok"
    if book is None:
        return "unchecked"

    states = _states(row, changes, book)
    if states is None:
        return "unchecked"
    text = row.text.strip()
    agrees = [book.agrees(text, book.expected(row.user, anchors), row.most_tokens) for anchors in states]
    if True in agrees:
        return "ok"
    return "unchecked" if None in agrees else "wrong"


def _states(row: Row, changes: Sequence[Row], book: AnswerBook) -> list[Anchors] | None:
    """The anchors that the user may have had when the question was read; none where they cannot be known."""
    begun = [change for change in changes if change.sent_s <= row.ended_s]
    over = [change for change in begun if _is_done(change) and change.ended_s <= row.sent_s]
    states = []
    if not over:
        states.append(book.marked.get(row.user, ()))
    for change in begun:
        # a stack outlives a new history, but no deletion
        enders = ("delete",) if change.kind == "stack" else ("delete", "history")
        if any(later.kind in enders and later.sent_s >= change.ended_s for later in over):
            continue
        if change.kind == "stack":
            return None
        if change.kind == "delete":
            states.append(())
            if not _is_done(change):
                return None
        elif change.anchors is None or (change.retried and change.ended_s > row.sent_s):
            return None  # refused or lost, it may be stored or not; sent twice, it may be there once so far
        else:
            states.append(tuple(change.anchors))
    return states


def _is_done(change: Row) -> bool:
    return 200 <= change.status < 300


def _is_certain_to_be_there(row: Row, changes: Sequence[Row]) -> bool:
    """Whether the user's last change before that request put them there, and none was under way."""
    begun = [change for change in changes if change is not row and change.sent_s <= row.ended_s]
    if any(change.kind == "delete" for change in begun):
        return False
    return any(change.kind == "history" and _is_done(change) and change.ended_s <= row.sent_s for change in begun)
