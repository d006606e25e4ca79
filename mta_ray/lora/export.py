"""An adapter for other engines: one PEFT folder whose ΔW is the adapter's, at a rank that vLLM takes."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

import torch
from torch.nn.functional import pad

from mta_ray.lora.adapter import Adapter, Factors, save_peft
from mta_ray.lora.fusion import fuse

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as --max-lora-rank; an adapter's own rank may be any up to that."""


def vllm_rank(rank: int) -> int | None:
    """The smallest --max-lora-rank that takes an adapter of this rank; None where it is beyond all of them."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


def padded(adapter: Adapter, rank: int) -> Adapter:
    """The same ΔW at a higher rank, with directions that are zero. The scale stays, so that PEFT's α grows with r."""
    more = rank - adapter.rank
    if more < 0:
        raise ValueError(f"the adapter has rank {adapter.rank}, which cannot be padded to {rank}")
    return Adapter(
        factors={
            module: Factors(down=pad(factors.down, (0, 0, 0, more)), up=pad(factors.up, (0, more)))
            for module, factors in adapter.factors.items()
        },
        scale=adapter.scale,
    )


def export(adapter: Adapter, out: str | Path, *, base_model: str = "", pad_rank: bool = False) -> Path:
    """Write the adapter to the new folder `out` for PEFT and vLLM, whole or not at all.

    The scale is multiplied into `up`, so that α is r, a whole number. Raises ValueError where `out` holds something, or
    the adapter holds what is not finite.
    """
    if "://" in str(out):
        raise ValueError(f"{out} is a URL, and PEFT and vLLM load folders; give a folder, and copy it from there")
    folder = Path(out).expanduser().absolute()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} is there already and is not replaced; give another --out, or remove it")
    whole = fuse([adapter], [1.0])
    if pad_rank:
        rank = vllm_rank(whole.rank)
        if rank is None:
            raise ValueError(f"the adapter has rank {whole.rank}, vLLM takes at most {VLLM_RANKS[-1]}; do not pad it")
        whole = padded(whole, rank)
    if not all(torch.isfinite(side).all() for f in whole.factors.values() for side in (f.down, f.up)):
        raise ValueError("the adapter holds values that are not finite; `mta bank verify` says where")
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.parent / f".{folder.name}.tmp-{secrets.token_hex(8)}"
    try:
        save_peft(whole, draft, base_model=base_model)
        os.rename(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder
