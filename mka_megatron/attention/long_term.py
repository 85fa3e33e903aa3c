"""L3 under the dense core: one long-term key and value per token, out of the means of recalled chunks.

Shapes: B batch, S slots at hand, H query heads, G KV heads, d head channels, C chunk size, n chunks at hand,
N chunks of the row, R recalled chunks, L levels.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mka_megatron.attention.inputs import Finish
from mka_megatron.config.schema import Config
from mka_megatron.config.variants import block_core
from mka_megatron.memory.chunks import Chunks
from mka_megatron.memory.documents import Documents
from mka_megatron.memory.hashing import pooled, select, select_once
from mka_megatron.memory.view import Memory, Summaries, Update


def l3_level(
    q: Tensor, k: Tensor, v: Tensor, finish: Finish, documents: Documents, scale: float, memory: Memory
) -> tuple[Tensor, Tensor, Update]:
    """K3 = sum_r w_r Kbar_r and V3 = sum_r w_r Vbar_r with w = softmax_r(scale * qbar . Kbar_r).

    r: the R chunks, of those before the token's chunk in its document, that its chunk selects. Kbar, Vbar: means
    of a chunk's raw, unfused keys and values. qbar: the mean raw query of a KV head's group. The weights sum to one,
    so that a bias of the projection passes.

    Args:
        q, k, v: [B, S, H, d], [B, S, G, d], [B, S, G, d], raw.
        finish: its norms are those of the queries and keys that select.
        scale: 1/sqrt(d).
        memory: chunks, selector and the view of the slots before.

    Returns:
        K3, V3: [B, S, G, d] raw, dtypes of k and v; 0 in a document's first chunk, where :func:`available` is False;
        and the memory's update, without L2's states. Raises ValueError where the memory has no chunks or selector.
    """
    chunks, selector = memory.chunks, memory.selector
    if chunks is None or selector is None:
        raise ValueError("memory_hierarchy.l3.enabled is true: pass a memory with chunks and a selector.")
    backend, opened = memory.recall_backend, memory.view.open
    if opened is not None:
        update = Update(None, None, None, None, None, None)
        chosen = opened.selected(partial(select_once, selector=selector, window_chunks=1, backend=backend))
        known = opened.summaries
        if known is None or chosen is None:
            return torch.zeros_like(k), torch.zeros_like(v), update
        return *_mixed(q, k, v, known, chosen, chunks, scale), update
    keys = finish.norm_k(k)
    own = Summaries(*pooled(k, v, chunks, selector, None if keys is k else keys, backend=backend))
    means = memory.view.summaries(own)
    assert means.signature is not None
    selected, last = select(
        finish.norm_q(q), means.signature, documents, chunks, selector, memory.view.queries, 1, backend=backend
    )
    detached = Summaries(own.k.detach(), own.v.detach(), own.signature)
    return *_mixed(q, k, v, means, selected, chunks, scale), Update(None, None, detached, last, None, None)


def _mixed(
    q: Tensor, k: Tensor, v: Tensor, means: Summaries, selected: Tensor, chunks: Chunks, scale: float
) -> tuple[Tensor, Tensor]:
    """K3 and V3 [B, S, G, d] of the chunks `selected` [B, n, G, R]."""
    groups = k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    none = (selected < 0).transpose(2, 3)[..., None]
    # [B, N, G, d] -> [B, n, R, G, d]; what was not recalled may be of another document and must not be touched
    row = torch.arange(len(selected), device=selected.device)[:, None, None, None]
    group = torch.arange(groups, device=selected.device)
    index = (row, selected.transpose(2, 3).clamp_min(0), group)
    recalled_k, recalled_v = (x[index].to(wide).masked_fill(none, 0) for x in (means.k, means.v))

    # [B, S, H, d] -> [B, S, G, H/G, d] -> [B, n, C, G, d]
    mean_q = q.to(wide).unflatten(2, (groups, -1)).mean(dim=3)
    missing = chunks.count * chunks.size - q.shape[1]
    mean_q = F.pad(mean_q, (0, 0, 0, 0, 0, missing)).unflatten(1, (-1, chunks.size))
    scores = torch.einsum("bncgd,bnrgd->bngcr", mean_q, recalled_k) * scale
    blind = none.all(dim=2)[..., None]
    # [B, n, R, G, 1] -> [B, n, G, 1, R]
    scores = scores.masked_fill(none.permute(0, 1, 3, 4, 2) & ~blind, float("-inf"))
    weights = scores.softmax(dim=-1).masked_fill(blind, 0)
    # [B, n, C, G, d] -> [B, S, G, d]
    mixed = (torch.einsum("bngcr,bnrgd->bncgd", weights, x).flatten(1, 2) for x in (recalled_k, recalled_v))
    level_k, level_v = (x[:, : q.shape[1]] for x in mixed)
    return level_k.to(k.dtype), level_v.to(v.dtype)


def available(logits: Tensor, config: Config, memory: Memory) -> Tensor | None:
    """Which levels hold something for each token, to be broadcast to `logits` [B, S, L] or [B, S, G, L]: L3 from a
    document's second chunk on, the others always. None: every level does."""
    if not mixes_l3(config):
        return None
    assert memory.chunks is not None
    # [B, n] -> [B, S]
    late = _slots(memory.chunks, memory.chunks.first_positions > 0)[:, : logits.shape[1]]
    always = [torch.ones_like(late)] * (logits.shape[-1] - 1)
    levels = torch.stack([*always, late], dim=-1)
    return levels if logits.dim() == 3 else levels[:, :, None]


def mixes_l3(config: Config) -> bool:
    """L3 is a level that is fused or mixed, and not recalled tokens under the block core."""
    return config.memory_hierarchy.l3.enabled and not block_core(config)


def _slots(chunks: Chunks, table: Tensor) -> Tensor:
    """A [B, N] table of chunks for the slots at hand, [B, n*C]."""
    return chunks.at_hand(table).repeat_interleave(chunks.size, dim=1)
