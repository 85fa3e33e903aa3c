"""Where this rank's part of the fp32 masters lies in a DeepSpeed engine of any ZeRO stage, for writing.

DeepSpeed 0.19 keeps, per rank: the parameters themselves (ZeRO 0 in fp32), an fp32 copy of each (ZeRO 0 in half
precision), one flat tensor per optimizer group that is an interval of the group's parameters (ZeRO 1, 2), or flat
tensors that hold the rank's part of each parameter, one behind the other (ZeRO 3), some of them on NVMe.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

MOMENTS: tuple[Literal["exp_avg", "exp_avg_sq"], ...] = ("exp_avg", "exp_avg_sq")


class Slot(NamedTuple):
    """[start, start + length) of the flattened parameter `name` lies at `offset` of a master."""

    name: str
    start: int
    length: int
    offset: int


class Master(NamedTuple):
    """An fp32 tensor that the optimizer updates."""

    tensor: Tensor
    slots: list[Slot]
    """Parts of parameters in it; what lies between them is padding."""


def masters(engine: Any) -> Iterator[Master]:
    """This rank's masters, each to be written before the next is asked for; go through all, then call :func:`settle`.

    One that lives on NVMe is in memory for its turn only.

    Args:
        engine: DeepSpeed's, without gradients.
    """
    optimizer, names = engine.optimizer, engine.param_names
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return _partitioned(optimizer, names)
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        return _intervals(optimizer, names)
    if isinstance(optimizer, BF16_Optimizer):
        return _mapped(optimizer.fp32_groups_flat_partition, optimizer.bf16_groups, names)
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        return _copies(optimizer, names)
    return (Master(parameter, [Slot(names[parameter], 0, parameter.numel(), 0)])
            for group in optimizer.param_groups for parameter in group["params"])


def set_state(engine: Any, master: Tensor, state: dict[str, Tensor], steps: float) -> None:
    """Give `master` Adam's moments, shaped and placed as it is, after `steps` updates."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    if isinstance(optimizer, torch.optim.AdamW):
        counter: Any = torch.tensor(steps, dtype=torch.float32, device=master.device)
    else:  # the fused Adams count in integers, some of them per group
        counter = int(steps)
        for group in optimizer.param_groups:
            group["step"] = counter
    optimizer.state[master] = {"step": counter, **state}


def settle(engine: Any) -> None:
    """Bring the weights that the model computes with up to the masters; a collective call."""
    optimizer = engine.optimizer
    if isinstance(optimizer, (DeepSpeedZeroOptimizer, BF16_Optimizer)):
        optimizer.update_lp_params()
    elif isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        optimizer.checkpoint_event_epilogue()


def _partitioned(optimizer: DeepSpeedZeroOptimizer_Stage3, names: dict[Tensor, str]) -> Iterator[Master]:
    rank = dist.get_rank(optimizer.dp_process_group)
    optimizer.checkpoint_event_prologue()
    for index, group in enumerate(optimizer.fp16_groups):
        slots, offset = [], 0
        for parameter in group:
            share = parameter.partition_numel()
            length = max(0, min(share, parameter.ds_numel - rank * share))
            slots.append(Slot(names[parameter], rank * share, length, offset))
            offset += share
        swapped = optimizer._swappable_optimizer_subgroup(index)
        if swapped:
            optimizer._optimizer_states_and_gradient_swap_in(index)
        yield Master(optimizer.fp32_partitioned_groups_flat[index], slots)
        optimizer._reassign_or_swap_out_partitioned_parameters(index)
        if swapped:
            optimizer._optimizer_states_and_gradient_swap_out(index)


def _intervals(optimizer: DeepSpeedZeroOptimizer, names: dict[Tensor, str]) -> Iterator[Master]:
    # not by _hp_mapping, which takes round_robin_gradients for the model's order
    for index, flat in enumerate(optimizer.single_partition_of_fp32_groups):
        begin = dist.get_rank(optimizer.real_dp_process_group[index]) * flat.numel()
        slots = []
        for parameter, first in zip(
            optimizer.round_robin_bit16_groups[index], optimizer.round_robin_bit16_offsets[index], strict=True
        ):
            low, high = max(first, begin), min(first + parameter.numel(), begin + flat.numel())
            if low < high:
                slots.append(Slot(names[parameter], low - first, high - low, low - begin))
        yield Master(flat, slots)


def _mapped(flats: list[Tensor], groups: list[list[Tensor]], names: dict[Tensor, str]) -> Iterator[Master]:
    for flat, group in zip(flats, groups, strict=True):
        slots = []
        for parameter in group:
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is not None:
                there, here = mapping.lp_fragment_address, mapping.hp_fragment_address
                slots.append(Slot(names[parameter], there.start, there.numel, here.start))
        yield Master(flat, slots)


def _copies(optimizer: FP16_UnfusedOptimizer, names: dict[Tensor, str]) -> Iterator[Master]:
    for halves, copies in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        for half, copy in zip(halves, copies, strict=True):
            yield Master(copy, [Slot(names[half], 0, half.numel(), 0)])
            half.data.copy_(copy.data)
