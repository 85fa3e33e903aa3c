"""L2: causal session summaries by an O(S) scan with document resets and carries.

Shapes: B batch, S sequence, C channels (any further axes), N chunks of T slots (N*T >= S).

A scan over time runs chunk-wise: local scans over all chunks at once (T vector operations), the carries
from chunk to chunk (N operations), then every slot adds its share of the carry: about 2*sqrt(S) operations
of elementwise arithmetic in time order. So a slot's bits depend on nothing later and on no other document.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mka_megatron.config.schema import L2Config
from mka_megatron.memory.documents import Documents


def ema(x: Tensor, decay: Tensor, documents: Documents, carry: Tensor | None = None) -> tuple[Tensor, Tensor]:
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
        The averages, shape and dtype of x (padding behind tokens repeats the last average, a row without
        tokens its carry or 0), and the state after the last slot, [B, ...] in fp32 (fp64 for fp64 x).
        Differentiable once in x, decay and carry.
    """
    return _Ema.apply(x, decay, documents, carry)


def prefix_mean(
    x: Tensor, documents: Documents, carry: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Mean of every document so far, slot t included.

    Args:
        x: [B, S, ...] floating point, any strides.
        documents: boundaries of the [B, S] slots, on x's device.
        carry: (sum [B, ...], count [B]) of the tokens before slot 0 that the first document of every row
            continues. None: every row starts afresh.

    Returns:
        The means, shape and dtype of x (padding behind tokens repeats the last mean, a row without tokens its
        carry's mean or 0), and (sum, count) after the last slot in fp32 (fp64 for fp64 x).
        Differentiable once in x and the carried sum.
    """
    dtype = _state_dtype(x)
    total, count = (None, None) if carry is None else carry
    sums, total = _PrefixSum.apply(x, documents, total)
    counts = documents.positions + 1
    if documents.padding is not None:
        rows, times, last = documents.held
        counts = counts.index_put((rows, times), counts[rows, last])
        if documents.empty:
            counts = counts.index_fill(0, torch.tensor(documents.empty, device=counts.device), 0)
    counts = counts.to(dtype)
    if count is not None:
        first = documents.starts.long().cumsum(dim=1) == 1
        counts = torch.where(first, counts + count[:, None], counts)
    # [B, S] -> [B, S, 1...]
    shape = counts.shape + (1,) * (x.dim() - 2)
    return (sums / counts.clamp_min(1).view(shape)).to(x.dtype), (total, counts[:, -1])


def decay_logits(l2: L2Config, kv_heads: int, head_dim: int) -> Tensor:
    """Initial logits of the EMA's decays 1 - 1/span, for spans log-spaced from l2.min_span to l2.max_span tokens.

    Every head has the same spread over its channels, so that it does not depend on how heads are sharded; with
    one decay per head (l2.decay "head") the spread is over the heads.

    Returns:
        fp32 [G, d], or [G, 1] for "head". Raises ValueError unless 1 < min_span <= max_span.
    """
    if not 1 < l2.min_span <= l2.max_span:
        raise ValueError(
            f"memory_hierarchy.l2.min_span is {l2.min_span}, max_span {l2.max_span}: set 1 < min_span <= max_span."
        )
    low, high = math.log(l2.min_span), math.log(l2.max_span)
    per_head = l2.decay == "head"
    count = kv_heads if per_head else head_dim
    if count == 1:
        low = high = (low + high) / 2
    # logit(1 - 1/span) = log(span - 1)
    logits = (torch.linspace(low, high, count, dtype=torch.float64).exp() - 1).log().float()
    return logits[:, None] if per_head else logits.repeat(kv_heads, 1)


class _Ema(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, decay: Tensor, documents: Documents, carry: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        dtype = _state_dtype(x)
        channels = x.shape[2:]
        rate = decay.to(dtype).expand(channels)
        buffer, state = _buffer(x, dtype)
        torch.mul(x, 1 - rate, out=state)
        if carry is None:
            state[:, 0] = x[:, 0]
        if documents.packed:
            fresh = _inner_starts(documents, x.dim())
            state[:, 1:] = torch.where(fresh, x[:, 1:], state[:, 1:])
        _scan(buffer, rate, documents, carry)
        _hold(state, documents, carry)
        last = state[:, -1].clone()
        ctx.save_for_backward(x, decay, state, carry)
        ctx.documents = documents
        return state.to(x.dtype), last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
        x, decay, state, carry = ctx.saved_tensors
        documents: Documents = ctx.documents
        rate = decay.to(state.dtype).expand(x.shape[2:])
        adjoint, grad_carry = _adjoint(grad, grad_last, rate, documents, carry is not None)
        grad_decay = None
        if ctx.needs_input_grad[1]:
            # ds_t/d decay = s_{t-1} - x_t, except at starts and on padding
            slope = torch.empty_like(state)
            torch.sub(state[:, :-1], x[:, 1:], out=slope[:, 1:])
            slope[:, 0] = 0 if carry is None else carry - x[:, 0]
            if documents.packed:
                slope[:, 1:].masked_fill_(_inner_starts(documents, x.dim()), 0)
            if documents.padding is not None:
                slope.masked_fill_(_as_mask(documents.padding, x.dim()), 0)
            grad_decay = slope.mul_(adjoint).sum(dim=(0, 1)).sum_to_size(decay.shape).to(decay.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = adjoint * (1 - rate)
            if carry is None:
                grad_x[:, 0] = adjoint[:, 0]
            if documents.packed:
                fresh = _inner_starts(documents, x.dim())
                grad_x[:, 1:] = torch.where(fresh, adjoint[:, 1:], grad_x[:, 1:])
            grad_x = grad_x.to(x.dtype)
        if grad_carry is not None:
            grad_carry = grad_carry.to(carry.dtype)
        return grad_x, grad_decay, None, grad_carry


class _PrefixSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, documents: Documents, carry: Tensor | None) -> tuple[Tensor, Tensor]:
        dtype = _state_dtype(x)
        buffer, state = _buffer(x, dtype)
        state.copy_(x)
        _scan(buffer, None, documents, carry)
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


def _chunk(sequence: int) -> int:
    return 2 ** round(math.log2(sequence) / 2 - 0.25)


def _buffer(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A contiguous [B, N*T, ...] buffer with a zeroed tail, and its [B, S, ...] view, not yet filled."""
    sequence = x.shape[1]
    chunk = _chunk(sequence)
    padded = -(-sequence // chunk) * chunk
    buffer = x.new_empty(x.shape[0], padded, *x.shape[2:], dtype=dtype)
    buffer[:, sequence:] = 0
    return buffer, buffer[:, :sequence]


def _as_mask(slots: Tensor, dims: int) -> Tensor:
    # [B, S] -> [B, S, 1...]
    return slots.view(slots.shape + (1,) * (dims - 2))


def _inner_starts(documents: Documents, dims: int) -> Tensor:
    return _as_mask(documents.starts[:, 1:], dims)


def _scan(
    buffer: Tensor, rate: Tensor | None, documents: Documents, carry: Tensor | None, reverse: bool = False
) -> None:
    """In place over [B, N*T, ...]: z_t += rate * z_{t-1}, not across a start; `carry` is z_{-1}, rate None is 1.

    `reverse` runs the adjoint: z_t += rate * z_{t+1} unless t+1 is a start, from the end.
    """
    batch, padded = buffer.shape[:2]
    sequence = documents.starts.shape[1]
    chunk = _chunk(sequence)
    # [B, N*T, ...] -> [B, N, T, C]
    z = buffer.view(batch, padded // chunk, chunk, -1)
    width = z.shape[3]
    factor = None if rate is None else rate.reshape(width)
    cut = None
    if documents.packed:
        # a cut before slot t (forward) or behind it (reverse); column 0 is the carry's business
        cut = torch.zeros(batch, padded, dtype=torch.bool, device=z.device)
        if reverse:
            cut[:, : sequence - 1] = documents.starts[:, 1:]
        else:
            cut[:, 1:sequence] = documents.starts[:, 1:]
        cut = cut.view(batch, padded // chunk, chunk, 1)

    steps = list(z.unbind(2))
    cuts = None if cut is None else list(cut.unbind(2))
    order = range(chunk - 1, -1, -1) if reverse else range(chunk)
    for before, now in pairwise(order):
        previous = steps[before]
        if cuts is not None:
            previous = previous.masked_fill(cuts[now], 0)
        _add(steps[now], previous, factor)

    # the state that enters each chunk; a cut anywhere inside stops the one that would leave it
    leaving = steps[order[-1]].unbind(1)
    broken = None if cut is None else cut.any(dim=2).unbind(1)
    power = None if factor is None else factor**chunk
    blocks = range(len(leaving) - 1, -1, -1) if reverse else range(len(leaving))
    state = z.new_zeros(batch, width) if carry is None else carry.to(z.dtype).reshape(batch, width)
    entering: list[Tensor] = [state] * len(leaving)
    for block in blocks:
        entering[block] = state
        through = state if broken is None else state.masked_fill(broken[block], 0)
        state = leaving[block].clone()
        _add(state, through, power)

    share = torch.stack(entering, dim=1)[:, :, None]
    if cut is not None:
        seen = cut.flip(2).cumsum(2).flip(2) if reverse else cut.cumsum(2)
        share = torch.where(seen == 0, share, 0)
    if factor is None:
        z.add_(share)
        return
    exponents = torch.arange(1, chunk + 1, device=z.device, dtype=z.dtype)
    powers = factor ** (exponents.flip(0) if reverse else exponents)[:, None]
    z.addcmul_(share, powers)


def _add(target: Tensor, source: Tensor, factor: Tensor | None) -> None:
    if factor is None:
        target.add_(source)
    else:
        target.addcmul_(source, factor)


def _hold(state: Tensor, documents: Documents, carry: Tensor | None) -> None:
    """Padding repeats the state of the last token before it."""
    if documents.padding is None:
        return
    rows, times, last = documents.held
    state[rows, times] = state[rows, last]
    for row in documents.empty:
        state[row] = 0 if carry is None else carry[row]


def _adjoint(
    grad: Tensor, grad_last: Tensor, rate: Tensor | None, documents: Documents, carried: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of every slot's scan input, [B, S, ...], and of the carry, from those of its state."""
    dtype = grad_last.dtype
    buffer, adjoint = _buffer(grad, dtype)
    adjoint.copy_(grad)
    adjoint[:, -1] += grad_last
    idle: dict[int, Tensor] = {}
    if documents.padding is not None:
        rows, times, last = documents.held
        behind = adjoint[rows, times]
        adjoint[rows, times] = 0
        adjoint.index_put_((rows, last), behind, accumulate=True)
        for row in documents.empty:
            idle[row] = adjoint[row].sum(dim=0)
            adjoint[row] = 0
    _scan(buffer, rate, documents, None, reverse=True)
    if not carried:
        return adjoint, None
    grad_carry = adjoint[:, 0].clone() if rate is None else adjoint[:, 0] * rate
    for row, value in idle.items():
        grad_carry[row] = value
    return adjoint, grad_carry
