"""Gradients of parameters that every tensor-parallel rank holds but that saw only part of the work.

Such a parameter (a norm under sequence parallelism, a q/k-norm or blend that sees only local heads, a
replicated projection of a sequence shard) has a partial gradient on each rank; the whole one is the
sum. It is summed when autograd hands it over, before any engine reduces or partitions it, so it is
right under every ZeRO stage.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn


def mark_partial(parameter: nn.Parameter) -> nn.Parameter:
    """Declare that each tensor-parallel rank computes only a part of this parameter's gradient."""
    parameter.partial_tp_gradient = True  # type: ignore[attr-defined]
    return parameter


def sum_partial_gradients(model: nn.Module, tp_group: dist.ProcessGroup) -> list[str]:
    """Register the sum over `tp_group` on every marked parameter of `model`; returns their names.

    A parameter counts as marked by :func:`mark_partial` or by Megatron's own `sequence_parallel` flag.
    """
    if tp_group.size() == 1:
        return []

    def all_reduce(grad: torch.Tensor) -> torch.Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=tp_group)
        return total

    names = []
    for name, parameter in model.named_parameters():
        if getattr(parameter, "partial_tp_gradient", False) or getattr(parameter, "sequence_parallel", False):
            parameter.register_hook(all_reduce)
            names.append(name)
    return names
