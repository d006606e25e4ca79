"""What each user must be told, computed by a merged model that knows nothing of serving.

Of history, anchors and stack; whether it was told is in verdicts.py.
"""

from __future__ import annotations

import copy
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
from mta_ray.population.load.patience import patient
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
    introduced: set[int],
) -> None:
    """Users of a running service, through its endpoint alone: a history each, and with a book a stack that marks them.

    With a book no two of them are answered alike, in the first so many tokens. Without stacks are the first ones, as
    far as that makes no two alike. `introduced` is filled in.
    """
    seen: set[str] = set()
    for user in range(users):
        name = f"{prefix}{user}"
        item = f"{tastes[user % len(tastes)]} {user} 0"
        view = _put(http, f"/v1/users/{name}/history", json={"items": [item]}).json()
        introduced.add(user)
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
    _put(http, f"/v1/users/{name}/stack", params={"alpha": own.scale * own.rank}, content=body)


def _put(http: httpx.Client, path: str, **sent: Any) -> httpx.Response:
    """The answer; anything but success is a ValueError."""
    answer = patient(http, "PUT", path, **sent)
    if answer.is_success:
        return answer
    raise ValueError(
        f"the endpoint answered {answer.status_code} to PUT {path} before the run: {answer.text[:300]}; see to the "
        "service, its API key and its limits"
    )
