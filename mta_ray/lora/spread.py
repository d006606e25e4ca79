"""The routes of the rows that are being decoded, scattered once for all layers: persistent device tensors.

A direction is one rank of one slot of one joined shelf. What a layer does with a row is a vector over directions,
mostly zeros, that depends on the route alone (and on the layer only where a route has coefficients): so it is written
when a row is taken, not in each layer of each step. Addresses never change, so that a captured CUDA graph stays valid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mta_ray.lora.slots import Route, Shelf, SlotLinear


class SpreadTable:
    """A weight for each (layer, row, direction), and a buffer of the same for each token of a packed step."""

    def __init__(
        self, layers: Mapping[str, SlotLinear], shelves: Sequence[str], *, rows: int, tokens: int, coefficients: bool
    ) -> None:
        """Joins the shelves of all layers. `coefficients`: room for routes whose weights differ between layers."""
        for layer in layers.values():
            layer.join(shelves)
        self._modules = list(layers)
        first = next(iter(layers.values()))
        self._rooms: dict[str, tuple[int, Shelf]] = {}
        directions = 0
        for name in shelves:
            room: Shelf = first.shelves[name]  # type: ignore[assignment]
            self._rooms[name] = (directions, room)
            directions += room.down.shape[0] * room.down.shape[1]
        depth = len(layers) if coefficients else 1
        like = self._rooms[shelves[0]][1].down
        self._rows = like.new_zeros(depth, rows, directions, requires_grad=False)
        self._tokens = like.new_zeros(depth, tokens, directions, requires_grad=False)
        self._routed = [False] * rows

    def check(self, routes: Mapping[str, Route]) -> None:
        """Raise ValueError for a route that the shelves cannot serve."""
        for name, route in routes.items():
            if name not in self._rooms:
                raise ValueError(f"the model has no shelf {name!r}; its shelves: {sorted(self._rooms)}")
            slots = self._rooms[name][1].down.shape[0]
            if not all(0 <= slot < slots for slot in route.slots):
                raise ValueError(f"route over slots {route.slots} of shelf {name!r}, which has {slots}")
            if route.coefficients and len(self._rows) == 1:
                raise ValueError("the route has coefficients; make the engine with coefficients=True")

    def put(self, row: int, routes: Mapping[str, Route]) -> None:
        """Write a row's routes. No routes: the base model alone."""
        weights = torch.zeros(self._rows.shape[0], self._rows.shape[2])  # (layers, directions)
        for name, route in routes.items():
            start, room = self._rooms[name]
            slots, rank = room.down.shape[:2]
            shelf = weights[:, start : start + slots * rank].view(-1, slots, rank)
            for j, (slot, weight) in enumerate(zip(route.slots, route.weights, strict=True)):
                if route.coefficients:
                    each = torch.stack([route.coefficients[module][j] for module in self._modules])  # (layers, rank)
                    shelf[:, slot] += weight * room.scale * each.float().cpu()
                else:
                    shelf[:, slot] += weight * room.scale
        self._rows[:, row].copy_(weights)
        self._routed[row] = bool(routes)

    def move(self, source: int, target: int) -> None:
        """Row `target` becomes what row `source` is."""
        self._rows[:, target].copy_(self._rows[:, source])
        self._routed[target] = self._routed[source]

    def of_rows(self, rows: int) -> Float[Tensor, "layers rows directions"] | None:
        """The spread of a step of one token for each of the first rows; None where none of them has a route."""
        return self._rows[:, :rows] if any(self._routed[:rows]) else None

    def of_tokens(
        self, rows: int, row_of_token: Int[Tensor, " tokens"]
    ) -> Float[Tensor, "layers tokens directions"] | None:
        """The same for packed tokens of the first rows, in any order."""
        if not any(self._routed[:rows]):
            return None
        out = self._tokens[:, : len(row_of_token)]
        return out.copy_(self._rows[:, row_of_token])
