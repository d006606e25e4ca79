"""Keys and values of the requests under way, and the attention that reads them. The only file that knows how
transformers calls attention; `tests/model/test_row_cache.py` tells when a version changes that.

Tokens of one step are packed as (1, tokens): first one token of each decoding row, rows 0, 1, 2 ..., then the prompt
chunks of the rows that follow. Every request owns a row of the cache, and running rows are always the first ones, so
that decoding reads plain slices: no gather, no page table, and no request's scores over another's keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

ATTENTION = "mta_rows"
"""Name of our attention in transformers' register."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Part of one request's tokens in a step."""

    row: int
    past: int
    """Tokens of the row that are in the cache before the step."""
    tokens: int


class RowCache:
    """`rows` × `tokens` keys and values for every layer, allocated once."""

    def __init__(self, model: PreTrainedModel, *, rows: int, tokens: int) -> None:
        attach(model, tokens)
        config = model.config.get_text_config(decoder=True)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (2, config.num_hidden_layers, rows, tokens, heads, width)
        # Zeros, not empty: what is masked still is multiplied, and a NaN times zero is a NaN.
        self.pool = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self.tokens = tokens
        self.rows = rows
        flat = self.pool.view(2, config.num_hidden_layers, rows * tokens, heads, width)
        self._flat = [(flat[0, layer], flat[1, layer]) for layer in range(config.num_hidden_layers)]
        self._own = [(self.pool[0, layer], self.pool[1, layer]) for layer in range(config.num_hidden_layers)]

    @property
    def bytes(self) -> int:
        return self.pool.numel() * self.pool.element_size()

    def release(self) -> None:
        """Give the memory back; the cache is of no use any more."""
        self.pool = self.pool.new_zeros(0)
        self._flat, self._own = [], []

    def move(self, source: int, target: int, tokens: int) -> None:
        """The first `tokens` of row `source` overwrite those of row `target`."""
        self.pool[:, :, target, :tokens].copy_(self.pool[:, :, source, :tokens])

    def wipe(self, row: int) -> None:
        """Zero a row that may hold values that are not finite."""
        self.pool[:, :, row].zero_()


class StepPlan:
    """What attention has to know of one packed step; made once, read by every layer."""

    def __init__(self, cache: RowCache, decoding: Sequence[int], chunks: Sequence[Chunk], places: Tensor) -> None:
        """`decoding`: tokens in the cache of rows 0, 1, ... which each add one. `places`: (tokens,) where each packed
        token's key goes, row · cache.tokens + position."""
        self.cache = cache
        self.places = places
        self.chunks = chunks
        self.layers_read = 0
        device, dtype = cache.pool.device, cache.pool.dtype
        self.decoding = len(decoding)
        self.longest = max(decoding, default=0) + 1
        self.mask: Tensor | None = None
        if any(past + 1 != self.longest for past in decoding):
            seen = torch.tensor(decoding, device=device)[:, None]  # (rows, 1)
            hidden = torch.arange(self.longest, device=device)[None, :] > seen
            self.mask = _additive(hidden, dtype)[:, None, None, :]  # (rows, 1, 1, longest)
        self.chunk_masks = [_causal(chunk, device, dtype) for chunk in chunks]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Keys and values (1, heads, tokens, width) go into the cache; out come (1, tokens, heads, width)."""
        self.layers_read += 1
        flat_keys, flat_values = self.cache._flat[layer]
        flat_keys.index_copy_(0, self.places, key[0].transpose(0, 1))
        flat_values.index_copy_(0, self.places, value[0].transpose(0, 1))
        keys, values = self.cache._own[layer]  # (rows, tokens, kv_heads, width)
        heads, groups, width = query.shape[1], query.shape[1] // key.shape[1], query.shape[3]
        parts = []

        # 1. decoding rows: one query each; query heads that share a key head are laid side by side as queries
        if n := self.decoding:
            q = query[0, :, :n].transpose(0, 1).reshape(n, heads // groups, groups, width)
            k, v = keys[:n, : self.longest].transpose(1, 2), values[:n, : self.longest].transpose(1, 2)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, scale=scaling)
            parts.append(out.reshape(n, heads, width))

        # 2. prompt chunks: each over its own row
        start = self.decoding
        for chunk, mask in zip(self.chunks, self.chunk_masks, strict=True):
            t, total = chunk.tokens, chunk.past + chunk.tokens
            q = query[:, :, start : start + t]
            k = keys[chunk.row, None, :total].transpose(1, 2)
            v = values[chunk.row, None, :total].transpose(1, 2)
            if groups > 1:
                k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling)
            parts.append(out[0].transpose(0, 1))
            start += t
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[None]


def forward(model: PreTrainedModel, ids: Tensor, positions: Tensor, keep: Tensor, plan: StepPlan) -> Tensor:
    """Logits (len(keep), vocabulary) in float32 of the packed tokens whose numbers are in `keep`."""
    # A mask of four dimensions is passed on as it is, so none is built; ours reads the plan instead.
    no_mask = ids.new_zeros((1, 1, 1, 1), dtype=torch.bool)
    out = model(
        input_ids=ids[None],
        position_ids=positions[None],
        attention_mask=no_mask,
        use_cache=False,
        logits_to_keep=keep,
        row_plan=plan,
    )
    if plan.layers_read != len(plan.cache.pool[0]):
        raise RuntimeError(
            f"{plan.layers_read} of {len(plan.cache.pool[0])} layers read the plan of the step: the attention of the "
            f"model is {model.config._attn_implementation!r}, the engine needs {ATTENTION!r}"
        )
    return out.logits[0].float()


def attach(model: PreTrainedModel, tokens: int) -> None:
    """Make the model call our attention. Forward passes without a plan (training, generate) stay what they were.

    Raises ValueError for a model whose attention is not plain causal attention over all `tokens`.
    """
    config = model.config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if (window is not None and window < tokens) or kinds - {"sliding_attention"}:
        raise ValueError(
            f"{config.model_type} attends over a window of {window} or in other ways ({sorted(kinds)}), this engine "
            f"over all {tokens} tokens; lower max_tokens or take a model with full attention"
        )
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation(ATTENTION)
    if model.config._attn_implementation != ATTENTION:
        raise ValueError(f"{config.model_type} does not let its attention be replaced; take another base model")


_REFUSED = ("softcap", "s_aux", "position_bias")
"""Arguments of attentions that are not plain: to ignore them would be to answer wrongly."""


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    plan: StepPlan | None = kwargs.pop("row_plan", None)
    if plan is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if refused := [name for name in _REFUSED if kwargs.get(name) is not None]:
        raise ValueError(f"the model's attention uses {refused}, which this engine does not compute")
    return plan.attend(module.layer_idx, query, key, value, kwargs.get("scaling")), None  # type: ignore[arg-type]


def _causal(chunk: Chunk, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    if chunk.past == 0:
        return None
    here = torch.arange(chunk.past, chunk.past + chunk.tokens, device=device)[:, None]
    hidden = torch.arange(chunk.past + chunk.tokens, device=device)[None, :] > here
    return _additive(hidden, dtype)  # (tokens, past + tokens)


def _additive(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
