"""Entry to and exit from the tensor-parallel region for activations of any memory layout.

megatron-core 0.16.1's `copy_to_tensor_model_parallel_region` and `reduce_from_...` all-reduce
`tensor.contiguous()` and return `tensor`: a transposed or split gradient comes back unreduced. These do not.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _CopyToRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduced(grad, ctx.group), None


class _ReduceFromRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _all_reduced(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _all_reduced(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def copy_to_region(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x, equal on every rank of `group` -> x; its gradient is the sum of the ranks' gradients."""
    return x if group.size() == 1 else _CopyToRegion.apply(x, group)


def reduce_from_region(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of the ranks' x, on every rank of `group`; gradients pass through."""
    return x if group.size() == 1 else _ReduceFromRegion.apply(x, group)
