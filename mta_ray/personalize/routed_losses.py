"""The losses of many rows, each through its own route over one shelf: what learned and searched routes look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from mta_ray.lora.slots import Routing
from mta_ray.model.backbone import RoutedModel
from mta_ray.model.batches import Tokens, collate, row_losses
from mta_ray.personalize.lanes import by_length, cpu_tokens, parts_of


def routed_losses(
    routed: RoutedModel, shelf: str, rows: Sequence[Tokens], routing: Callable[[Tensor], Routing]
) -> Iterator[tuple[Tensor, Tensor]]:
    """(row numbers, each one's summed loss on its target tokens in nats), batch by batch, every row once.

    `routing` gives the routes of rows by their numbers (int64, on the model's device). Losses are differentiable in
    what it computes from, so that a caller who goes backward at once holds the activations of one batch only.
    """
    batches = by_length(list(enumerate(rows)), _length)
    if routed.device.type == "cpu":
        batches = [part for batch in batches for part in parts_of(batch, _length, cpu_tokens(routed))]
    for batch in batches:
        numbers = torch.tensor([number for number, _ in batch], device=routed.device)
        with routed.router.using(**{shelf: routing(numbers)}):
            yield numbers, row_losses(routed.model, collate(routed.backbone, [row for _, row in batch], routed.device))


def _length(row: tuple[int, Tokens]) -> int:
    return len(row[1].ids)
