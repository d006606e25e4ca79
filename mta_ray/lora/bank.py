"""The Meta-LoRA bank: N anchors' stacked factors, with the anchors' ids and embeddings, on disk and on device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from numpy import ndarray
from safetensors.torch import load_file, save_file
from torch import Tensor

from mta_ray.artifacts import Artifact, open_artifact, publish
from mta_ray.lora.adapter import Adapter, Factors
from mta_ray.lora.slots import SlotLinear, put


@dataclass(frozen=True, slots=True, kw_only=True)
class Bank:
    """Everything that serving needs of the anchors. Slot i of the shelf `bank` is anchor i."""

    down: Mapping[str, Float[Tensor, "anchors rank fan_in"]]
    up: Mapping[str, Float[Tensor, "anchors fan_out rank"]]
    scale: float
    anchor_ids: tuple[str, ...]
    embeddings: Float[ndarray, "anchors dim"]
    """Unit vectors, in the encoder's space after `center` was taken off."""
    center: Float[ndarray, " dim"]
    """Subtracted from every user's mean item embedding before it is normalised; zeros switch that off."""
    base_fingerprint: str
    """Of the base model that the adapters were trained on (model.backbone.fingerprint)."""
    encoder: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.anchor_ids)

    @property
    def rank(self) -> int:
        return next(iter(self.down.values())).shape[1]

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.down.values(), *self.up.values()))

    def adapter(self, anchor: int) -> Adapter:
        """Anchor number `anchor` as a plain adapter."""
        factors = {m: Factors(down=self.down[m][anchor], up=self.up[m][anchor]) for m in self.down}
        return Adapter(factors=factors, scale=self.scale)

    def load_into(self, layers: Mapping[str, SlotLinear], shelf: str = "bank") -> None:
        """Put the whole bank on the model's device, as one shelf of its slots."""
        for layer in layers.values():
            layer.add_shelf(shelf, slots=len(self), rank=self.rank, scale=self.scale)
        for anchor in range(len(self)):
            put(layers, shelf, anchor, self.adapter(anchor))


def assemble(adapters: Sequence[Adapter], **fields: Any) -> Bank:
    """A bank of trained (or imported PEFT) adapters, in the order of `anchor_ids`.

    Raises ValueError where modules, ranks or shapes differ, or where an adapter is all zero or not finite.
    """
    first = adapters[0]
    for number, adapter in enumerate(adapters):
        if set(adapter.factors) != set(first.factors):
            raise ValueError(f"adapter {number} adapts other modules than adapter 0; a bank has one set of modules")
        for module, factors in adapter.factors.items():
            wanted = first.factors[module]
            if factors.down.shape != wanted.down.shape or factors.up.shape != wanted.up.shape:
                raise ValueError(f"adapter {number}: {module} has another rank or shape than in adapter 0")
            if not (torch.isfinite(factors.down).all() and torch.isfinite(factors.up).all()):
                raise ValueError(f"adapter {number}: {module} holds values that are not finite")
        if not any(factors.up.any() for factors in adapter.factors.values()):
            raise ValueError(f"adapter {number} is all zero: it was not trained, or was saved without being gathered")
    down = {m: torch.stack([a.factors[m].down for a in adapters]) for m in first.factors}
    up = {m: torch.stack([a.factors[m].up * (a.scale / first.scale) for a in adapters]) for m in first.factors}
    return Bank(down=down, up=up, scale=first.scale, **fields)


def save_bank(bank: Bank, out: str | Path, *, settings: dict[str, Any], inputs: dict[str, str]) -> None:
    """Publish the bank as an artifact: factors.safetensors, anchors.parquet, manifest.json last."""
    tensors = {f"{m}.down": t.contiguous() for m, t in bank.down.items()}
    tensors |= {f"{m}.up": t.contiguous() for m, t in bank.up.items()}
    table = pa.table({"user_id": list(bank.anchor_ids), "embedding": bank.embeddings.astype(np.float32).tolist()})
    with publish(out, kind="bank", settings=settings, inputs=inputs) as draft:
        save_file(tensors, draft.path / "factors.safetensors")
        pq.write_table(table, draft.path / "anchors.parquet")
        np.save(draft.path / "center.npy", bank.center.astype(np.float32), allow_pickle=False)
        draft.facts.update(bank.facts)
        draft.facts.update(
            anchors=len(bank),
            rank=bank.rank,
            scale=bank.scale,
            base_fingerprint=bank.base_fingerprint,
            encoder=bank.encoder,
            bytes=bank.bytes,
        )


def load_bank(path: str | Path, *, base_fingerprint: str | None = None) -> Bank:
    """The bank of an artifact folder; with `base_fingerprint`, refused when it was made with another base model."""
    artifact = open_artifact(path, kind="bank")
    facts = artifact.facts
    if base_fingerprint is not None and facts["base_fingerprint"] != base_fingerprint:
        raise ValueError(
            f"bank {path} was made with base model {facts['base_fingerprint'][:12]}, this base model is "
            f"{base_fingerprint[:12]}; pass the base it was built with, or build the bank again on this one"
        )
    return read_bank(artifact)


def read_bank(artifact: Artifact) -> Bank:
    """The bank in an artifact that was opened already."""
    facts = artifact.facts
    tensors = load_file(artifact.path / "factors.safetensors")
    table = pq.read_table(artifact.path / "anchors.parquet")
    modules = sorted(name.removesuffix(".down") for name in tensors if name.endswith(".down"))
    return Bank(
        down={m: tensors[f"{m}.down"] for m in modules},
        up={m: tensors[f"{m}.up"] for m in modules},
        scale=facts["scale"],
        anchor_ids=tuple(table["user_id"].to_pylist()),
        embeddings=np.array(table["embedding"].to_pylist(), dtype=np.float32),
        center=np.load(artifact.path / "center.npy", allow_pickle=False),
        base_fingerprint=facts["base_fingerprint"],
        encoder=facts["encoder"],
        facts=facts,
    )
