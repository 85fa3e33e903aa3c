"""Collectives over the ranks of a group that gradients flow back through, each counting the bytes it sends.

Every rank calls the same ones in the same order, forward and back, also where it has nothing to give or take. So
what they return must have a part in the rank's loss, be it an empty one: a rank whose graph left it out would
not come to the backward. Gradients that several ranks send back to an owner are added in the order of the ranks,
in fp32 or wider: the sum does not depend on who came first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

Index = tuple[Any, ...]
"""What selects a piece of a tensor, `x[index]`: slices, int64 tensors; no element twice."""


@dataclass
class Traffic:
    """What this rank has sent to others."""

    sent: Counter[str] = field(default_factory=Counter)
    """Bytes by purpose; those of gradients under "<purpose> gradient"."""

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.sent.values())


def gather_before(
    tensors: Sequence[Tensor], group: dist.ProcessGroup, traffic: Traffic, purpose: str
) -> tuple[Tensor, ...]:
    """The shards of the ranks up to this one, joined along dimension 1.

    Args:
        tensors: [B, S, ...] each, of one dtype, their shapes equal on all ranks.

    Returns:
        [B, (rank+1)*S, ...] of each.
    """
    return _GatherBefore.apply(group, traffic, purpose, *tensors)


def exchange(
    tensors: Sequence[Tensor],
    give: Sequence[Index | None],
    take: Sequence[tuple[int, ...]],
    group: dist.ProcessGroup,
    traffic: Traffic,
    purpose: str,
) -> tuple[tuple[Tensor, ...], ...]:
    """Pieces of this rank's tensors to every other rank, and theirs to this one.

    Args:
        tensors: of one shape and dtype.
        give: per rank what it gets of each tensor; None: nothing, as for this rank itself.
        take: per rank the shape of the piece that comes from it; without elements where nothing does.

    Returns:
        per tensor the pieces by rank.
    """
    flat = _Exchange.apply(tuple(give), tuple(take), group, traffic, purpose, *tensors)
    return tuple(flat[index :: len(tensors)] for index in range(len(tensors)))


def transpose(x: Tensor, group: dist.ProcessGroup, traffic: Traffic, purpose: str) -> Tensor:
    """x[j] of this rank goes to rank j; returns what each rank had for this one, in the shape of x. No gradients.

    Args:
        x: [ranks, ...].
    """
    received = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, x.contiguous(), group=group)
    traffic.sent[purpose] += x.nbytes // x.shape[0] * (x.shape[0] - 1)
    return received


class _GatherBefore(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, group: dist.ProcessGroup, traffic: Traffic, purpose: str, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        message = torch.cat([tensor.reshape(-1) for tensor in tensors])
        shards = [torch.empty_like(message) for _ in range(group.size())]
        dist.all_gather(shards, message, group=group)
        traffic.sent[purpose] += message.nbytes * (group.size() - 1)
        ctx.group, ctx.traffic, ctx.purpose = group, traffic, purpose
        ctx.shapes = [tensor.shape for tensor in tensors]
        _save_mark(ctx, message)
        pieces = [_split(shard, ctx.shapes) for shard in shards[: group.rank() + 1]]
        return tuple(torch.cat(shards, dim=1) for shards in zip(*pieces, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _await_recomputation(ctx)
        rank, ranks = ctx.group.rank(), ctx.group.size()
        # [B, (rank+1)*S, ...] -> rank+1 of [B, S, ...]
        shards = list(zip(*(grad.chunk(rank + 1, dim=1) for grad in grads), strict=True))
        size = sum(shape.numel() for shape in ctx.shapes)
        messages = [_flat(shard) for shard in shards[:rank]] + [grads[0].new_empty(0)] * (ranks - rank)
        sizes = [0] * (rank + 1) + [size] * (ranks - rank - 1)
        received = _all_to_all(messages, sizes, ctx.group, ctx.traffic, f"{ctx.purpose} gradient")
        own = _flat(shards[rank])
        total = own.to(torch.promote_types(own.dtype, torch.float32))
        for message in received[rank + 1 :]:
            total = total + message
        return None, None, None, *_split(total.to(grads[0].dtype), ctx.shapes)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        give: tuple[Index | None, ...],
        take: tuple[tuple[int, ...], ...],
        group: dist.ProcessGroup,
        traffic: Traffic,
        purpose: str,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        none = tensors[0].new_empty(0)
        messages = [none if index is None else _flat([x[index] for x in tensors]) for index in give]
        shapes = [torch.Size(shape) for shape in take]
        sizes = [len(tensors) * shape.numel() for shape in shapes]
        received = _all_to_all(messages, sizes, group, traffic, purpose)
        ctx.group, ctx.traffic, ctx.purpose = group, traffic, purpose
        ctx.give, ctx.sizes, ctx.count = give, [message.numel() for message in messages], len(tensors)
        ctx.shape = tensors[0].shape
        _save_mark(ctx, none)
        pieces = []
        for message, shape in zip(received, shapes, strict=True):
            pieces += _split(message, [shape] * len(tensors))
        return tuple(pieces)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _await_recomputation(ctx)
        messages = [_flat(grads[first : first + ctx.count]) for first in range(0, len(grads), ctx.count)]
        received = _all_to_all(messages, ctx.sizes, ctx.group, ctx.traffic, f"{ctx.purpose} gradient")
        dtype = torch.promote_types(grads[0].dtype, torch.float32)
        totals = [grads[0].new_zeros(ctx.shape, dtype=dtype) for _ in range(ctx.count)]
        for index, message in zip(ctx.give, received, strict=True):
            if index is None:
                continue
            shape = totals[0][index].shape
            for total, piece in zip(totals, _split(message, [shape] * ctx.count), strict=True):
                total[index] += piece
        return None, None, None, None, None, *(total.to(grads[0].dtype) for total in totals)


def _all_to_all(
    messages: Sequence[Tensor],
    sizes: Sequence[int],
    group: dist.ProcessGroup,
    traffic: Traffic,
    purpose: str,
) -> tuple[Tensor, ...]:
    """messages[j], flat, to rank j; returns those of `sizes` elements that the ranks sent."""
    sent = torch.cat(list(messages))
    received = sent.new_empty(sum(sizes))
    dist.all_to_all_single(received, sent, list(sizes), [message.numel() for message in messages], group=group)
    traffic.sent[purpose] += sent.nbytes - messages[group.rank()].nbytes
    return received.split(list(sizes))


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _split(message: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    parts = message.split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _save_mark(ctx: Any, like: Tensor) -> None:
    """Recomputed activations are recomputed up to the last one that was saved: with this the collective is."""
    ctx.save_for_backward(like.new_empty(0))


def _await_recomputation(ctx: Any) -> None:
    """Ranks that have nothing else to recompute do so now, as the others did: the collectives stay in order."""
    ctx.saved_tensors  # noqa: B018
