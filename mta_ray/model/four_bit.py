"""The linear layers of a model's blocks in 4 bits (NF4, its scales quantised once more), for a base that stays frozen.

A model in 16 or 32 bits enters, on the CPU; what leaves computes in the same dtype. The only file that knows
bitsandbytes, which is imported when the first model is quantised.
"""

from __future__ import annotations

import hashlib
import importlib.util
from typing import Literal

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

Quantization = Literal["none", "nf4"]
"""How the frozen weights are kept."""


def check_available() -> None:
    """Raise ImportError, with what to install, where 4-bit weights cannot be had."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError("4-bit weights need bitsandbytes, which is not installed: pip install 'mta-ray[4bit]'")


def quantize(model: PreTrainedModel, *, device: str) -> None:
    """Put 4-bit layers in place of the linear ones inside the model's repeated blocks, in place.

    Each layer moves to `device` and is quantised there, one after the other; the rest (embeddings, norms, whatever
    stands before and after the blocks, the output layer among it) moves as it is. Raises ImportError without
    bitsandbytes, and ValueError for a model whose layers it does not know.
    """
    check_available()
    import bitsandbytes

    found = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    for name, plain in found:
        if not is_inside_blocks(name) or is_four_bit(plain):
            continue
        if isinstance(plain, Conv1D):
            raise ValueError(
                f"{model.config.model_type}: {name} keeps its weight as (in, out), which has no 4-bit form here; "
                "load it with quantization none"
            )
        layer = bitsandbytes.nn.Linear4bit(
            plain.in_features,
            plain.out_features,
            bias=plain.bias is not None,
            compute_dtype=plain.weight.dtype,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        # Else the first pass without gradients on some CPUs lays the weights out anew, in a form without gradients.
        layer.support_avx512bf16_for_cpu = False
        layer.weight = bitsandbytes.nn.Params4bit(
            plain.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer
        )
        layer.bias = plain.bias
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.to(device).train(plain.training))
    model.to(device)  # type: ignore[arg-type]


def is_inside_blocks(name: str) -> bool:
    """Whether a module of this full name lies in one of the model's repeated, numbered blocks."""
    return any(part.isdigit() for part in name.split("."))


def is_four_bit(layer: nn.Module) -> bool:
    """Whether the layer's weight is kept in 4 bits: it cannot be read, written or merged into as a matrix."""
    return hasattr(getattr(layer, "weight", None), "quant_state")


def four_bit_mark(fingerprint: str) -> str:
    """The fingerprint of the model that quantising one with this fingerprint gives.

    Not a hash of the 4-bit values: those differ in a last bit from one kind of device to the next.
    """
    return hashlib.sha256(f"{fingerprint} nf4".encode()).hexdigest()
