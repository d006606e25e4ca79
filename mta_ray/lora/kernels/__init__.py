"""Ways to compute the same sum over a row's adapters; `choose` picks one by shape alone, but for `aligned`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mta_ray.lora.kernels.aligned import aligned
from mta_ray.lora.kernels.dense import dense
from mta_ray.lora.kernels.gather import gather
from mta_ray.lora.kernels.reference import reference

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

__all__ = ["Kernel", "aligned", "choose", "dense", "gather", "reference"]


def choose(*, rows: int, k: int, slots: int) -> Kernel:
    """The form to use: dense reads every slot once, gather reads k slots for each row.

    Dense wins once the rows together would read the shelf more than once. One rule, in this one place.
    """
    return dense if rows * k >= 2 * slots and slots <= 64 else gather
