"""How many adapters fit a device at once: remembered from the last run, else measured; too many is halved."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import torch

from mta_ray.lora.slots import Route
from mta_ray.model.backbone import RoutedModel
from mta_ray.model.batches import Tokens, collate, row_losses
from mta_ray.pipeline.bank.plan import Plan
from mta_ray.pipeline.group import GroupConfig

SHARE = 0.6
"""Of the free memory that is planned with; the rest is for what is not counted, such as the products of kernels."""
CGROUPS = Path("/sys/fs/cgroup")
"""Where Linux says what a container may take."""
BYTES_PER_WEIGHT = 24
"""Of an adapter in training: value, gradient, fp32 copy, two moments, their slot map, and room for a product."""
SHARDED_LANES = 8
"""Where to begin with a base that no device holds, on which nothing can be measured before it is sharded."""
_SHELF = "measured"


def fit_lanes(routed: RoutedModel, plan: Plan, device: str, longest: Callable[[], Sequence[Tokens]]) -> int:
    """Adapters at once for a group: what the plan says, what was remembered, or what should fit by measure."""
    if plan.lanes:
        return min(plan.lanes, plan.max_lanes)
    known = plan.files.known_lanes().get(device)
    if known is None:
        if plan.group.zero_stage == 3:
            known = SHARDED_LANES
        elif not (rows := longest()):
            known = 1  # anchors without an example: they are told when it is their turn
        else:
            known = _measured(routed, rows, plan)
    return max(1, min(known, plan.max_lanes))


def _measured(routed: RoutedModel, rows: Sequence[Tokens], plan: Plan) -> int:
    try:
        cost = lane_bytes(routed, rows, rank=plan.train.rank, workers=plan.group.workers)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return 1
    return int(SHARE * free_bytes(routed, groups=plan.groups) / cost)


def lane_bytes(routed: RoutedModel, rows: Sequence[Tokens], *, rank: int, workers: int) -> int:
    """Of one adapter in training: its weights and their state, and what a step of a worker's share of these rows keeps
    for its backward."""
    weights = sum(rank * (layer.base.in_features + layer.base.out_features) for layer in routed.layers.values())
    routed.add_shelf(_SHELF, slots=1, rank=rank, alpha=float(rank))
    trainable = [p.requires_grad_(True) for layer in routed.layers.values() for p in layer.shelves[_SHELF].parameters()]
    known = {p.untyped_storage().data_ptr() for p in routed.model.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    rows = rows[::-1][::workers]  # the longest among them
    batch = collate(routed.backbone, rows, routed.device)
    routing = routed.routing([Route(slots=(0,), weights=(1.0,))] * len(rows))
    counting = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
    try:
        with counting, routed.router.using(**{_SHELF: routing}):
            row_losses(routed.model, batch).sum()
    finally:
        for parameter in trainable:
            parameter.requires_grad_(False)
        for layer in routed.layers.values():
            layer.remove_shelf(_SHELF)
    return weights * BYTES_PER_WEIGHT + sum(kept.values())


def free_bytes(routed: RoutedModel, *, groups: int = 1) -> int:
    """Of the model's device, which a group has for itself; a group's share of the machine's, where that is the CPU."""
    if routed.device.type == "cuda":
        return int(torch.cuda.mem_get_info(routed.device)[0])
    return min(int(psutil.virtual_memory().available), container_free_bytes(CGROUPS)) // groups


def container_free_bytes(cgroups: Path) -> int:
    """What the container may still take, caches that can be dropped among it; no end where it has no limit.

    `cgroups` is where the kernel shows the container's own control group, of version 2 or 1.
    """
    for folder, most, used in (
        (cgroups, "memory.max", "memory.current"),
        (cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            limit, taken = (folder / most).read_text().strip(), int((folder / used).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if limit != "max":
            cache = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
            return max(0, int(limit) - taken + cache)
    return sys.maxsize


def device_name(group: GroupConfig) -> str:
    """The kind of a group's devices, and how they share a pack: what a number of lanes is remembered under."""
    kind = torch.cuda.get_device_name() if group.device == "cuda" else group.device
    return f"{kind}, {group.workers} workers, ZeRO {group.zero_stage}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python could not get memory, on a GPU or on the host."""
    text = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        words in text for words in ("out of memory", "can't allocate memory", "not enough memory", "_alloc_failed")
    )
