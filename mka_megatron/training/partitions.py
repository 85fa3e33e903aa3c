"""How DeepSpeed's ZeRO stages 1 and 2 cut a rank's parameters over its replicas."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch.distributed as dist

from mka_megatron.training.engine import Engine


@dataclass(frozen=True)
class Partition:
    """One flat buffer, of an optimizer's parameter group, and this rank's part of it, in elements."""

    elements: int
    """Of the buffer: the parameters and padding."""
    spans: tuple[tuple[str, int, int], ...]
    """(parameter, its first element in the buffer, past its last)."""
    pieces: tuple[int, ...]
    """Elements that each of the ranks holds, in their order."""
    ranks: tuple[int, ...]
    """Of the world, those that share the buffer."""
    held: int
    """Elements of the optimizer's states on this rank."""


def partitions(engine: Engine) -> tuple[Partition, ...] | None:
    """Those of every parameter group; None where there are none: under ZeRO 0, and under ZeRO 3, which cuts every
    parameter by itself."""
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
