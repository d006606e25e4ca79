"""One LoRA adapter as plain tensors, and its PEFT folder on disk. Knows no model: module names are the only link."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor

_PREFIX = "base_model.model."


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
    """The factors in safetensors form; the scale is kept beside them by whoever keeps the bytes."""
    sides = {f"{m}.down": f.down.contiguous() for m, f in adapter.factors.items()}
    return save(sides | {f"{m}.up": f.up.contiguous() for m, f in adapter.factors.items()})


def from_bytes(tensors: bytes, scale: float) -> Adapter:
    """The adapter that `to_bytes` wrote. Raises ValueError for what is none."""
    try:
        sides = load(tensors)
        modules = sorted(name.removesuffix(".down") for name in sides if name.endswith(".down"))
        factors = {m: Factors(down=sides[f"{m}.down"], up=sides[f"{m}.up"]) for m in modules}
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"these bytes hold no adapter in safetensors form: {error}") from error
    return Adapter(factors=factors, scale=scale)


def save_peft(adapter: Adapter, folder: str | Path, *, base_model: str) -> Path:
    """Write the adapter as a PEFT folder (adapter_config.json, adapter_model.safetensors), the config last.

    `base_model` is the name or path that PEFT records as `base_model_name_or_path`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for module, factors in adapter.factors.items():
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = factors.down.detach().cpu().contiguous()
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = factors.up.detach().cpu().contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": adapter.rank,
        "lora_alpha": adapter.scale * adapter.rank,
        "target_modules": sorted(adapter.factors),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    save_file(tensors, folder / "adapter_model.safetensors.tmp", metadata={"format": "pt"})
    (folder / "adapter_model.safetensors.tmp").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json.tmp").write_text(json.dumps(config, indent=2))
    (folder / "adapter_config.json.tmp").rename(folder / "adapter_config.json")
    return folder


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
    modules = sorted({key.removeprefix(_PREFIX).rsplit(".lora_", 1)[0] for key in tensors if ".lora_" in key})
    factors: dict[str, Factors] = {}
    for module in modules:
        down = tensors.get(f"{_PREFIX}{module}.lora_A.weight")
        up = tensors.get(f"{_PREFIX}{module}.lora_B.weight")
        if down is None or up is None:
            raise ValueError(f"{folder}: module {module} lacks lora_A or lora_B")
        if down.ndim != 2 or up.ndim != 2 or down.shape[0] != rank or up.shape[1] != rank:
            raise ValueError(
                f"{folder}: {module} has factors {tuple(down.shape)} and {tuple(up.shape)}, not rank {rank}"
            )
        if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
            raise ValueError(f"{folder}: {module} holds values that are not finite")
        factors[module] = Factors(down=down, up=up)
    if not factors:
        raise ValueError(f"{folder} holds no LoRA factors")
    return Adapter(factors=factors, scale=scale)
