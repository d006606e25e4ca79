"""A frozen linear layer with shelves of adapter slots; every row of a batch chooses its own slots and weights.

One layer, three uses: a pack in training (one slot a row, weight 1), a fused user (k slots, softmax weights), and a
user's stack (one more slot with weight 1 on another shelf). Routed equals merged into the weights equals PEFT.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mta_ray.lora.adapter import Adapter, Factors
from mta_ray.lora.kernels import Kernel, aligned, choose, gather


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Which slots of a shelf make up a user, and how much of each."""

    slots: tuple[int, ...]
    weights: tuple[float, ...]
    """One number for each slot."""
    coefficients: Mapping[str, Float[Tensor, "k rank"]] | None = None
    """Module name to one factor for each (slot, rank) pair, or (k, 1) to one for each slot; multiplies `weights`. None:
    all ones."""

    def __post_init__(self) -> None:
        if len(self.slots) != len(self.weights) or not self.slots:
            raise ValueError(
                f"a route needs as many weights as slots and at least one; got {self.slots}, {self.weights}"
            )

    @property
    def bytes(self) -> int:
        """What has to be kept for the user: 2 bytes a slot id, 2 a weight, 2 a coefficient; `as_kept` has them so."""
        extra = sum(c.numel() for c in self.coefficients.values()) if self.coefficients else 0
        return 4 * len(self.slots) + 2 * extra

    def as_kept(self) -> Route:
        """The route with its numbers rounded to float16."""
        weights = tuple(torch.tensor(self.weights, dtype=torch.float16).tolist())
        held = {module: each.half().float() for module, each in (self.coefficients or {}).items()}
        return Route(slots=self.slots, weights=weights, coefficients=held or None)


@dataclass(frozen=True, slots=True)
class Routing:
    """The routes of a batch's rows as tensors, padded to one k with weight 0 on slot 0."""

    slots: Tensor
    """(rows, k), int64."""
    weights: Tensor
    """(rows, k), the layer's dtype."""
    coefficients: Mapping[str, Tensor] | None = None
    """Module name to (rows, k, rank), or (rows, k, 1) where no route tells a slot's directions apart."""
    run: int = 1
    """So many rows after each other share a route, all through the batch: a layer may take them as one long row."""
    first: int | None = None
    """These long rows have one slot each, this one, the next one, and so on: they are a piece of the shelf."""

    @classmethod
    def of(cls, routes: Sequence[Route], *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Routing:
        """Rows in the order of `routes`."""
        k = max(len(route.slots) for route in routes)
        slots = torch.zeros(len(routes), k, dtype=torch.int64)
        weights = torch.zeros(len(routes), k, dtype=dtype)
        for row, route in enumerate(routes):
            slots[row, : len(route.slots)] = torch.tensor(route.slots)
            weights[row, : len(route.slots)] = torch.tensor(route.weights, dtype=dtype)
        with_coefficients = [route.coefficients for route in routes if route.coefficients]
        coefficients: dict[str, Tensor] = {}
        for module in with_coefficients[0] if with_coefficients else ():
            rank = max(each[module].shape[1] for each in with_coefficients)
            rows = torch.ones(len(routes), k, rank, dtype=dtype)
            for row, route in enumerate(routes):
                if route.coefficients:
                    rows[row, : len(route.slots)] = route.coefficients[module].to(dtype)
            coefficients[module] = rows.to(device)
        run = _run_of(routes)
        heads = [route.slots for route in routes[::run]]
        first = heads[0][0] if heads == [(heads[0][0] + n,) for n in range(len(heads))] else None
        return cls(slots.to(device), weights.to(device), coefficients or None, run, first)


def _run_of(routes: Sequence[Route]) -> int:
    """Length of equal runs that the routes consist of; 1: they do not, or somebody has coefficients."""
    if any(route.coefficients for route in routes):
        return 1
    run = next((n for n, route in enumerate(routes) if route != routes[0]), len(routes))
    is_even = len(routes) % run == 0 and all(route == routes[n // run * run] for n, route in enumerate(routes))
    return run if is_even else 1


@dataclass(slots=True)
class Router:
    """The one place that says which rows use which slots in the forward pass under way.

    Every SlotLinear of a model holds the same Router. Enter `using` around a forward pass; nothing else sets it.
    """

    active: Mapping[str, Routing] = field(default_factory=dict)
    """Shelf name to the routing of the batch's rows. A shelf that is not named is not used."""
    kernel: Kernel | None = None
    """A fixed kernel for tests and benchmarks; None: chosen by shape."""
    spread: Tensor | None = None
    """(layers or 1, tokens, directions): the routes of packed tokens over joined shelves (lora/spread.py)."""

    @contextmanager
    def using(self, **routings: Routing | None) -> Iterator[None]:
        before, self.active = self.active, {name: r for name, r in routings.items() if r is not None}
        try:
            yield
        finally:
            self.active = before

    @contextmanager
    def spreading(self, spread: Tensor | None) -> Iterator[None]:
        """As `using`, for tokens packed as (1, tokens) and every joined shelf at once; None: the base model alone."""
        before, self.spread = (self.active, self.spread), spread
        self.active = {}
        try:
            yield
        finally:
            self.active, self.spread = before


class Shelf(nn.Module):
    """Stacked factors of equal rank: slot s adds scale · up[s].T @ down[s] to the weight."""

    def __init__(
        self,
        *,
        slots: int,
        rank: int,
        fan_in: int,
        fan_out: int,
        scale: float,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.down = nn.Parameter(torch.zeros(slots, rank, fan_in, dtype=dtype, device=device), requires_grad=False)
        self.up = nn.Parameter(torch.zeros(slots, rank, fan_out, dtype=dtype, device=device), requires_grad=False)


class SlotLinear(nn.Module):
    """A linear layer that adds each row's adapters to its output.

    Semantics:
      y[i] = base(x[i]) + sum over shelves and j of
             weight[i,j] * scale * (x[i] @ down[slot[i,j]].T) @ up[slot[i,j]]

    Input is (rows, tokens, fan_in) with a routing of `rows` rows, or (1, tokens, fan_in) with a routing of `tokens`.
    `base` is an nn.Linear, or what says its in_features and out_features as one. With `is_flat` the input may also be
    (rows · tokens, fan_in), row after row: never the tokens that an expert was given, which nobody could tell apart.
    """

    def __init__(self, base: nn.Module, *, name: str, router: Router, number: int = 0, is_flat: bool = False) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self.number = number
        """Which of the model's adapted layers this is: its row of `Router.spread`."""
        self.router = router
        self.is_flat = is_flat
        self.shelves = nn.ModuleDict()
        self.joined: tuple[Tensor, Tensor] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """What the layer computes in; a 4-bit weight's own dtype says nothing about that."""
        return getattr(self.base, "compute_dtype", None) or self.base.weight.dtype

    def add_shelf(self, shelf: str, *, slots: int, rank: int, scale: float, dtype: torch.dtype | None = None) -> None:
        """Make (or replace) a shelf of empty slots; empty slots add nothing.

        Factors of another `dtype` than the layer's are kept in it, and read in the layer's: the small updates of
        training, which bfloat16 would round away, add up in float32.
        """
        self.shelves[shelf] = Shelf(
            slots=slots,
            rank=rank,
            fan_in=self.base.in_features,
            fan_out=self.base.out_features,
            scale=scale,
            dtype=dtype or self.dtype,
            device=self.base.weight.device,
        )
        self.joined = None

    def remove_shelf(self, shelf: str) -> None:
        """Take a shelf away with its slots."""
        del self.shelves[shelf]
        self.joined = None

    def join(self, shelves: Sequence[str]) -> None:
        """Lay the shelves' factors side by side, so that packed tokens need two matrix products for all of them.

        The shelves stay what they were: their parameters become views, and `put` writes through. Join again after a
        shelf was added or the model was moved.
        """
        rooms: list[Shelf] = [self.shelves[name] for name in shelves]  # type: ignore[misc]
        down = torch.cat([room.down.detach().flatten(0, 1) for room in rooms])  # (directions, fan_in)
        up = torch.cat([room.up.detach().flatten(0, 1) for room in rooms])  # (directions, fan_out)
        start = 0
        for room in rooms:
            slots, rank = room.down.shape[:2]
            end = start + slots * rank
            room.down.data = down[start:end].view(slots, rank, -1)
            room.up.data = up[start:end].view(slots, rank, -1)
            start = end
        self.joined = (down, up)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.router.spread is not None:
            return self._add_spread(y, x, self.router.spread)
        for shelf_name, routing in self.router.active.items():
            y = y + self._added(self.shelves[shelf_name], x, routing)  # type: ignore[arg-type]
        return y

    def _add_spread(self, y: Tensor, x: Tensor, spread: Tensor) -> Tensor:
        if self.joined is None:
            raise ValueError(f"{self.name}: its shelves are not joined; call join before packed tokens are routed")
        down, up = self.joined
        weights = spread[self.number if len(spread) > 1 else 0]  # (tokens, directions)
        if x.dim() == 3:  # (1, tokens, fan_in)
            y[0].addmm_((x[0] @ down.T).mul_(weights), up)  # in place: no gradients here, and this is the hot path
        else:
            y.addmm_((x @ down.T).mul_(weights), up)
        return y

    def _added(self, shelf: Shelf, x: Tensor, routing: Routing) -> Tensor:
        rows, k = routing.slots.shape
        if x.dim() == 2 and self.is_flat and x.shape[0] % rows == 0:
            return self._added(shelf, x.unflatten(0, (rows, -1)), routing).flatten(0, 1)
        per_token = x.shape[0] == 1 and rows == x.shape[1] and rows != 1
        if not per_token and x.shape[0] != rows:
            raise ValueError(f"{self.name}: routing of {rows} rows for an input of shape {tuple(x.shape)}")
        weights = routing.weights[:, :, None]  # (rows, k, 1)
        if routing.coefficients:
            weights = weights * routing.coefficients[self.name]  # (rows, k, rank)
        flat, slots = x.transpose(0, 1) if per_token else x, routing.slots
        if routing.run > 1:
            flat = flat.unflatten(0, (-1, routing.run)).flatten(1, 2)
            slots, weights = slots[:: routing.run], weights[:: routing.run]
        kernel = self.router.kernel or choose(rows=len(slots), k=k, slots=shelf.down.shape[0])
        down, up = shelf.down, shelf.up
        if kernel is gather and routing.first is not None:
            kernel, piece = aligned, slice(routing.first, routing.first + len(slots))
            down, up = down[piece], up[piece]
        added = kernel(flat, down.to(flat.dtype), up.to(flat.dtype), slots, weights * shelf.scale)
        if routing.run > 1:
            added = added.unflatten(1, (routing.run, -1)).flatten(0, 1)
        return added.transpose(0, 1) if per_token else added


def put(layers: Mapping[str, SlotLinear], shelf: str, slot: int, adapter: Adapter) -> None:
    """Load an adapter into a slot. Its own scale is folded into `up`, so any α fits.

    Raises ValueError where modules, rank or shapes differ from the shelf's; then nothing was changed.
    """
    check_fit(layers, shelf, adapter)
    with torch.no_grad():
        for name, layer in layers.items():
            room, factors = layer.shelves[shelf], adapter.factors[name]
            room.down[slot].copy_(factors.down)
            room.up[slot].copy_(factors.up.T * (adapter.scale / room.scale))


def check_fit(layers: Mapping[str, SlotLinear], shelf: str, adapter: Adapter) -> None:
    """Raise ValueError for an adapter whose modules, rank or shapes are not the shelf's."""
    missing, unknown = set(layers) - set(adapter.factors), set(adapter.factors) - set(layers)
    if missing or unknown:
        example = sorted(missing | unknown)[0]
        raise ValueError(f"the adapter's modules are not the model's: {len(missing | unknown)} differ, e.g. {example}")
    for name, layer in layers.items():
        room, factors = layer.shelves[shelf], adapter.factors[name]
        if room.down.shape[1:] != factors.down.shape or room.up.shape[:0:-1] != factors.up.shape:
            raise ValueError(
                f"{name}: adapter factors {tuple(factors.down.shape)} and {tuple(factors.up.shape)} do not fit "
                f"slots of {tuple(room.down.shape[1:])} and {tuple(room.up.shape[:0:-1])}: another base model or rank"
            )


def take(layers: Mapping[str, SlotLinear], shelf: str, slot: int) -> Adapter:
    """The adapter that a slot holds: a copy, on the CPU, in fp32."""
    factors = {}
    for name, layer in layers.items():
        room = layer.shelves[shelf]
        down, up = room.down[slot].detach().float().cpu(), room.up[slot].detach().float().cpu()
        factors[name] = Factors(down=down.clone(), up=up.T.contiguous().clone())
    return Adapter(factors=factors, scale=float(next(iter(layers.values())).shelves[shelf].scale))
