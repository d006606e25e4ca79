"""What a model does otherwise in training: its blocks' activations are computed anew, or its blocks are compiled.

Neither changes a result (compiling, up to the order of a sum). Works on the blocks that transformers itself marks as
worth checkpointing, in evaluation mode: packs train without dropout, and transformers would checkpoint with it only.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from mta_ray.lora.slots import Router, SlotLinear


def prepare_for_training(
    model: PreTrainedModel, *, gradient_checkpointing: bool, compile: bool, is_sharded: bool = False
) -> None:
    """Change how the model's blocks run, in place; call it once, before an engine takes the model.

    `gradient_checkpointing`: passes with gradients keep the input of each block and nothing of what happens in it; the
    backward pass computes that anew, with the routes that were in force: its caller need not be inside `using`.
    `compile`: torch.compile for each block, with shapes that may change from batch to batch.
    `is_sharded`: an engine will share out the weights (ZeRO 3); then gradients come by `backward` alone.
    Raises ValueError for a model without such blocks.
    """
    if not gradient_checkpointing and not compile:
        return
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise ValueError(
            f"{model.config.model_type} has no blocks that can be checkpointed or compiled one by one; "
            "leave gradient_checkpointing and compile off"
        )
    for block in blocks:
        if compile:
            block.forward = torch.compile(block.forward, dynamic=True)
        if gradient_checkpointing:
            block.forward = _checkpointed(block.forward, _router(block), is_sharded=is_sharded)


def _router(block: nn.Module) -> Router | None:
    return next((module.router for module in block.modules() if isinstance(module, SlotLinear)), None)


def _checkpointed(forward: Callable[..., Any], router: Router | None, *, is_sharded: bool) -> Callable[..., Any]:
    def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(hidden, *args, **kwargs)
        routings = dict(router.active) if router else {}

        def with_routes(hidden: Tensor, *args: Any) -> Any:
            with router.using(**routings) if router else nullcontext():
                return forward(hidden, *args, **kwargs)

        if not is_sharded:
            return checkpoint(with_routes, hidden, *args, use_reentrant=False, preserve_rng_state=False)
        # Weights come and go while a block runs: what it kept cannot be swapped for what it keeps when it runs again.
        # The other form runs block and backward pass again as one, and wants an input that has a gradient.
        if not hidden.requires_grad:
            hidden = hidden.detach().requires_grad_(True)
        return checkpoint(with_routes, hidden, *args, use_reentrant=True, preserve_rng_state=False)

    return run
