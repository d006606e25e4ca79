"""What is different between two banks: anchors, settings, and how far each kept anchor's ΔW has moved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mta_ray.lora.adapter import Adapter
from mta_ray.lora.bank import Bank


@dataclass(frozen=True, slots=True, kw_only=True)
class BankDiff:
    """From bank `a` to bank `b`."""

    added: tuple[str, ...]
    """Anchors of b alone, in its order."""
    removed: tuple[str, ...]
    """Anchors of a alone, in its order."""
    moved: Mapping[str, float | None]
    """Anchors of both to ‖ΔW_b - ΔW_a‖ / ‖ΔW_a‖ over all modules; None where the shapes are another model's."""
    is_same_base: bool
    is_same_encoder: bool
    ranks: tuple[int, int]


def compare(a: Bank, b: Bank) -> BankDiff:
    """The difference of two banks; anchors are matched by id, wherever they stand."""
    slots_a, slots_b = ({id: slot for slot, id in enumerate(bank.anchor_ids)} for bank in (a, b))
    return BankDiff(
        added=tuple(id for id in b.anchor_ids if id not in slots_a),
        removed=tuple(id for id in a.anchor_ids if id not in slots_b),
        moved={
            id: relative_change(a.adapter(slot), b.adapter(slots_b[id]))
            for id, slot in slots_a.items()
            if id in slots_b
        },
        is_same_base=a.base_fingerprint == b.base_fingerprint,
        is_same_encoder=a.encoder == b.encoder,
        ranks=(a.rank, b.rank),
    )


def relative_change(a: Adapter, b: Adapter) -> float | None:
    """‖ΔW_b - ΔW_a‖ / ‖ΔW_a‖ (Frobenius, all modules together); None where they do not fit one model.

    A module that one of them lacks is zero there. Dense matrices are never made.
    """
    moved = before = 0.0
    for module in {*a.factors, *b.factors}:
        parts = [
            (sign * one.scale * one.factors[module].up.double(), one.factors[module].down.double())
            for one, sign in ((a, -1.0), (b, 1.0))
            if module in one.factors
        ]
        if len({(up.shape[0], down.shape[1]) for up, down in parts}) > 1:
            return None
        moved += _norm(torch.cat([up for up, _ in parts], dim=1), torch.cat([down for _, down in parts])) ** 2
        if module in a.factors:
            before += _norm(*parts[0]) ** 2
    if before == 0:
        return 0.0 if moved == 0 else float("inf")
    return float((moved / before) ** 0.5)


def different_settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings by dotted name to their values in a and in b, where those differ; None where one has no such setting."""
    flat_a, flat_b = flat_settings(a), flat_settings(b)
    names = sorted({*flat_a, *flat_b})
    return {name: (flat_a.get(name), flat_b.get(name)) for name in names if flat_a.get(name) != flat_b.get(name)}


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flat_settings(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _norm(up: Tensor, down: Tensor) -> float:
    """‖up @ down‖ by the triangular factors of both, exact where a difference of squares would not be."""
    return float((torch.linalg.qr(up).R @ torch.linalg.qr(down.T).R.T).norm())
