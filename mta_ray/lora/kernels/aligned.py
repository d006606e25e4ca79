"""Row i reads slot i of what it is given, and nothing else: no copies of factors, and no sum over copies backward."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def aligned(
    x: Float[Tensor, "rows tokens fan_in"],
    down: Float[Tensor, "rows rank fan_in"],
    up: Float[Tensor, "rows rank fan_out"],
    slots: Int[Tensor, "rows 1"],
    weights: Float[Tensor, "rows 1 #rank"],
) -> Float[Tensor, "rows tokens fan_out"]:
    """As `reference` with a piece of the shelf, row i's slot being its i-th; `slots` says nothing more."""
    return torch.bmm(torch.bmm(x, down.transpose(1, 2)) * weights, up)
