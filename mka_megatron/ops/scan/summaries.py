"""The summaries: moving average and prefix mean of every document so far, in O(S) and differentiable.

Shapes: B batch, S sequence; any further axes are channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mka_megatron.ops.scan.rows import Rows
from mka_megatron.ops.scan.steps import allocate, scan_


def ema(x: Tensor, decay: Tensor, documents: Rows, carry: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Exponential moving average of every document so far, the paper's session level in recursive form.

    s_t = a*s_{t-1} + b*x_t with (a, b) = (0, 1) at a document's first token, (1, 0) on padding, else
    (decay, 1 - decay): the weights of a slot sum to one.

    Args:
        x: [B, S, ...] floating point, any strides.
        decay: in (0, 1), broadcastable to x.shape[2:].
        documents: boundaries of the [B, S] slots, on x's device.
        carry: [B, ...] state before slot 0, which the first document of every row continues (its start is then
            ignored; a row that begins afresh may carry its own x[:, 0]). None: every row starts afresh.

    Returns:
        The averages, shape and dtype of x (padding repeats the average before it, in front of a
        row's first token the carry or 0), and the state after the last slot, [B, ...] in fp32 (fp64 for fp64 x).
        Differentiable once in x, decay and carry.
    """
    if x.shape[1] == 1 and not torch.is_grad_enabled():
        return _one_slot(x, decay, documents, carry)
    if documents.gaps:
        moved = documents.compacted
        averages, last = _Ema.apply(moved.take(x), decay, moved.documents, carry)
        return _held(moved.put(averages), documents, carry), last
    return _Ema.apply(x, decay, documents, carry)


def prefix_mean(
    x: Tensor, documents: Rows, carry: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Mean of every document so far, slot t included.

    Args:
        x: [B, S, ...] floating point, any strides.
        documents: boundaries of the [B, S] slots, on x's device.
        carry: (sum [B, ...], count [B]) of the tokens before slot 0 that the first document of every row
            continues. None: every row starts afresh.

    Returns:
        The means, shape and dtype of x (padding repeats the mean before it, in front of a row's first
        token the carry's mean or 0), and (sum, count) after the last slot in fp32 (fp64 for fp64 x).
        Differentiable once in x and the carried sum.
    """
    if documents.gaps:
        moved = documents.compacted
        means, state = prefix_mean(moved.take(x), moved.documents, carry)
        before = None if carry is None else _mean(*carry)
        return _held(moved.put(means), documents, before), state
    total, count = (None, None) if carry is None else carry
    sums, total = _PrefixSum.apply(x, documents, total)
    counts = documents.once(_counts).to(_state_dtype(x))
    if count is not None:
        first = documents.starts.long().cumsum(dim=1) == 1
        counts = torch.where(first, counts + count[:, None], counts)
    if documents.padding is not None:
        rows, times, last = documents.held
        counts = counts.index_put((rows, times), counts[rows, last])
    return _mean(sums, counts).to(x.dtype), (total, counts[:, -1])


def _one_slot(x: Tensor, decay: Tensor, documents: Rows, carry: Tensor | None) -> tuple[Tensor, Tensor]:
    """:func:`ema` of a token that is generated, without a gradient: the same arithmetic in five operations."""
    state = x[:, 0].to(_state_dtype(x), copy=True)
    if carry is not None:
        rate = decay.to(state.dtype)
        state = torch.addcmul(state * (1 - rate), carry.to(state.dtype), rate)
    if documents.padding is not None:
        padding = documents.padding[:, 0].view(-1, *(1,) * (state.dim() - 1))
        state = torch.where(padding, 0 if carry is None else carry.to(state.dtype), state)
    return state[:, None].to(x.dtype), state


class _Ema(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, decay: Tensor, documents: Rows, carry: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        dtype = _state_dtype(x)
        channels = x.shape[2:]
        rate = decay.to(dtype).expand(channels)
        buffer, state = allocate(x, dtype)
        torch.mul(x, 1 - rate, out=state)
        fresh = documents.once(_fresh if carry is None else _fresh_after_carry)
        state[fresh] = x[fresh].to(dtype)
        scan_(buffer, rate, documents, carry)
        _hold(state, documents, carry)
        last = state[:, -1].clone()
        ctx.save_for_backward(x, decay, state, carry)
        ctx.documents = documents
        return state.to(x.dtype), last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
        x, decay, state, carry = ctx.saved_tensors
        documents: Rows = ctx.documents
        rate = decay.to(state.dtype).expand(x.shape[2:])
        adjoint, grad_carry = _adjoint(grad, grad_last, rate, documents, carry is not None)
        fresh = documents.once(_fresh if carry is None else _fresh_after_carry)
        grad_decay = None
        if ctx.needs_input_grad[1]:
            # ds_t/d decay = s_{t-1} - x_t, except at starts and on padding
            slope = torch.empty_like(state)
            torch.sub(state[:, :-1], x[:, 1:], out=slope[:, 1:])
            slope[:, 0] = 0 if carry is None else carry - x[:, 0]
            slope[fresh] = 0
            if documents.padding is not None:
                slope.masked_fill_(documents.padding.view(x.shape[:2] + (1,) * (x.dim() - 2)), 0)
            grad_decay = slope.mul_(adjoint).sum(dim=(0, 1)).sum_to_size(decay.shape).to(decay.dtype)
        begun = adjoint[fresh]
        grad_x = adjoint.mul_(1 - rate)
        grad_x[fresh] = begun
        if grad_carry is not None:
            grad_carry = grad_carry.to(carry.dtype)
        return grad_x.to(x.dtype), grad_decay, None, grad_carry


class _PrefixSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, documents: Rows, carry: Tensor | None) -> tuple[Tensor, Tensor]:
        dtype = _state_dtype(x)
        buffer, state = allocate(x, dtype)
        state.copy_(x)
        scan_(buffer, None, documents, carry)
        _hold(state, documents, carry)
        ctx.documents = documents
        ctx.dtypes = (x.dtype, None if carry is None else carry.dtype)
        return state, state[:, -1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
        x_dtype, carry_dtype = ctx.dtypes
        adjoint, grad_carry = _adjoint(grad, grad_last, None, ctx.documents, carry_dtype is not None)
        return adjoint.to(x_dtype), None, None if grad_carry is None else grad_carry.to(carry_dtype)


def _state_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _mean(total: Tensor, count: Tensor) -> Tensor:
    return total / count.clamp_min(1).view(count.shape + (1,) * (total.dim() - count.dim()))


def _counts(documents: Rows) -> Tensor:
    """[B, S] int64: tokens at hand of the slot's document up to it; 0 before a row's first token."""
    slots = torch.arange(documents.starts.shape[1], device=documents.starts.device)
    first = torch.where(documents.starts, slots, 0).cummax(dim=1).values
    counts = documents.positions - documents.positions.gather(1, first) + 1
    for row, slots_before in documents.heads:
        counts[row, :slots_before] = 0
    return counts


def _held(y: Tensor, documents: Rows, carry: Tensor | None) -> Tensor:
    """`y` with padding as :func:`_hold` fills it, out of place and differentiable."""
    rows, times, last = documents.held
    y = y.index_put((rows, times), y[rows, last])
    if carry is None or not documents.heads:
        return y
    rows = torch.tensor([row for row, slots in documents.heads for _ in range(slots)], device=y.device)
    times = torch.tensor([time for _, slots in documents.heads for time in range(slots)], device=y.device)
    return y.index_put((rows, times), carry[rows].to(y.dtype))


def _fresh(documents: Rows) -> tuple[Tensor, Tensor]:
    """(rows, times) of the slots whose state is their own x when every row starts afresh."""
    return _slots(documents, [(row, 0) for row in range(documents.starts.shape[0])])


def _fresh_after_carry(documents: Rows) -> tuple[Tensor, Tensor]:
    """The same when the first document of every row continues."""
    return _slots(documents, [])


def _slots(documents: Rows, first: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    inner = [(row, begin) for row, begin, _ in documents.spans if begin]
    rows, times = torch.tensor(first + inner, dtype=torch.int64).view(-1, 2).unbind(1)
    return rows.to(documents.starts.device), times.to(documents.starts.device)


def _hold(state: Tensor, documents: Rows, carry: Tensor | None) -> None:
    """Padding repeats the state of the last token before it."""
    if documents.padding is None:
        return
    rows, times, last = documents.held
    state[rows, times] = state[rows, last]
    for row, slots in documents.heads:
        state[row, :slots] = 0 if carry is None else carry[row]


def _adjoint(
    grad: Tensor, grad_last: Tensor, rate: Tensor | None, documents: Rows, carried: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of every slot's scan input, [B, S, ...], and of the carry, from those of its state."""
    dtype = grad_last.dtype
    buffer, adjoint = allocate(grad, dtype)
    adjoint.copy_(grad)
    adjoint[:, -1] += grad_last
    idle: dict[int, Tensor] = {}
    if documents.padding is not None:
        rows, times, last = documents.held
        behind = adjoint[rows, times]
        adjoint[rows, times] = 0
        adjoint.index_put_((rows, last), behind, accumulate=True)
        for row, slots in documents.heads:
            idle[row] = adjoint[row, :slots].sum(dim=0)
            adjoint[row, :slots] = 0
    scan_(buffer, rate, documents, reverse=True)
    if not carried:
        return adjoint, None
    grad_carry = adjoint[:, 0].clone() if rate is None else adjoint[:, 0] * rate
    for row, value in idle.items():
        grad_carry[row] = value
    return adjoint, grad_carry
