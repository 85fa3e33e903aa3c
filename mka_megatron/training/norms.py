"""Size and norm of a model whose parameters are spread over tensor-parallel and ZeRO-3 ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mka_megatron.parallel.groups import Topology


def parameter_count(model: nn.Module, topology: Topology) -> int:
    """Elements of the whole model, each counted once, shared weights too."""
    sharded = replicated = 0
    for parameter in model.parameters():
        count = getattr(parameter, "ds_numel", parameter.numel())
        if _is_sharded(parameter):
            sharded += count
        else:
            replicated += count
    return sharded * topology.tp_size + replicated


@torch.no_grad()
def parameter_norm(model: nn.Module, topology: Topology) -> float:
    """L2 norm of the whole model's parameters; NaN where ZeRO-3 has swapped some of them out.

    Collective: every rank calls it, between steps.
    """
    device = topology.device
    total = torch.zeros((), dtype=torch.float64, device=device)
    for parameter, local in _local_parts(model, topology):
        if _is_sharded(parameter) or topology.tp_rank == 0:
            norm = torch.linalg.vector_norm(local.float()) if local is not None else math.nan
            total += torch.as_tensor(norm, device=device).double() ** 2
    dist.all_reduce(total, group=topology.tp_group)
    if any(hasattr(parameter, "ds_tensor") for parameter in model.parameters()):
        dist.all_reduce(total, group=topology.dp_cp_group)
    return float(total.sqrt())


def _is_sharded(parameter: nn.Parameter) -> bool:
    return bool(getattr(parameter, "tensor_model_parallel", False))


def _local_parts(model: nn.Module, topology: Topology) -> Iterator[tuple[nn.Parameter, Tensor | None]]:
    """What this rank holds of each parameter; None where it lies on NVMe."""
    for parameter in model.parameters():
        if not hasattr(parameter, "ds_tensor"):
            yield parameter, parameter
            continue
        partition = parameter.ds_tensor
        if partition.numel() < partition.ds_numel:
            yield parameter, None
            continue
        # The last ranks' partitions end in padding.
        filled = getattr(parameter, "ds_numel", 0) - topology.dp_cp_rank * partition.ds_numel
        yield parameter, partition.flatten()[: max(0, min(partition.ds_numel, filled))]
