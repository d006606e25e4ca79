"""The base models that benchmarks run: the embedded one, or a random Llama of some shape."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from mta_ray.model.backbone import EMBEDDED, Backbone, embedded_path, load_backbone

SHAPES: Mapping[str, dict[str, int]] = {
    "64": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "vocab_size": 4096},
    "256": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 8}
    | {"num_key_value_heads": 4, "vocab_size": 8192},
    "wide": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8}
    | {"intermediate_size": 1376, "vocab_size": 32000},
    "576": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 9}
    | {"num_key_value_heads": 3, "vocab_size": 8192},
    "8b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    | {"intermediate_size": 14336, "vocab_size": 128256},
}
"""Random Llamas by name. Beside them `default`, the embedded base model."""


def random_base(shape: str, *, device: str = "cpu", dtype: str = "float32", seed: int = 0) -> Backbone:
    """A Llama of that shape with random weights, made on its device; `default` is the embedded base model instead.

    Raises ValueError for a shape that is not there.
    """
    if shape == "default":
        return load_backbone(EMBEDDED, device=device, dtype=dtype, seed=seed)
    if shape not in SHAPES:
        raise ValueError(f"no base model for benchmarks is called {shape!r}; choose default or {', '.join(SHAPES)}")
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape], max_position_embeddings=2048, pad_token_id=0))
    finally:
        torch.set_default_dtype(before)
    return Backbone(model.eval(), any_tokenizer(), shape, "random")


def any_tokenizer() -> PreTrainedTokenizerBase:
    """For random models, of which a batch wants to know what to pad with, and nothing else."""
    return AutoTokenizer.from_pretrained(embedded_path())
