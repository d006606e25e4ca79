"""DeepSpeed as a training engine: ZeRO over the workers of a group, with the same update as plain AdamW in one process.

A loss enters, parameters change; adapters come and go slot by slot. The only file that knows deepspeed, which is
imported when the first engine is made.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from mta_ray.lora.slots import SlotLinear
from mta_ray.personalize.engines import SlotState
from mta_ray.personalize.slot_adam import MOMENTS, SLOT, SlotAdamW, clip_factors, per_slot, slot_norms

ZERO_STAGES = (0, 1, 2, 3)
SHARED_MEMORY_OP = "deepspeed_shm_comm"
"""An all-reduce for inference on CPUs. Its build takes about a minute, and training never calls it."""


class _DeepSpeed:
    """DeepSpeed's engine around the trainable parameters. Every worker makes the same calls in the same order.

    Every worker gives its share of a loss that was divided by the counts of all: gradients are summed over workers. The
    loop may call the model itself, as long as its forward passes begin in `model`. Call `finish` before reading the
    parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        trainable: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        *,
        zero_stage: int,
        max_grad_norm: float,
        offload: bool,
    ) -> None:
        self.rank = torch.distributed.get_rank()
        self.world_size = torch.distributed.get_world_size()
        self.trainable = list(trainable)
        self.deepspeed = _load_deepspeed()
        self._is_sharded = zero_stage == 3
        self._layers = [module for module in model.modules() if isinstance(module, SlotLinear)]

        # Below stage 3 DeepSpeed need not see the frozen base: nothing of it is sent, cast or hooked.
        seen = model if self._is_sharded else nn.ParameterList(self.trainable)
        is_bf16 = any(p.dtype == torch.bfloat16 for p in seen.parameters())
        config = _settings(zero_stage=zero_stage, is_bf16=is_bf16, max_grad_norm=max_grad_norm, offload=offload)
        if self._is_sharded:
            self._share_out(seen, config, is_bf16)
        self.engine, *_ = self.deepspeed.initialize(
            model=seen, model_parameters=self.trainable, optimizer=optimizer, config=config
        )
        if self._is_sharded:
            self._gather_slots_with_their_layers()

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss * self.world_size)  # DeepSpeed averages

    def total(self, values: Tensor) -> Tensor:
        summed = values.clone()
        torch.distributed.all_reduce(summed)
        return summed

    def finish(self) -> None:
        """Make every trainable parameter whole on every worker, and end the engine; the model may enter another one.

        After stage 3 what was frozen stays sharded: such a model goes on to the next engine, not to an evaluation.
        """
        if self._is_sharded:
            with self.deepspeed.zero.GatheredParameters(self.trainable):
                whole = [parameter.detach().clone() for parameter in self.trainable]
            for layer in self._layers:
                for parameter in layer.shelves.parameters():
                    self.deepspeed.zero.partition_parameters.unregister_external_parameter(layer, parameter)
        self.engine.destroy()
        self.engine.module_forward_pre_hook.remove()  # destroy leaves these two, which keep the engine alive
        self.engine.module_forward_post_hook.remove()
        if self._is_sharded:
            for parameter, values in zip(self.trainable, whole, strict=True):
                parameter.data = values
                del parameter._z3_optimizer  # a cache of DeepSpeed's keeps the parameter; let it not keep the optimiser

    def gathered(self) -> AbstractContextManager[None]:
        """Within the block every trainable parameter is whole; what is written to it there stays, on every worker."""
        if not self._is_sharded:
            return nullcontext()
        return self.deepspeed.zero.GatheredParameters(self.trainable, modifier_rank=0)  # type: ignore[no-any-return]

    def _share_out(self, model: nn.Module, config: dict[str, Any], is_bf16: bool) -> None:
        """Shard the model one parameter at a time: `initialize` would first put all of it on this worker's device, and
        that need not hold it. A model that comes sharded from an engine before stays as it is."""
        if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
            return
        if is_bf16:  # as `initialize` does with a model that comes whole
            for parameter in model.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)
        self.deepspeed.zero.Init(module=model, config_dict_or_path=config)
        device = self.deepspeed.get_accelerator().current_device_name()
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device)

    def _gather_slots_with_their_layers(self) -> None:
        # A layer reads its shelves' parameters without calling the shelves, which is where ZeRO 3 would gather them. It
        # can find that out by itself, but then it holds them for ever: so we say it here, and take it back in `finish`.
        for layer in self._layers:
            for parameter in layer.shelves.parameters():
                self.deepspeed.zero.register_external_parameter(layer, parameter)


class DeepSpeedEngine(_DeepSpeed):
    """A `personalize.engines.Engine`: AdamW over a whole model, its state sharded (from stage 2 gradients too)."""

    def __init__(
        self,
        model: nn.Module,
        trainable: Sequence[nn.Parameter],
        *,
        zero_stage: int,
        weight_decay: float,
        max_grad_norm: float,
        offload: bool = False,
    ) -> None:
        """Needs a process group (Ray Train makes one). With `offload` the optimiser's state lies in host memory."""
        _check(zero_stage, offload)
        optimizer = torch.optim.AdamW(trainable, lr=0.0, weight_decay=weight_decay)
        super().__init__(
            model, trainable, optimizer, zero_stage=zero_stage, max_grad_norm=max_grad_norm, offload=offload
        )

    def step(self, learning_rate: float) -> None:
        """Clip, update with this rate, zero the gradients; DeepSpeed skips a step whose gradient is not finite."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()


class DeepSpeedSlotEngine(_DeepSpeed):
    """A `personalize.engines.SlotEngine`: AdamW slot by slot, its state sharded (in stage 3 the base model too)."""

    def __init__(
        self,
        model: nn.Module,
        trainable: Sequence[nn.Parameter],
        *,
        zero_stage: int,
        weight_decay: float,
        max_grad_norm: float,
        offload: bool = False,
    ) -> None:
        """Needs a process group (Ray Train makes one).

        With `offload` the optimiser's state lies in host memory, in stage 3 the base model too.
        """
        _check(zero_stage, offload)
        self.max_grad_norm = max_grad_norm
        self._slots = len(trainable[0])
        self._adam = SlotAdamW(list(trainable), slots=self._slots, weight_decay=weight_decay)
        self.is_whole = zero_stage < 3
        self._is_flat = zero_stage > 0
        super().__init__(model, trainable, self._adam, zero_stage=zero_stage, max_grad_norm=0.0, offload=offload)
        self._adam.prepare(self._master_values(), is_flat=self._is_flat)
        if self._is_flat:
            self._link_states()
            for parameter in self.trainable:
                shape = _shape(parameter)
                slots = torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1)).expand(shape)
                self._set(parameter, slots.contiguous(), SLOT)

    def step(self, rates: Mapping[int, float]) -> list[int]:
        utils = self.deepspeed.utils
        gradients = [utils.safe_get_full_grad(parameter) for parameter in self.trainable]
        norms = slot_norms(gradients).cpu()
        bad = [slot for slot in rates if not torch.isfinite(norms[slot])]
        # Where a step must not be made DeepSpeed makes an empty one: that is how it gets rid of its gradients.
        factors = torch.zeros_like(norms) if bad else clip_factors(norms, self.max_grad_norm)
        factors = factors.to(gradients[0].device)
        for parameter, gradient in zip(self.trainable, gradients, strict=True):
            clipped = gradient * per_slot(factors, gradient) if not bad else torch.zeros_like(gradient)
            utils.safe_set_full_grad(parameter, clipped)
        self._adam.rates = {} if bad else rates
        self.engine.step()
        return bad

    @torch.no_grad()
    def load(self, states: Mapping[int, SlotState]) -> None:
        if not states:
            return
        for slot, state in states.items():
            self._adam.steps[slot] = state.steps
        for number, parameter in enumerate(self.trainable):
            for key, of in ((None, "values"), *zip(MOMENTS, ("first", "second"), strict=True)):
                whole = self._get(parameter, key)
                for slot, state in states.items():
                    whole[slot] = getattr(state, of)[number].to(whole)
                self._set(parameter, whole, key)
        with self.gathered():  # what the model computes with, which DeepSpeed renews from its own copy in a step only
            for number, parameter in enumerate(self.trainable):
                for slot, state in states.items():
                    parameter.data[slot] = state.values[number].to(parameter)

    def read(self, slots: Sequence[int]) -> dict[int, SlotState]:
        if not slots:
            return {}
        found: dict[str | None, list[list[Tensor]]] = {}
        for key in (None, *MOMENTS):
            found[key] = [[] for _ in slots]
            for parameter in self.trainable:  # one whole parameter at a time
                whole = self._get(parameter, key)
                for place, slot in enumerate(slots):
                    found[key][place].append(whole[slot].detach().float().cpu().clone())
        return {
            slot: SlotState(
                steps=self._adam.steps[slot],
                values=tuple(found[None][place]),
                first=tuple(found[MOMENTS[0]][place]),
                second=tuple(found[MOMENTS[1]][place]),
            )
            for place, slot in enumerate(slots)
        }

    def _master_values(self) -> list[Tensor]:
        """What the optimiser updates: flat pieces of the fp32 copy, or in stage 0 the parameters themselves."""
        if not self._is_flat:
            return list(self.trainable)
        if self._is_sharded:
            return list(self.engine.optimizer.fp32_partitioned_groups_flat)
        return list(self.engine.optimizer.single_partition_of_fp32_groups)

    def _link_states(self) -> None:
        # Stages 1 and 2 do this in their first step; we put adapters in place before it.
        link = getattr(self.engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:
            link()

    def _get(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        """The whole parameter's fp32 value, or this state of it: on every worker."""
        utils = self.deepspeed.utils
        if not self._is_flat:
            return (parameter if key is None else self._adam.state[parameter][key]).detach().clone()
        if key is None:
            return utils.safe_get_full_fp32_param(parameter)
        return utils.safe_get_full_optimizer_state(parameter, key)

    def _set(self, parameter: nn.Parameter, whole: Tensor, key: str | None) -> None:
        utils = self.deepspeed.utils
        if not self._is_flat:
            (parameter.data if key is None else self._adam.state[parameter][key]).copy_(whole)
        elif key is None:
            utils.safe_set_full_fp32_param(parameter, whole)
        else:
            utils.safe_set_full_optimizer_state(parameter, whole, key)


def _check(zero_stage: int, offload: bool) -> None:
    if zero_stage not in ZERO_STAGES:
        raise ValueError(f"zero_stage is {zero_stage}, wanted one of {ZERO_STAGES}")
    if offload and zero_stage == 0:
        raise ValueError("offload needs optimiser state that is sharded: pass zero_stage 1, 2 or 3")
    if not torch.distributed.is_initialized():
        raise RuntimeError("there is no process group; run this in a TorchTrainer, or use an engine of plain torch")


def _shape(parameter: nn.Parameter) -> torch.Size:
    """Of the whole parameter, sharded or not."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _load_deepspeed() -> ModuleType:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else a warning on every import
    import deepspeed

    deepspeed.ops.__compatible_ops__[SHARED_MEMORY_OP] = False
    return deepspeed


def _settings(*, zero_stage: int, is_bf16: bool, max_grad_norm: float, offload: bool) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": zero_stage}
    if zero_stage == 3:
        zero["sub_group_size"] = 10**15  # one optimiser step a step, however many parameters
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if zero_stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,  # asked for, and used for throughput figures only
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "bf16": {"enabled": is_bf16},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # the same AdamW wherever its state lies
        "steps_per_print": 10**9,
    }
