"""The bank that a process has loaded, with the anchors that are out of service: users' routes, by name and by slot."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mta_ray.artifacts import open_artifact
from mta_ray.lora.bank import Bank, load_bank
from mta_ray.lora.bank_store import version_of
from mta_ray.lora.fusion_config import FusionConfig
from mta_ray.lora.slots import Route
from mta_ray.personalize.merge_then_adapt import encode, route_users
from mta_ray.serving.banks import NewBank, PublishedBank
from mta_ray.serving.identity import UserId
from mta_ray.serving.user_state import UserRoute, UserState


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ServedBank:
    """One version of the bank, in memory."""

    version: str
    bank: Bank
    anchors: tuple[UserId, ...]
    """In the order of the slots."""
    retired: frozenset[int]
    """Slots that no route may use."""
    fusion: FusionConfig

    def with_retired(self, retired: frozenset[int]) -> ServedBank:
        """The same with other anchors out of service."""
        return replace(self, retired=retired)

    def cold_start(self) -> Route | None:
        """Of a user without history: every anchor alike. None (the base model alone) where none is in service."""
        return self._route(np.zeros_like(self.bank.center), 0)

    def compute(self, state: UserState) -> UserRoute | None:
        """The route of a user with a history, to be kept. None where no anchor is in service."""
        route = self._route(state.item_sum.mean, state.item_sum.items)
        if route is None or not state.items:
            return None
        return UserRoute(
            anchors=tuple(self.anchors[slot] for slot in route.slots),
            weights=tuple(np.array(route.weights, np.float32).tolist()),  # as the store keeps them
            bank_version=self.version,
            history_version=state.version,
        )

    def kept(self, state: UserState) -> UserRoute | None:
        """The user's stored route, if it is of this bank, of the history as it is, and of anchors in service."""
        if state.route is None or not state.has_route_for(self.version):
            return None
        in_service = {anchor for slot, anchor in enumerate(self.anchors) if slot not in self.retired}
        return state.route if in_service.issuperset(state.route.anchors) else None

    def slots_of(self, route: UserRoute) -> Route:
        """A route of this bank by slots."""
        slot_of = {anchor: slot for slot, anchor in enumerate(self.anchors)}
        return Route(slots=tuple(slot_of[anchor] for anchor in route.anchors), weights=route.weights)

    def _route(self, mean: np.ndarray, items: int) -> Route | None:
        if len(self.retired) == len(self.bank):
            return None
        vectors = encode(mean[None].astype(np.float32), self.bank.center)
        return route_users(vectors, self.bank, self.fusion, without=self.retired, items=[items])[0]


def load_served(published: PublishedBank, *, base_fingerprint: str, fusion: FusionConfig) -> ServedBank:
    """The bank behind a published version. Raises ValueError where it was replaced by another, or is another base's."""
    bank = load_bank(published.bank.path, base_fingerprint=base_fingerprint)
    found = open_artifact(published.bank.path, kind="bank", verify=False).hash
    if found != published.bank.hash:
        raise ValueError(
            f"bank {published.bank.version} was published as {published.bank.hash[:12]}, but {published.bank.path} "
            f"holds {found[:12]} now; publish that one (mta bank publish), or put the old one back"
        )
    return ServedBank(
        version=published.bank.version,
        bank=bank,
        anchors=published.bank.anchors,
        retired=published.retired_slots,
        fusion=fusion,
    )


def describe(path: str, *, base_fingerprint: str, tenant: str, version: str | None = None) -> NewBank:
    """A bank artifact as it is published: its anchors are users of `tenant`."""
    bank = load_bank(path, base_fingerprint=base_fingerprint)
    digest = open_artifact(path, kind="bank", verify=False).hash
    return NewBank(
        version=version or version_of(digest),
        path=path,
        hash=digest,
        base_fingerprint=base_fingerprint,
        encoder=bank.encoder,
        anchors=tuple(UserId(tenant=tenant, id=anchor) for anchor in bank.anchor_ids),
    )
