"""Whether a bank is what it says: every checksum, shape and value. What is wrong is told by slot, never by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open

from mta_ray.artifacts import Artifact, inspected

UNIT_TOLERANCE = 1e-3
"""How far from 1 an embedding's length may be; float32 is a thousand times closer."""


def problems_of(path: str | Path) -> list[str]:
    """What is wrong with the bank at a folder or URL, one line each; nothing where it is sound.

    Raises ArtifactError where there is no bank to look at. The files are those at `path`, not a copy in the cache.
    """
    with inspected(path, kind="bank") as (artifact, problems):
        if problems:  # what the values of damaged files are does not matter
            return problems
        return [*_wrong_factors(artifact), *_wrong_anchors(artifact)]


def _wrong_factors(artifact: Artifact) -> Iterator[str]:
    facts = artifact.facts
    anchors, rank = facts.get("anchors"), facts.get("rank")
    try:
        with safe_open(artifact.path / "factors.safetensors", framework="pt") as file:
            names = set(file.keys())
            modules = sorted({name.rsplit(".", 1)[0] for name in names})
            if not modules:
                yield "factors.safetensors holds no factors"
                return
            is_zero, size = None, 0
            for module in modules:
                if missing := {f"{module}.down", f"{module}.up"} - names:
                    yield f"{module} lacks {' and '.join(sorted(missing))}"
                    continue
                down, up = file.get_tensor(f"{module}.down"), file.get_tensor(f"{module}.up")
                size += down.numel() * down.element_size() + up.numel() * up.element_size()
                if down.ndim != 3 or up.ndim != 3 or (*down.shape[:2], *up.shape[::2]) != (anchors, rank) * 2:
                    yield (
                        f"{module} has factors {tuple(down.shape)} and {tuple(up.shape)}, wanted "
                        f"({anchors}, {rank}, fan_in) and ({anchors}, fan_out, {rank})"
                    )
                    continue
                finite = torch.isfinite(down).flatten(1).all(1) & torch.isfinite(up).flatten(1).all(1)
                if not finite.all():
                    yield f"{module}: values that are not finite, in {_slots(~finite)}"
                empty = (up == 0).flatten(1).all(1) | (down == 0).flatten(1).all(1)
                is_zero = empty if is_zero is None else is_zero & empty
            if is_zero is not None and is_zero.any():
                yield f"all-zero adapters, never trained: {_slots(is_zero)}"
            if facts.get("bytes") not in (None, size):
                yield f"the factors are {size} bytes, the manifest says {facts['bytes']}"
    except (OSError, SafetensorError) as error:
        yield f"factors.safetensors cannot be read: {error}"
    scale = facts.get("scale")
    if not isinstance(scale, (int, float)) or not np.isfinite(scale) or scale <= 0:
        yield f"the scale is {scale}, wanted a number above 0"


def _wrong_anchors(artifact: Artifact) -> Iterator[str]:
    facts = artifact.facts
    anchors = facts.get("anchors")
    try:
        table = pq.read_table(artifact.path / "anchors.parquet")
        ids = table["user_id"].to_pylist()
        embeddings = np.array(table["embedding"].to_pylist(), dtype=np.float32)
        center = np.load(artifact.path / "center.npy", allow_pickle=False)
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        yield f"anchors.parquet or center.npy cannot be read: {error}"
        return
    if len(ids) != anchors or len(set(ids)) != len(ids):
        yield f"anchors.parquet names {len(ids)} anchors, {len(set(ids))} of them different; wanted {anchors} different"
    if embeddings.ndim != 2 or center.shape != embeddings.shape[1:] or not np.isfinite(center).all():
        yield f"embeddings {embeddings.shape} and centre {center.shape} do not fit, or the centre is not finite"
        return
    lengths = np.linalg.norm(embeddings, axis=1)
    if (wrong := ~(np.abs(lengths - 1) <= UNIT_TOLERANCE)).any():
        yield f"embeddings that are not of length 1: {_slots(torch.from_numpy(wrong))}"
    for name in ("losses", "items"):
        if name in facts and _length(facts[name]) != anchors:
            yield f"the manifest holds {name} of {_length(facts[name])} anchors, wanted {anchors}"


def _length(values: Any) -> int:
    return len(values) if isinstance(values, list) else 0


def _slots(wrong: torch.Tensor) -> str:
    slots = wrong.nonzero().flatten().tolist()
    more = f" and {len(slots) - 8} more" if len(slots) > 8 else ""
    return f"anchor{'s' if len(slots) > 1 else ''} {', '.join(map(str, slots[:8]))}{more} (counted from 0)"
