"""One Ray Data task a number, on the driver's node: each does its own part and tells a few values of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import ray


def on_each(count: int, function: Callable[..., dict[str, list[str]]], **arguments: Any) -> list[dict[str, Any]]:
    """`function(batch, **arguments)` for each number below `count`, a Ray Data task each: what they tell, in order.

    A batch holds one number, `batch["number"][0]`; what is told is a JSON text, with that number, under "told".
    The tasks run where the driver runs, while that node has CPUs: files and drafts may lie on its disk only. They end
    in any order: what they write must be named by the number alone.
    """
    here = ray.get_runtime_context().get_node_id()
    numbers = ray.data.from_items([{"number": number} for number in range(count)], override_num_blocks=count)
    numbers.context.enable_progress_bars = False  # this dataset's own copy; `follow` shows more
    told = numbers.map_batches(
        function,
        batch_size=1,
        fn_kwargs=arguments,
        num_cpus=1,
        label_selector={"ray.io/node-id": here},
        fallback_strategy=[{"label_selector": {}}],
    )
    return sorted((json.loads(row["told"]) for row in told.iter_rows()), key=lambda row: row["number"])
