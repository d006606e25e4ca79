"""What a user's model is made of at this moment, and how new history changes it: store, encoder and bank together.

Synchronous, for any number of threads; knows no Ray and no model.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mta_ray.lamp.prompts import render_item
from mta_ray.lamp.tasks import task_named
from mta_ray.lamp.users import HistoryItem
from mta_ray.lora.slots import Route
from mta_ray.serving.args import ServingArgs
from mta_ray.serving.banks import Banks, PublishedBank, UnknownBank
from mta_ray.serving.identity import UserId
from mta_ray.serving.schema import FREE_TEXT
from mta_ray.serving.served_bank import ServedBank, describe, load_served
from mta_ray.serving.user_state import ItemSum, UserState
from mta_ray.serving.user_store import Conflict, UnknownUser, UserStore
from mta_ray.similarity.embedding import Encoder

log = logging.getLogger(__name__)
ATTEMPTS = 5
"""A route that others keep changing beneath us is computed so often, then used without being kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Personal:
    """The model of one request: the bank's version, a route, and the user's state, where there is one."""

    served: ServedBank
    route: Route | None
    """None: the base model alone, for no anchor is in service."""
    state: UserState | None
    """None: nobody is known by that name."""


class OtherEncoder(Exception):
    """The user's vectors are another encoder's: the whole history has to be encoded first."""


class Personaliser:
    """Users' routes through the bank that is served, computed when they are asked for and kept."""

    def __init__(self, store: UserStore, banks: Banks, encoder: Encoder, served: ServedBank, *, words: int) -> None:
        self.store = store
        self.banks = banks
        self.served = served
        """Replaced as a whole when another bank is served."""
        self.encoder = encoder
        self.words = words
        self._generation = -1
        self._active: str | None = None
        self._watch = threading.Lock()
        self._encoding = threading.Lock()

    def follow(self) -> PublishedBank | None:
        """See what happened to banks and anchors since the last call: retired anchors are out of service from now on.

        Returns the bank that is to be served instead of the present one, if there is another.
        """
        with self._watch:
            state = self.banks.state()
            if state.generation != self._generation:
                try:
                    retired = self.banks.get(self.served.version).retired_slots
                    if retired != self.served.retired:
                        self.served = self.served.with_retired(retired)
                except UnknownBank:
                    pass  # dropped after another was activated: which is taken next
                self._active, self._generation = state.active_version, state.generation
            if self._active in (None, self.served.version):
                return None
            assert self._active is not None
            return self.banks.get(self._active)

    def take(self, served: ServedBank, encoder: Encoder) -> None:
        """Serve another bank from now on."""
        with self._watch:
            self.served, self.encoder, self._generation = served, encoder, -1

    def model_of(self, user: UserId | None, *, encodes: bool = True) -> Personal:
        """The user's route, from the store or computed anew. Nobody, and whoever has no history: the cold start.

        Raises OtherEncoder where `encodes` is false and there is a history to encode.
        """
        for _ in range(ATTEMPTS):
            served = self.served
            try:
                state = None if user is None else self.store.read(user)
            except UnknownUser:
                state = None
            if user is None or state is None or not state.items:
                return Personal(served=served, route=served.cold_start(), state=state)
            try:
                if state.item_sum.encoder != self.encoder.source:
                    if not encodes:
                        raise OtherEncoder
                    self._encode_again(state)
                    continue
                route = served.kept(state) or served.compute(state)
                if route is None:
                    return Personal(served=served, route=None, state=state)
                if route is not state.route and served.version == self._active:
                    self.store.set_route(user, route)
                    state = replace(state, route=route)
            except Conflict:  # the history grew, or an anchor was retired: look again
                self.follow()
                continue
            except UnknownUser:
                continue
            return Personal(served=served, route=served.slots_of(route), state=state)
        raise Conflict("the user's history keeps changing; try again")

    def put_history(
        self, user: UserId, items: Sequence[HistoryItem], *, task: str, replaces: bool, expected_version: int | None
    ) -> UserState:
        """The user with new items, or with these alone; in force with the next request."""
        write = self.store.replace_history if replaces else self.store.append_history
        sums = self._sum(items, task)
        for attempt in range(2):
            try:
                return write(user, items, sums, task=task, expected_version=expected_version)
            except Conflict:
                # The old items may be another encoder's; then they are encoded again, once.
                if attempt or replaces or not self._is_of_another_encoder(user):
                    raise
                self._encode_again(self.store.read(user))
        raise AssertionError

    def reroute(self, anchor: UserId, *, pages: int | None = None) -> int:
        """New routes for the users who cite an anchor that is out of service; how many. `pages`: no more than these.

        Whoever is not reached is routed anew by the next request: this is for those who look at their anchors.
        """
        done = 0
        for number, page in enumerate(self.store.pages_citing(anchor)):
            if pages is not None and number >= pages:
                break
            for _ in range(ATTEMPTS):
                self.follow()
                served = self.served
                known = [state for state in page if state.item_sum.encoder == self.encoder.source]
                routes = [(state.user, route) for state in known if (route := served.compute(state)) is not None]
                try:
                    done += self.store.set_routes(routes) if routes else 0
                    break
                except Conflict:
                    continue
        return done

    def history(self, user: UserId) -> tuple[HistoryItem, ...]:
        """The user's items; never kept here, for a deleted user's must be gone everywhere at once."""
        try:
            return self.store.read_history(user)
        except UnknownUser:
            return ()

    def _is_of_another_encoder(self, user: UserId) -> bool:
        try:
            return self.store.read(user).item_sum.encoder not in ("", self.encoder.source)
        except UnknownUser:
            return False

    def _encode_again(self, state: UserState) -> None:
        items = self.store.read_history(state.user)
        self.store.reembed(state.user, self._sum(items, state.task), version=state.version)

    def _sum(self, items: Sequence[HistoryItem], task: str) -> ItemSum:
        texts = [" ".join(_rendered(item, task).split()[: self.words]) for item in items]
        encoder = self.encoder  # another one may take its place meanwhile
        with self._encoding:
            mean = encoder.embed_users([texts])[0]
        return ItemSum(total=mean * np.float32(len(items)), items=len(items), encoder=encoder.source)


def open_personaliser(
    args: ServingArgs, store: UserStore, banks: Banks, *, base_fingerprint: str, device: str
) -> Personaliser:
    """With the bank in force; in a store that has none, `args.bank` is published and is in force."""
    published = banks.active()
    if published is None:
        bank = describe(args.bank, base_fingerprint=base_fingerprint, tenant=args.tenant)
        banks.publish(bank)
        banks.activate(bank.version)
        published = banks.get(bank.version)
    served = load_served(published, base_fingerprint=base_fingerprint, fusion=args.fusion)
    encoder = Encoder(served.bank.encoder, device=device)
    personaliser = Personaliser(store, banks, encoder, served, words=args.encoded_words)
    personaliser.follow()
    return personaliser


def _rendered(item: HistoryItem, task: str) -> str:
    if task == FREE_TEXT:
        return f"{item.content} {item.target}".strip()
    return render_item(task_named(task), item)
