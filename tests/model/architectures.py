"""A tiny random model of each architecture that the tests meet, all with one vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from mta_ray.model.backbone import Backbone, embedded_path, fingerprint

VOCABULARY = 30522
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 101,
    "eos_token_id": 102,
}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 8}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "mistral": _GROUPED | {"sliding_window": 16},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": _GROUPED,
    "gemma2": _GROUPED | {"query_pre_attn_scalar": 8, "sliding_window": 16},
    "phi3": {"num_key_value_heads": 2},
    "phi": {},
    "gpt_neox": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_bigcode": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "multi_query": True},
    "falcon": {"new_decoder_architecture": False, "multi_query": True, "bias": False},
    "bloom": {"n_layer": 2, "n_head": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bert": {"is_decoder": True},
}
"""Model type to what its config needs beside the sizes that most share."""


def random_model(model_type: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **more: Any) -> PreTrainedModel:
    """The architecture with random weights, in evaluation mode; the same seed gives the same model.

    `more` goes into the config.
    """
    torch.manual_seed(seed)
    sizes = _SIZES | ARCHITECTURES[model_type] | more
    if "n_embd" in sizes:
        sizes = {k: v for k, v in sizes.items() if k in ("vocab_size", *ARCHITECTURES[model_type]) or "token_id" in k}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)  # else what layers add is too small to see
    return model.to(dtype).eval()


def random_backbone(model_type: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **more: Any) -> Backbone:
    """The same with the embedded model's tokenizer."""
    model = random_model(model_type, dtype=dtype, seed=seed, **more)
    return Backbone(model, AutoTokenizer.from_pretrained(embedded_path()), model_type, fingerprint(model))
