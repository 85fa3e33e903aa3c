"""The block core for the last tokens of rows whose chunks a view remembers: the open chunk's new tokens alone.

What ops.block_attention computes for every slot of whole chunks, for those slots that somebody needs; one product over
everything that is seen. Shapes: B batch, S slots at hand of one chunk, T of them with queries, C chunk size, h halo
chunks, N chunks before those at hand, w = window / C, H query heads, G KV heads, F = H/G, d channels, M pages of each KV
head, Y keys in all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mka_megatron.memory.chunks import Chunks
from mka_megatron.memory.documents import Documents
from mka_megatron.memory.view import Pages


def continued_block(
    q: Tensor, k: Tensor, v: Tensor, summaries: tuple[Tensor, Tensor] | None, pages: Pages | None, bias: Tensor | None,
    *, documents: Documents, chunks: Chunks, window: int, scale: float,
) -> Tensor:  # fmt: skip
    """The attention of the tokens that are new at hand, as ops.block_attention defines it; without a gradient.

    Args:
        q: [B, S, H, d] rotated, of the one chunk at hand.
        k, v: [B, h*C + S, G, d] of the halo and the chunk at hand.
        summaries: [B, N + 1, G, d] each, as there; pages: those that this chunk recalls; bias: [B, S, 1 or G, 3].
        documents: the slots at hand; their `continued` says which are new.
        window: w * C tokens.

    Returns:
        [B, S, H, d]; 0 on padding and in slots that are at hand again in all rows.
    """
    rows = documents.continued
    assert rows is not None and chunks.count == 1
    wide, groups = torch.promote_types(q.dtype, torch.float32), k.shape[2]
    first = min((again for again, count in zip(rows.again, rows.tokens, strict=True) if count), default=0)
    # [B, T, H, d] -> [B, G, F, T, d]
    queries = q[:, first:].to(wide).unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)
    visible, keys, values = [_window(q.shape[1], first, k, chunks)], [k.transpose(1, 2)], [v.transpose(1, 2)]
    levels = [(0, k.shape[1])]
    seen = chunks.first + 1 - window // chunks.size
    if summaries is not None and seen > 0:
        keys.append(summaries[0][:, :seen].transpose(1, 2))
        values.append(summaries[1][:, :seen].transpose(1, 2))
        visible.append((chunks.lengths[:, None, None, :seen] > 0).expand(-1, groups, queries.shape[3], -1))
        levels.append((1, seen))
    if pages is not None and pages.k.shape[2]:
        keys.append(pages.k.flatten(2, 3))
        values.append(pages.v.flatten(2, 3))
        tokens = torch.arange(chunks.size, device=q.device) < pages.lengths[..., None]
        visible.append(tokens.flatten(2)[:, :, None].expand(-1, -1, queries.shape[3], -1))
        levels.append((2, pages.k.shape[2] * chunks.size))
    # [B, G, T, Y]
    mask = torch.cat([each.expand(-1, groups, -1, -1) for each in visible], dim=-1)
    scores = torch.einsum("bgftd,bgyd->bgfty", queries * scale, torch.cat(keys, dim=2).to(wide))
    if bias is not None:
        # [B, T, 1 or G, 3] -> [B, 1 or G, T, 3] -> [B, 1 or G, 1, T, Y]
        of_level = bias[:, first:].to(wide).transpose(1, 2)
        of_key = [of_level[..., level, None].expand(-1, -1, -1, count) for level, count in levels]
        scores += torch.cat(of_key, dim=-1)[:, :, None]
    scores = scores.masked_fill(~mask[:, :, None], float("-inf"))
    largest = scores.amax(dim=-1, keepdim=True)
    weights = (scores - largest.masked_fill(largest == float("-inf"), 0)).exp()
    total = weights.sum(dim=-1, keepdim=True)
    out = torch.einsum("bgfty,bgyd->bgftd", weights, torch.cat(values, dim=2).to(wide))
    out = out / total.masked_fill(total == 0, 1)
    # [B, G, F, T, d] -> [B, T, H, d] -> [B, S, H, d]
    out = F.pad(out.permute(0, 3, 1, 2, 4).flatten(2, 3).to(q.dtype), (0, 0, 0, 0, first, 0))
    return out if documents.padding is None else out.masked_fill(documents.padding[..., None, None], 0)


def _window(slots: int, first: int, k: Tensor, chunks: Chunks) -> Tensor:
    """[B, 1, T, h*C + S] bool: the window's slots that each query sees."""
    halo = k.shape[1] - slots
    before = halo // chunks.size
    place = torch.arange(chunks.size, device=k.device)
    # [B, h, C] -> [B, h*C]
    held = chunks.lengths[:, chunks.first - before : chunks.first, None]
    earlier = (place < held).flatten(1)
    own = torch.arange(slots, device=k.device)
    of_chunk = (own <= own[first:, None]) & (own < chunks.lengths[:, chunks.first, None, None])
    return torch.cat((earlier[:, None].expand(-1, slots - first, -1), of_chunk), dim=-1)[:, None]
