"""From logits to each row's next token. A row's token depends on its own logits, settings and seed alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mta_ray.model.settings import Sampling


@dataclass(frozen=True, slots=True)
class Choice:
    """A row's next token."""

    token: int
    is_finite: bool
    """False: the row's logits held a NaN or an infinity, and the token means nothing."""
    logprob: float | None = None
    """Of the model's own distribution (temperature 1), in nats."""
    alternatives: tuple[tuple[int, float], ...] = ()
    """The most likely tokens with their log-probabilities, best first."""


def choose_tokens(
    logits: Float[Tensor, "rows vocabulary"], rows: Sequence[Sampling], uniforms: Sequence[float]
) -> list[Choice]:
    """One choice for each row. `uniforms` are one number in [0, 1) a row, read only where temperature is above 0."""
    best, tokens = logits.max(dim=-1)
    # Rows that cut and rows that do not are drawn apart: a neighbour must not change the order in which a row's
    # probabilities are summed.
    for cuts in (False, True):
        drawn = [i for i, row in enumerate(rows) if row.temperature > 0 and (row.top_p < 1) == cuts]
        if drawn:
            tokens[drawn] = _draw(logits[drawn], [rows[i] for i in drawn], [uniforms[i] for i in drawn], cuts)
    packed = torch.stack([tokens.double(), torch.isfinite(best).double()]).tolist()  # one transfer from the device
    choices = [Choice(int(t), bool(ok)) for t, ok in zip(*packed, strict=True)]
    return _with_logprobs(logits, rows, choices) if any(row.logprobs is not None for row in rows) else choices


def _draw(logits: Tensor, rows: Sequence[Sampling], uniforms: Sequence[float], cuts: bool) -> Tensor:
    column = {"dtype": torch.float32, "device": logits.device}
    # The largest logit is taken off first, so that a tiny temperature cannot overflow; one that float32 would round to
    # 0 is as good as this.
    temperature = torch.tensor([[max(row.temperature, 1e-30)] for row in rows], **column)  # type: ignore[arg-type]
    shares = torch.softmax((logits - logits.amax(-1, keepdim=True)) / temperature, dim=-1)
    order: Tensor | None = None
    if cuts:
        shares, order = shares.sort(dim=-1, descending=True, stable=True)
        top_p = torch.tensor([[row.top_p] for row in rows], **column)  # type: ignore[arg-type]
        shares = shares.masked_fill(shares.cumsum(-1) - shares >= top_p, 0.0)
    sums = shares.cumsum(-1)
    points = torch.tensor([[u] for u in uniforms], **column) * sums[:, -1:]  # type: ignore[arg-type]
    # right=True: a token of probability 0 has the same sum as its predecessor and is stepped over.
    place = torch.searchsorted(sums, points, right=True).clamp(max=logits.shape[1] - 1)
    # A uniform that rounds to 1 in float32 falls off the end, onto a token that was cut: then the last that was not.
    last = (shares > 0).long().cumsum(-1).argmax(-1, keepdim=True)
    place = torch.minimum(place, last)
    return (place if order is None else order.gather(-1, place))[:, 0]


def _with_logprobs(logits: Tensor, rows: Sequence[Sampling], choices: Sequence[Choice]) -> list[Choice]:
    out = list(choices)
    for i, (row, choice) in enumerate(zip(rows, choices, strict=True)):
        if row.logprobs is None or not choice.is_finite:
            continue
        nats = torch.log_softmax(logits[i], dim=-1)
        values, ids = nats.topk(row.logprobs)
        alternatives = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        out[i] = Choice(choice.token, True, float(nats[choice.token]), alternatives)
    return out
