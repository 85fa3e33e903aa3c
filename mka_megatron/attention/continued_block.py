"""The block core for the last tokens of rows whose chunks a view remembers: the new tokens of the one chunk at hand.

What ops.block_attention computes for every slot of whole chunks, for those slots that somebody needs; one softmax over
everything that is seen, each part of it where it lies. Shapes: B batch, S slots at hand, T of them with queries, C chunk
size, h halo chunks, N chunks before the one at hand, w = window / C, H query heads, G KV heads, F = H/G, d channels, M
pages of each KV head, Y keys of a part.
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
        q: [B, S, H, d] rotated, of the one chunk at hand; slot 0 is its first, or where `documents.continued.opened`
            says.
        k, v: [B, h*C + S', G, d] of the halo and the chunk at hand, its earlier tokens included.
        summaries: [B, >= N, G, d] each, as there; pages: those that this chunk recalls; bias: [B, S, 1 or G, 3].
        documents: the slots at hand; their `continued` says which are new.
        window: w * C tokens.

    Returns:
        [B, S, H, d]; 0 on padding and in slots that are at hand again in all rows.
    """
    rows = documents.continued
    assert rows is not None and chunks.count == 1
    wide, groups = torch.promote_types(q.dtype, torch.float32), k.shape[2]
    first = min((again for again, count in zip(rows.again, rows.tokens, strict=True) if count), default=0)
    # [B, T, H, d] -> [B, G, F, T, d] -> [B, G, F*T, d]
    queries = q[:, first:].to(wide).unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)
    share = queries.shape[2]
    queries = (queries * scale).flatten(2, 3)
    # of each part: level, keys and values [B, G, Y, d], visible [B, 1 or G, 1 or T, Y]
    near = documents.once(_window, chunks, first, k.shape[1])
    parts = [(0, k.transpose(1, 2), v.transpose(1, 2), near)]
    seen = chunks.first + 1 - window // chunks.size
    if summaries is not None and seen > 0:
        past_k, past_v = (x[:, :seen].transpose(1, 2) for x in summaries)
        parts.append((1, past_k, past_v, documents.once(_summarised, chunks, seen)))
    if pages is not None and pages.k.shape[2]:
        parts.append((2, pages.k.flatten(2, 3), pages.v.flatten(2, 3), pages.tokens[:, :, None]))
    # [B, T, 1 or G, 3] -> [B, 1 or G, 1, T, 3]
    of_level = None if bias is None else bias[:, first:].to(wide).transpose(1, 2)[:, :, None]
    found = []
    for level, keys, _, visible in parts:
        scores = (queries @ keys.to(wide).transpose(2, 3)).unflatten(2, (share, -1))
        if of_level is not None:
            scores = scores + of_level[..., level, None]
        found.append(scores if visible is None else scores.masked_fill(~visible[:, :, None], float("-inf")))
    scores = torch.cat(found, dim=-1)
    largest = scores.amax(dim=-1, keepdim=True)
    weights = (scores - largest.masked_fill(largest == float("-inf"), 0)).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    weights = (weights / total.masked_fill(total == 0, 1)).flatten(2, 3)
    begin, out = 0, torch.zeros_like(queries)
    for _, _, values, _ in parts:
        end = begin + values.shape[2]
        out += weights[..., begin:end] @ values.to(wide)
        begin = end
    # [B, G, F*T, d] -> [B, T, H, d] -> [B, S, H, d]
    out = out.unflatten(2, (share, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3).to(q.dtype)
    out = F.pad(out, (0, 0, 0, 0, first, 0)) if first else out
    return out if documents.padding is None else out.masked_fill(documents.padding[..., None, None], 0)


def _window(documents: Documents, chunks: Chunks, first: int, slots: int) -> Tensor:
    """[B, 1, T, h*C + S'] bool: the window's slots that each query sees, of `slots`; T from slot `first` at hand on."""
    rows = documents.continued
    assert rows is not None
    before = (slots - 1) // chunks.size
    place = torch.arange(chunks.size, device=chunks.lengths.device)
    # [B, h, C] -> [B, h*C]
    held = chunks.lengths[:, chunks.first - before : chunks.first, None]
    earlier = (place < held).flatten(1)
    own = place[: slots - before * chunks.size]
    opened = torch.tensor(rows.opened or (0,) * len(rows.tokens), device=own.device)[:, None]
    # [B, T]
    query = opened + torch.arange(first, max(rows.tokens), device=own.device)
    of_chunk = (own <= query[..., None]) & (own < chunks.lengths[:, chunks.first, None, None])
    return torch.cat((earlier[:, None].expand(-1, query.shape[1], -1), of_chunk), dim=-1)[:, None]


def _summarised(documents: Documents, chunks: Chunks, seen: int) -> Tensor:
    """[B, 1, 1, Y] bool: chunks, of the first `seen`, that hold a token."""
    return (chunks.lengths[:, :seen] > 0)[:, None, None]
