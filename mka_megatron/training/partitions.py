"""How DeepSpeed's ZeRO cuts a rank's parameters over its replicas."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch.distributed as dist

from mka_megatron.training.engine import Engine


@dataclass(frozen=True)
class Partition:
    """One flat buffer and this rank's part of it, in elements: of an optimizer's parameter group, under ZeRO 3 of one
    parameter."""

    elements: int
    """Of the buffer: the parameters and padding."""
    spans: tuple[tuple[str, int, int], ...]
    """(parameter, its first element in the buffer, past its last)."""
    pieces: tuple[int, ...]
    """Elements that each of the ranks holds, in their order."""
    ranks: tuple[int, ...]
    """Of the world, those that share the buffer."""
    held: int
    """Elements on this rank: of the optimizer's states, under ZeRO 3 of the parameter."""


def partitions(engine: Engine) -> tuple[Partition, ...] | None:
    """Those of every parameter group, under ZeRO 3 of every parameter; None under ZeRO 0."""
    optimizer: Any = engine.deepspeed.optimizer
    names = {id(parameter): name for name, parameter in engine.model.named_parameters()}
    if hasattr(optimizer, "parallel_partitioned_bit16_groups"):
        groups = zip(
            optimizer.round_robin_bit16_groups, optimizer.bit16_groups_flat,
            optimizer.parallel_partitioned_bit16_groups, optimizer.single_partition_of_fp32_groups,
            optimizer.round_robin_bit16_offsets, strict=True,
        )  # fmt: skip
    elif hasattr(optimizer, "bf16_partitioned_groups"):  # DeepSpeed's for stage 1 in bf16
        begins = [[0, *accumulate(x.numel() for x in group)][:-1] for group in optimizer.bf16_groups]
        groups = zip(
            optimizer.bf16_groups, optimizer.bf16_groups_flat, optimizer.bf16_partitioned_groups,
            optimizer.fp32_groups_flat_partition, begins, strict=True,
        )  # fmt: skip
    elif engine.config.engine.zero_stage == 3:
        return tuple(_of_parameter(name, parameter) for name, parameter in engine.model.named_parameters())
    else:
        return None
    return tuple(
        Partition(
            flat.numel(),
            tuple((names[id(x)], begin, begin + x.numel()) for x, begin in zip(parameters, begins, strict=True)),
            tuple(piece.numel() for piece in pieces),
            tuple(dist.get_process_group_ranks(optimizer.real_dp_process_group[number])),
            states.numel(),
        )
        for number, (parameters, flat, pieces, states, begins) in enumerate(groups)
    )


def _of_parameter(name: str, parameter: Any) -> Partition:
    ranks = tuple(dist.get_process_group_ranks(parameter.ds_process_group))
    each = parameter.ds_tensor.ds_numel
    return Partition(
        each * len(ranks), ((name, 0, parameter.ds_numel),), (each,) * len(ranks), ranks, parameter.ds_tensor.numel()
    )
