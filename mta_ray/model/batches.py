"""From prompts and targets to padded batches, and the loss of each row on its target tokens only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from mta_ray.model.backbone import Backbone


@dataclass(frozen=True, slots=True)
class Tokens:
    """One training sequence: prompt and target, the target closed by the end token."""

    ids: tuple[int, ...]
    target_tokens: int
    """How many of the last ids are the target."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Left-padded rows, so that all targets lie at the end and logits are computed only there."""

    ids: Tensor
    """(rows, tokens) int64."""
    attention: Tensor
    """(rows, tokens) int64, 0 on padding."""
    labels: Tensor
    """(rows, keep) int64: what the last `keep` positions should predict, -100 elsewhere."""

    @property
    def positions(self) -> Tensor:
        return (self.attention.cumsum(-1) - 1).clamp(min=0)


def prompt_ids(backbone: Backbone, prompt: str, *, room: int = 0) -> list[int]:
    """The prompt's tokens with the model's opening token and no closing one; cut on the left (the oldest context goes)
    so that `room` tokens are left for an answer."""
    tokenizer = backbone.tokenizer
    ids = whole_prompt_ids(backbone, prompt)
    limit = backbone.max_tokens - room
    has_opening = bool(ids) and ids[0] in (tokenizer.bos_token_id, tokenizer.cls_token_id)
    if len(ids) > limit:
        ids = ids[:1] + ids[len(ids) - limit + 1 :] if has_opening else ids[-limit:]
    return ids


def whole_prompt_ids(backbone: Backbone, prompt: str) -> list[int]:
    """The prompt's tokens with the model's opening token and no closing one, however many."""
    tokenizer = backbone.tokenizer
    ids = list(tokenizer(prompt, verbose=False)["input_ids"])
    if ids and ids[-1] in (tokenizer.sep_token_id, tokenizer.eos_token_id):
        ids.pop()
    return ids


def tokenise(backbone: Backbone, prompt: str, target: str, *, max_target_tokens: int = 64) -> Tokens:
    """A training sequence. A target longer than `max_target_tokens` is cut and still closed."""
    answer = backbone.tokenizer(" " + target, add_special_tokens=False)["input_ids"][:max_target_tokens]
    answer = [*answer, backbone.end_id]
    before = prompt_ids(backbone, prompt, room=len(answer))
    # Without a prompt, and a tokenizer that opens with nothing, the first token stands after none that predicts it.
    return Tokens(ids=(*before, *answer), target_tokens=len(answer) - (not before))


def collate(backbone: Backbone, rows: Sequence[Tokens], device: torch.device | str = "cpu") -> Batch:
    """Rows of any lengths as one left-padded batch."""
    width, keep = max(len(row.ids) for row in rows), max(row.target_tokens for row in rows)
    ids = torch.full((len(rows), width), int(backbone.tokenizer.pad_token_id))  # type: ignore[arg-type]
    attention = torch.zeros(len(rows), width, dtype=torch.int64)
    labels = torch.full((len(rows), keep), -100)
    for i, row in enumerate(rows):
        ids[i, width - len(row.ids) :] = torch.tensor(row.ids)
        attention[i, width - len(row.ids) :] = 1
        labels[i, keep - row.target_tokens :] = torch.tensor(row.ids[len(row.ids) - row.target_tokens :])
    return Batch(ids.to(device), attention.to(device), labels.to(device))


def row_losses(model: PreTrainedModel, batch: Batch) -> Float[Tensor, " rows"]:
    """Summed cross entropy of each row's target tokens, in nats. The caller has set the router, if there is one."""
    keep = batch.labels.shape[1]
    out = model(
        input_ids=batch.ids,
        attention_mask=batch.attention,
        position_ids=batch.positions,
        use_cache=False,
        logits_to_keep=keep + 1,
    )
    logits = out.logits[:, :-1].float()  # (rows, keep, vocabulary)
    loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100, reduction="none")
    return loss.view_as(batch.labels).sum(dim=1)
