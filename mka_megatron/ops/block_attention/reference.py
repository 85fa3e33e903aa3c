"""The block core in PyTorch: the specification, and what runs where there is no GPU.

Work and memory are linear in S but for the S²/2C scores of the summaries, of which one block exists at a time.
A block is some chunks of one document: the chunks that each of them sees token by token are gathered into one
tile of keys per (chunk, KV head); the document's summaries serve all of them. No block mixes two documents, so
another document's contents are multiplied by nothing, not even by zero. Shapes depend on S and the chunk table
alone, and sums are in a fixed order (on CUDA index_add_ has none).

Shapes: B batch, S slots at hand, C chunk size, n chunks at hand, H query heads, G KV heads, F = H/G query heads of
a KV head, d channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mka_megatron.ops.block_attention.blocks import block_backward, block_forward, blocks
from mka_megatron.ops.block_attention.layout import Layout, Run
from mka_megatron.ops.block_attention.rows import (
    Gradients,
    keep,
    of_arguments,
    operands,
    to_heads,
    to_slots,
    wide_dtype,
)

_INFINITY = float("inf")


def attention(
    layout: Layout,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    summaries: tuple[Tensor, Tensor] | None,
    pages: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    bias: Tensor | None,
    lengths: Tensor,
    documents: Tensor,
) -> Tensor:
    """:func:`block_attention` over arguments that fit together; pages: (k, v, lengths, index)."""
    summary_k, summary_v = summaries or (None, None)
    page_k, page_v, page_lengths, index = pages or (None, None, None, None)
    differentiable = (q, k, v, summary_k, summary_v, page_k, page_v, bias)
    return _BlockAttention.apply(
        layout, layout.runs(documents), *differentiable, lengths, page_lengths, index
    )


class _BlockAttention(torch.autograd.Function):
    """Keeps its arguments and the logsumexp; the backward computes the probabilities again."""

    @staticmethod
    def forward(ctx: Any, layout: Layout, runs: list[list[Run]], *tensors: Any) -> Tensor:
        q, k, *_ = tensors
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        # [B, G, n, F, C]; +inf: a query that sees nothing has probabilities of 0
        shape = (len(q), k.shape[2], layout.count, q.shape[2] // k.shape[2], layout.size)
        lse = torch.full(shape, _INFINITY, dtype=wide_dtype(q), device=q.device)
        for number, of_row in enumerate(runs):
            row = operands(layout, tensors, number)
            found = torch.zeros_like(row.q)
            for block in blocks(row, of_row):
                found[:, block.at], lse[number, :, block.at] = block_forward(row, block)
            out[number] = to_slots(keep(found, row.tokens[:, None]), q.shape[1])
        ctx.save_for_backward(*tensors, lse)
        ctx.layout, ctx.runs = layout, runs
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, lse = ctx.saved_tensors
        layout = ctx.layout
        # q, k, v, summaries' k and v, pages' k and v, bias
        grads = [
            torch.zeros_like(x, memory_format=torch.contiguous_format) if needed else None
            for x, needed in zip(tensors[:8], ctx.needs_input_grad[2:10], strict=True)
        ]
        for number, of_row in enumerate(ctx.runs):
            row = operands(layout, tensors, number)
            found = Gradients.zeros(row)
            row_grad = keep(to_heads(grad[number], layout, len(row.keys)), row.tokens[:, None])
            for block in blocks(row, of_row):
                block_backward(row, block, row_grad[:, block.at], lse[number, :, block.at], found)
            for total, part in zip(
                grads, of_arguments(row, found, tensors[0][number], tensors[1][number]), strict=True
            ):
                if total is not None and part is not None:
                    total[number] = part
        return None, None, *grads, None, None, None
