"""One LoRA adapter as plain tensors, and its PEFT folder on disk. Knows no model: module names are the only link."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save
from torch import Tensor

_PREFIX = "base_model.model."
_SIDES = (".lora_A.weight", ".lora_B.weight")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """The two factors of one module: ΔW = scale · up @ down."""

    down: Float[Tensor, "rank fan_in"]
    up: Float[Tensor, "fan_out rank"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A LoRA: one pair of factors for each adapted module, all of one rank."""

    factors: Mapping[str, Factors]
    """Module name in the base model (`bert.encoder.layer.0.attention.self.query`) to its factors."""
    scale: float
    """α / r, the number that multiplies every up @ down."""

    @property
    def rank(self) -> int:
        return next(iter(self.factors.values())).down.shape[0]

    def delta(self, module: str) -> Float[Tensor, "fan_out fan_in"]:
        """What the adapter adds to the module's weight, as a dense matrix."""
        return self.scale * self.factors[module].up @ self.factors[module].down


def to_bytes(adapter: Adapter) -> bytes:
    """The factors as bfloat16 in safetensors form, which is what keeping a user costs.

    The scale is kept beside them by whoever keeps the bytes.
    """
    sides = {f"{m}.down": f.down for m, f in adapter.factors.items()}
    sides |= {f"{m}.up": f.up for m, f in adapter.factors.items()}
    return save({name: side.detach().to("cpu", torch.bfloat16).contiguous() for name, side in sides.items()})


def from_bytes(tensors: bytes, scale: float) -> Adapter:
    """The adapter that `to_bytes` wrote, in float32. Raises ValueError for what is none."""
    try:
        sides = {name: side.float() for name, side in load(tensors).items()}
        modules = sorted(name.removesuffix(".down") for name in sides if name.endswith(".down"))
        factors = {m: Factors(down=sides[f"{m}.down"], up=sides[f"{m}.up"]) for m in modules}
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"these bytes hold no adapter in safetensors form: {error}") from error
    return Adapter(factors=factors, scale=scale)


def as_kept(adapter: Adapter) -> Adapter:
    """The adapter with the rounding that keeping it brings, in float32."""
    return from_bytes(to_bytes(adapter), adapter.scale)


def save_peft(adapter: Adapter, folder: str | Path, *, base_model: str) -> Path:
    """Write the adapter as a PEFT folder (adapter_config.json, adapter_model.safetensors), the config last.

    `base_model` is the name or path that PEFT records as `base_model_name_or_path`; none where it is empty.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for module, factors in adapter.factors.items():
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = factors.down.detach().cpu().contiguous()
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = factors.up.detach().cpu().contiguous()
    alpha = float(adapter.scale * adapter.rank)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model or None,
        "r": adapter.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "target_modules": target_names(adapter.factors),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    # save_file would make a file that only its owner may read; a server may run as somebody else.
    (folder / "adapter_model.safetensors.tmp").write_bytes(save(tensors, metadata={"format": "pt"}))
    (folder / "adapter_model.safetensors.tmp").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json.tmp").write_text(json.dumps(config, indent=2))
    (folder / "adapter_config.json.tmp").rename(folder / "adapter_config.json")
    return folder


def target_names(modules: Iterable[str]) -> list[str]:
    """The modules as PEFT's `target_modules`: last names where every block has each of them, else whole names.

    Whoever loads an adapter takes either; a last name means that layer of every block, so it must be true of all.
    """
    numbers: dict[str, set[int]] = {}  # a module without its block's number -> the numbers it stands in
    for module in modules:
        block = re.search(r"\.(\d+)\.", module)
        numbers.setdefault(re.sub(r"\.\d+\.", ".#.", module, count=1), set()).add(int(block[1]) if block else -1)
    blocks = set(range(max(max(found) for found in numbers.values()) + 1))
    is_everywhere = all(found == blocks for found in numbers.values())
    return sorted({m.rsplit(".", 1)[-1] for m in modules}) if is_everywhere and blocks else sorted(modules)


def load_peft(folder: str | Path) -> Adapter:
    """The adapter of a PEFT folder.

    Raises ValueError for what cannot be held as plain factors of one rank: another PEFT type, DoRA, biases,
    per-module ranks, a missing factor, a shape that does not fit, or a value that is not finite.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
    except (FileNotFoundError, json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"{folder} is not a PEFT adapter in safetensors form: {error}") from error
    unwanted = [key for key in ("use_dora", "rank_pattern", "alpha_pattern", "layer_replication") if config.get(key)]
    if config.get("peft_type") != "LORA" or unwanted or config.get("bias", "none") != "none":
        raise ValueError(
            f"{folder} holds {config.get('peft_type')} with {unwanted or config.get('bias')}; a bank takes plain LoRA "
            "(one rank, no bias, no DoRA); export it merged or train it again without"
        )
    rank = int(config["r"])
    alpha = float(config["lora_alpha"])
    scale = alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
    try:
        return Adapter(factors=_peft_factors(tensors, rank), scale=scale)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def peft_from_bytes(tensors: bytes, *, rank: int, alpha: float) -> Adapter:
    """The adapter in the bytes of PEFT's adapter_model.safetensors, whoever sent them.

    Raises ValueError as `load_peft`, and for a tensor that is no factor of a plain LoRA.
    """
    try:
        found = load(tensors)
    except (SafetensorError, KeyError, TypeError, RuntimeError) as error:  # types and shapes that torch has not
        raise ValueError(f"not in safetensors form: {error}") from error
    if strange := [name for name in found if not name.startswith(_PREFIX) or not name.endswith(_SIDES)]:
        raise ValueError(f"{len(strange)} tensors are no factors of a plain LoRA; send none of DoRA, and no biases")
    return Adapter(factors=_peft_factors(found, rank), scale=alpha / rank)


def _peft_factors(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Factors]:
    modules = sorted({key.removeprefix(_PREFIX).rsplit(".lora_", 1)[0] for key in tensors if ".lora_" in key})
    factors: dict[str, Factors] = {}
    for module in modules:
        down = tensors.get(f"{_PREFIX}{module}.lora_A.weight")
        up = tensors.get(f"{_PREFIX}{module}.lora_B.weight")
        if down is None or up is None:
            raise ValueError(f"module {module} lacks lora_A or lora_B")
        if down.dtype not in _DTYPES or up.dtype not in _DTYPES:
            raise ValueError(f"{module} has factors of {down.dtype} and {up.dtype}, wanted 16, 32 or 64 bit floats")
        if down.ndim != 2 or up.ndim != 2 or down.shape[0] != rank or up.shape[1] != rank:
            raise ValueError(f"{module} has factors {tuple(down.shape)} and {tuple(up.shape)}, not rank {rank}")
        if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
            raise ValueError(f"{module} holds values that are not finite")
        factors[module] = Factors(down=down, up=up)
    if not factors:
        raise ValueError("there are no LoRA factors")
    return factors
