"""`mta bank list` and `mta bank show`: which banks there are, and what one of them is made of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from mta_ray.artifacts import Manifest, open_artifact, read_manifest
from mta_ray.bank_commands.place import BankPlace
from mta_ray.console import table
from mta_ray.lora.bank_diff import flat_settings
from mta_ray.lora.bank_store import BankStore, version_of
from mta_ray.object_store import told


@dataclass(frozen=True, slots=True, kw_only=True)
class ListBanksConfig:
    """The bank versions in a store, newest first."""

    store: str
    """The bank store: a folder, or an fsspec URL such as s3://bucket/banks."""
    json: bool = False
    """Print JSON instead of a table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShowBankConfig(BankPlace):
    """What one bank is made of."""

    json: bool = False
    """Print JSON instead of text."""


def list_banks(config: ListBanksConfig) -> str:
    """One line a version: when it was built, anchors, rank, base model, size, task."""
    found = [_summary(one.version, one.manifest) for one in BankStore(config.store).versions()]
    if config.json:
        return json.dumps(found, indent=1)
    if not found:
        return f"{told(config.store)} holds no bank; `mta bank import` takes one in"
    heads = ("version", "created", "anchors", "rank", "base", "MiB", "task")
    rows = [
        (
            one["version"],
            one["created_at"],
            str(one["anchors"]),
            str(one["rank"]),
            str(one["base_fingerprint"])[:12],
            _mib(one["bytes"]),
            str(one["task"]),
        )
        for one in found
    ]
    return table([heads, *rows])


def show_bank(config: ShowBankConfig) -> str:
    """Facts, inputs and settings of a bank, and each anchor with its items and its last loss."""
    path = config.path
    manifest = read_manifest(path, kind="bank")
    artifact = open_artifact(path, kind="bank", verify=False)
    ids = pq.read_table(artifact.path / "anchors.parquet", columns=["user_id"])["user_id"].to_pylist()
    facts = dict(manifest.facts)
    items, losses = (_for_each(facts.pop(name, None), len(ids)) for name in ("items", "losses"))
    last = [loss[-1] if isinstance(loss, list) and loss else None for loss in losses]
    anchors = [
        {"slot": slot, "user_id": id, "items": item, "last_loss": loss}
        for slot, (id, item, loss) in enumerate(zip(ids, items, last, strict=True))
    ]
    whole = {
        "bank": told(path),
        **_summary(version_of(manifest.hash), manifest),
        "hash": manifest.hash,
        "mta_ray": manifest.mta_ray,
        "facts": facts,
        "inputs": manifest.inputs,
        "settings": manifest.settings,
    }
    if config.json:
        return json.dumps(whole | {"anchors_by_slot": anchors}, indent=1)

    # 1. facts, inputs, settings
    lines: list[tuple[str, str]] = [("bank", told(path)), ("version", version_of(manifest.hash))]
    lines += [("created", f"{manifest.created_at} by mta_ray {manifest.mta_ray}"), ("hash", manifest.hash)]
    lines += [("size", f"{_mib(manifest.bytes)} MiB")]
    lines += [(name, str(value)) for name, value in facts.items() if name != "bytes" and not _is_bulk(value)]
    lines += [(f"input {name}", digest) for name, digest in manifest.inputs.items()]
    lines += [(f"setting {name}", json.dumps(value)) for name, value in flat_settings(manifest.settings).items()]

    # 2. the anchors
    rows = [("slot", "items", "last loss", "anchor")]
    for one in anchors:
        loss = one["last_loss"]
        told_loss = "–" if loss is None else f"{loss:.4f}"
        rows.append((str(one["slot"]), "–" if one["items"] is None else str(one["items"]), told_loss, one["user_id"]))
    return f"{table(lines)}\n\n{table(rows)}"


def _summary(version: str, manifest: Manifest) -> dict[str, Any]:
    facts: Mapping[str, Any] = manifest.facts
    return {
        "version": version,
        "created_at": manifest.created_at,
        **{name: facts.get(name) for name in ("anchors", "rank", "base_fingerprint", "encoder", "task")},
        "bytes": manifest.bytes,
    }


def _for_each(values: Any, anchors: int) -> list[Any]:
    return values if isinstance(values, list) and len(values) == anchors else [None] * anchors


def _is_bulk(value: Any) -> bool:
    return isinstance(value, (list, dict)) and len(value) > 8


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"
