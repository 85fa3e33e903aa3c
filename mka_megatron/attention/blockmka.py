"""Block-MKA: a causal window, one summary per earlier chunk and the recalled chunks under one softmax (section 5.3).

Sub-quadratic: S * (window + R*C) + S^2 / 2C scores. Local-MKA is this without L3, Global-MKA with it.

Shapes: B batch, S slots at hand, H query heads, G KV heads, d head channels, C chunk size, n chunks at hand,
N chunks of the row, R recalled chunks, L levels.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from mka_megatron.attention.continued_block import continued_block
from mka_megatron.attention.inputs import Finish, RouteInputs
from mka_megatron.config.schema import Config
from mka_megatron.memory import routing
from mka_megatron.memory.chunks import Chunks
from mka_megatron.memory.documents import Documents
from mka_megatron.memory.hashing import pooled, select, select_once
from mka_megatron.memory.view import Carry, Memory, OpenChunks, Summaries, Update
from mka_megatron.ops.block_attention import block_attention


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
    memory: Memory,
) -> tuple[Tensor, Tensor | None, Update]:
    """The block core over raw keys and values.

    Args:
        q, k, v: [B, S, H, d], [B, S, G, d], [B, S, G, d], raw.
        route: the gate's output, of which `core` is read; None where L1 is the only level.
        memory: chunks of the rows, the view of earlier slots and (with L3) the selector.

    Returns:
        ([B, S, H, d], the levels' weights for monitoring, detached, [B, S, G, L] or None, the memory's update).
        Raises ValueError for routing.mode top1.
    """
    logits = None if route is None else route.core
    return block_core(q, k, v, finish, logits, documents, scale, config, memory)


def block_core(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    finish: Finish,
    logits: Tensor | None,
    documents: Documents,
    scale: float,
    config: Config,
    memory: Memory,
    carry_k: Carry | None = None,
    carry_v: Carry | None = None,
) -> tuple[Tensor, Tensor | None, Update]:
    """Summaries, recall and the one softmax over keys and values that may have been fused.

    Args:
        q, k, v: [B, S, H, d], [B, S, G, d], [B, S, G, d], before norm and RoPE.
        logits: [B, S, L] or [B, S, G, L] of the enabled levels among (L1, L2, L3); None: no bias.
        carry_k, carry_v: L2's states after the last slot, for the update.

    Returns:
        as :func:`attend`.
    """
    levels, chunks, view, selector = config.memory_hierarchy, memory.chunks, memory.view, memory.selector
    if chunks is None:
        raise ValueError("the block core works on chunks: pass memory.chunks.")
    window = (levels.l1.window or 0) // chunks.size
    q, k = finish.norm_q(q), finish.norm_k(k)
    if view.open is not None:
        out, weights, selected = _open_chunks(q, k, v, finish, logits, documents, scale, config, memory, view.open)
        return out, weights, Update(None, None, None, None, carry_k, carry_v, selected)

    mean_k, mean_v, signature = pooled(k, v, chunks, selector, backend=memory.recall_backend)
    summaries = Summaries(finish.rotate(mean_k, chunks.at_hand(chunks.last)), mean_v, signature)
    before = view.summaries(summaries)
    selected = queries = None
    if selector is not None:
        assert before.signature is not None  # a view joins what it is given
        selected, queries = select(
            q, before.signature, documents, chunks, selector, view.queries, window, backend=memory.recall_backend
        )

    q, k = finish.rotate(q, None), finish.rotate(k, None)
    halo_k, halo_v = view.halo(k, v, window - 1)
    pages = None if selected is None else view.pages(selected, halo_k.shape[1] // chunks.size, k, v)
    bias, weights = _bias(logits, selected, documents, chunks, window, config)
    near = torch.cat((halo_k, k), dim=1), torch.cat((halo_v, v), dim=1)
    far = (before.k, before.v) if levels.l2.enabled else None, pages
    sizes: dict[str, Any] = {"chunks": chunks, "window": window * chunks.size, "scale": scale}
    if documents.continued is not None and chunks.count == 1:
        out = continued_block(q, *near, *far, bias, documents=documents, **sizes)
    else:
        out = block_attention(q, *near, *far, bias, **sizes, backend=memory.backend)
    update = Update(
        k.detach(),
        v.detach(),
        Summaries(summaries.k.detach(), summaries.v.detach(), summaries.signature),
        queries,
        carry_k,
        carry_v,
        selected,
    )
    return out, weights, update


def _open_chunks(
    q: Tensor, k: Tensor, v: Tensor, finish: Finish, logits: Tensor | None, documents: Documents, scale: float,
    config: Config, memory: Memory, opened: OpenChunks,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """The next tokens of open chunks: what these select was decided before them, and nothing of them is pooled yet.

    Args:
        q, k: normed; the others as for :func:`block_core`.

    Returns:
        (output, the routing weights, what is recalled).
    """
    chunks, selector = memory.chunks, memory.selector
    assert chunks is not None
    window = (config.memory_hierarchy.l1.window or 0) // chunks.size
    selected = None
    if selector is not None:
        backend = memory.recall_backend
        selected = opened.selected(
            partial(select_once, selector=selector, window_chunks=window, backend=backend)
        )
    q, k = finish.rotate(q, None), finish.rotate(k, None)
    near, known = opened.extend(k, v), opened.summaries
    halo = (near[0].shape[1] - 1) // chunks.size
    pages = None if selected is None else memory.view.pages(selected, halo, k, v)
    bias, weights = _bias(logits, selected, documents, chunks, window, config)
    far = None if known is None or not config.memory_hierarchy.l2.enabled else (known.k, known.v)
    out = continued_block(
        q, *near, far, pages, bias, documents=documents, chunks=chunks, window=window * chunks.size, scale=scale
    )
    return out, weights, selected


def _bias(
    logits: Tensor | None, selected: Tensor | None, documents: Documents, chunks: Chunks, window: int, config: Config
) -> tuple[Tensor | None, Tensor | None]:
    """The three levels' bias [B, S, G, 3], and the routing weights [B, S, G, L] of the enabled ones."""
    if logits is None:
        return None, None
    memory = config.memory_hierarchy
    enabled = [0] + [1] * memory.l2.enabled + [2] * memory.l3.enabled
    # [B, n, G or 1, L] -> [B, S, G or 1, L]
    available = _available(selected, documents, chunks, window)[..., enabled]
    if chunks.count > 1:
        available = available.repeat_interleave(chunks.size, dim=1)[:, : logits.shape[1]]
    logits, available = torch.broadcast_tensors(logits if logits.dim() == 4 else logits[:, :, None], available)
    bias = routing.score_bias(logits, available, config.routing.mode)
    full = bias.new_zeros(*bias.shape[:3], 3)
    full[..., enabled] = bias
    return full, bias.detach().softmax(dim=-1)


def _available(selected: Tensor | None, documents: Documents, chunks: Chunks, window: int) -> Tensor:
    """[B, n, G or 1, 3] bool: which levels hold something for the queries of each chunk at hand."""
    l2 = documents.once(_summarised, chunks, window)
    l3 = torch.zeros_like(l2) if selected is None else (selected >= 0).any(dim=-1)
    l2, l3 = torch.broadcast_tensors(l2, l3)
    return torch.stack((torch.ones_like(l2), l2, l3), dim=-1)


def _summarised(documents: Documents, chunks: Chunks, window: int) -> Tensor:
    """[B, n, 1] bool: the queries of each chunk at hand see a summary."""
    numbers = torch.arange(chunks.documents.shape[1], device=chunks.documents.device)
    own = chunks.at_hand(chunks.documents)
    # [B, n, N]: summaries that a chunk's queries see
    past = numbers <= numbers[chunks.first : chunks.first + chunks.count, None] - window
    summaries = past & (chunks.documents[:, None] == own[:, :, None]) & (own >= 0)[:, :, None]
    return summaries.any(dim=-1)[:, :, None]
