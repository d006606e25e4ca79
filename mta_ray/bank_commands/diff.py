"""`mta bank diff`: what is different between two banks."""

from __future__ import annotations

import json
from dataclasses import dataclass

from mta_ray.artifacts import read_manifest
from mta_ray.bank_commands.place import BankPlace
from mta_ray.console import table
from mta_ray.lora.bank import load_bank
from mta_ray.lora.bank_diff import compare, different_settings
from mta_ray.object_store import told

ROUNDING = 1e-12
"""What the comparison itself leaves of two adapters that are the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffBanksConfig:
    """Two banks: anchors, settings, and how far each kept anchor has moved."""

    a: str
    """Folder or URL of the first bank; its version where `store` is given."""
    b: str
    """Of the second bank."""
    store: str | None = None
    """The bank store that holds both."""
    json: bool = False
    """Print JSON instead of text."""


def diff_banks(config: DiffBanksConfig) -> str:
    """From a to b. A kept anchor's change is ‖ΔW of b - ΔW of a‖ / ‖ΔW of a‖: 0 where nothing moved."""
    paths = [_path(one, config.store) for one in (config.a, config.b)]
    diff = compare(*(load_bank(path) for path in paths))
    manifests = [read_manifest(path, kind="bank") for path in paths]
    settings = different_settings(manifests[0].settings, manifests[1].settings)
    inputs = different_settings(manifests[0].inputs, manifests[1].inputs)
    if config.json:
        return json.dumps(
            {
                "a": told(paths[0]),
                "b": told(paths[1]),
                "is_same": manifests[0].hash == manifests[1].hash,
                "is_same_base": diff.is_same_base,
                "is_same_encoder": diff.is_same_encoder,
                "ranks": diff.ranks,
                "added": diff.added,
                "removed": diff.removed,
                "moved": diff.moved,
                "settings": settings,
                "inputs": inputs,
            },
            indent=1,
        )

    # 1. what they stand on
    heads = [
        ("", "a", "b"),
        ("bank", *(told(path) for path in paths)),
        ("hash", *(manifest.hash[:12] for manifest in manifests)),
        ("rank", *map(str, diff.ranks)),
        ("base", *_same(diff.is_same_base, [str(m.facts.get("base_fingerprint"))[:12] for m in manifests])),
        ("encoder", *_same(diff.is_same_encoder, [str(m.facts.get("encoder")) for m in manifests])),
    ]
    heads += [(f"input {name}", str(a)[:12], str(b)[:12]) for name, (a, b) in inputs.items()]
    heads += [(f"setting {name}", json.dumps(a), json.dumps(b)) for name, (a, b) in settings.items()]

    # 2. anchors
    rows = [("anchor", "change of ΔW")]
    rows += [(id, _change(change)) for id, change in diff.moved.items()]
    rows += [(id, "removed") for id in diff.removed] + [(id, "added") for id in diff.added]
    counts = f"anchors: {len(diff.moved)} kept, {len(diff.removed)} removed, {len(diff.added)} added"
    return f"{table(heads)}\n\n{counts}\n\n{table(rows)}"


def _path(bank: str, store: str | None) -> str:
    return bank if store is None else BankPlace(store=store, version=bank).path


def _same(is_same: bool, values: list[str]) -> list[str]:
    return values if not is_same else [values[0], "the same"]


def _change(change: float | None) -> str:
    if change is None:
        return "another model's"
    return "0" if change < ROUNDING else f"{change:.2g}"
