"""Causal softmax attention with grouped KV heads over packed documents (mha, mqa, gqa; the core of the others).

Shapes: B batch, S sequence, H query heads, G KV heads, d key channels, e value channels. Query heads of a group
lie next to each other: head h reads KV head h // (H/G).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mka_megatron.attention.continued import continued_attention
from mka_megatron.attention.inputs import Finish, RouteInputs
from mka_megatron.attention.part import part_attention
from mka_megatron.attention.sdpa import causal_sdpa
from mka_megatron.config.schema import Config
from mka_megatron.memory.documents import Documents
from mka_megatron.memory.view import NO_MEMORY, Memory, View


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    finish: Finish,
    route: RouteInputs | None,
    documents: Documents,
    scale: float,
    config: Config,
    memory: Memory = NO_MEMORY,
) -> tuple[Tensor, None]:
    """Plain attention: finish (norm, RoPE), then the causal core; no route.

    Args:
        q, k, v: [B, S, H, d], [B, S, G, d], [B, S, G, e], raw.
        memory: its view of the slots before is read.

    Returns:
        ([B, S, H, e], None).
    """
    return causal_attention(finish.q(q), finish.k(k), v, documents, scale, memory.view), None


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float, view: View = NO_MEMORY.view, level: int = 0
) -> Tensor:
    """softmax(scale * q k^T) v, causal within each document, 0 on padding.

    One batched SDPA call when every row is one document, else one call per document: never a mask tensor,
    never S x S scores, KV heads repeated only where SDPA has no grouped kernel (fp32 on CUDA).

    Args:
        q: [B, S, H, d] floating point, last axis contiguous. k: [B, S, G, d]. v: [B, S, G, e]; e may differ from d.
        documents: boundaries of the [B, S] slots.
        scale: factor on the scores, usually 1/sqrt(d).
        view: where `documents` are a part of rows, what has the keys and values of the slots before.
        level: of the mixture, whose keys and values these are.

    Returns:
        [B, S, H, e], dtype of q. Raises ValueError when G does not divide H.
    """
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads over {k.shape[2]} KV heads: H must be a multiple of G.")
    channels = v.shape[3]
    # the flash kernels want equal widths; zero channels change neither scores nor the values kept
    width = max(q.shape[3], channels)
    k, v = view.keys_values(k, v, level)
    q, k, v = (_widen(x, width) for x in (q, k, v))
    if documents.continued is not None:
        return continued_attention(q, k, v, documents, scale)[..., :channels]
    if documents.whole is not None:
        return part_attention(q, k, v, documents, scale)[..., :channels]
    if documents.gaps:
        moved = documents.compacted
        out = causal_attention(moved.take(q), moved.take(k), moved.take(v), moved.documents, scale)
        return moved.put(out)[..., :channels]
    if documents.whole_rows:
        return causal_sdpa(q, k, v, scale)[..., :channels]

    # one split per row, so that the backward is one concatenation and not a sum of zero-filled slices
    rows = []
    sizes = _sizes(documents, q.shape[0], q.shape[1])
    for q_row, k_row, v_row, row in zip(q.unbind(0), k.unbind(0), v.unbind(0), sizes, strict=True):
        lengths = [length for length, _ in row]
        parts = zip(q_row.split(lengths), k_row.split(lengths), v_row.split(lengths), row, strict=True)
        outs = [
            causal_sdpa(a[None], b[None], c[None], scale)[0] if tokens else torch.zeros_like(a)
            for a, b, c, (_, tokens) in parts
        ]
        rows.append(torch.cat(outs))
    return torch.stack(rows)[..., :channels]


def _sizes(documents: Documents, batch: int, sequence: int) -> list[list[tuple[int, bool]]]:
    """Per row, the lengths of its documents and of the padding between them, in order: (length, is a document)."""
    sizes: list[list[tuple[int, bool]]] = [[] for _ in range(batch)]
    at = [0] * batch
    for row, begin, end in documents.spans:
        if begin > at[row]:
            sizes[row].append((begin - at[row], False))
        sizes[row].append((end - begin, True))
        at[row] = end
    for row, end in enumerate(at):
        if end < sequence:
            sizes[row].append((sequence - end, False))
    return sizes


def _widen(x: Tensor, width: int) -> Tensor:
    return x if x.shape[3] == width else F.pad(x, (0, width - x.shape[3]))
