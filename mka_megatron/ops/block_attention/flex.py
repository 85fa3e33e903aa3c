"""The block core by torch's FlexAttention: for GPUs where there is no kernel of our own.

One list of keys, in blocks of C: the halo and the slots at hand, the pages, the summaries. A table says which block
a query chunk sees at which level; the block mask lists those blocks, and the bias is added by that level. The F
query heads of a KV head lie next to each other in one block of queries, so that they share the lists.

Compiled on CUDA, whose gradient of the bias is summed by atomics: equal inputs give gradients equal to rounding only.
Eager elsewhere, over every pair, for tests; there is no backward on a CPU. Padding may hold NaN, other documents'
summaries may not: blocks of them are shared.

Shapes: B batch, S slots at hand, C chunk size, n chunks at hand, h halo chunks, M pages, H query heads, G KV heads,
F = H/G, d channels, K key blocks: h + n of tokens, M of pages, U of summaries.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from mka_megatron.ops.block_attention.layout import Layout

_WINDOW, _SUMMARIES, _RECALLED = range(3)


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
    size, count, groups = layout.size, layout.count, k.shape[2]
    slots = torch.arange(size, device=q.device)
    begin, end = layout.first - layout.halo, layout.first + layout.count
    held = lengths[:, begin:end]
    # [B, n, 1, 1, C, 1]
    real = (slots < held[:, layout.halo :, None])[:, :, None, None, :, None]

    # [B, G, K] tokens of each key block; a summary is a token of its block
    tokens = [held[:, None].expand(-1, groups, -1)]
    keys, values = ([_blocks(x, size)] for x in (k, v))
    if pages is not None and pages[0].shape[2]:
        tokens.append(pages[2])
        keys.append(pages[0])
        values.append(pages[1])
    seen = None
    if summaries is not None and end > layout.window:
        number = end - layout.window
        seen = _summaries_seen(layout, documents, number)
        tokens.append(seen.new_full((len(q), groups, seen.shape[2]), size, dtype=torch.int64))
        for parts, x in zip((keys, values), summaries, strict=True):
            kept = (documents[:, :number] >= 0)[..., None, None]
            parts.append(_blocks(torch.where(kept, x[:, :number], 0), size))
    filled = torch.cat(tokens, dim=2)
    level = _levels(layout, documents, None if pages is None else pages[3], seen, filled.shape[2], groups)

    # [B, S, H, d] -> [B, n, C, G, F, d] -> [B, n, G, F, C, d] -> [B, G, n*F*C, d]
    q_blocks = _padded(q, size).unflatten(1, (-1, size)).unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2, 5)
    fan = q_blocks.shape[3]
    queries = torch.where(real, q_blocks, 0).transpose(1, 2).flatten(2, 4)
    used = (slots < filled[..., None])[..., None]
    # [B, G, K, C, d] -> [B, G, K*C, d]
    stored = [torch.where(used, torch.cat(x, dim=2), 0).flatten(2, 3) for x in (keys, values)]
    mask = _block_mask(layout, documents, level, filled, seen, fan)
    score = None if bias is None else _bias_by_level(layout, level, _padded(bias, size), fan)
    out = _attention(q.device.type)(queries, *stored, score_mod=score, block_mask=mask, scale=layout.scale)
    # [B, G, n*F*C, d] -> [B, n, G, F, C, d] -> [B, S, H, d]
    out = torch.where(real, out.unflatten(2, (count, fan, size)).transpose(1, 2), 0)
    return out.permute(0, 1, 4, 2, 3, 5).flatten(3, 4).flatten(1, 2)[:, : q.shape[1]]


@cache
def _attention(device: str) -> Callable[..., Tensor]:
    return torch.compile(flex_attention) if device == "cuda" else flex_attention  # type: ignore[return-value]


def _padded(x: Tensor, size: int) -> Tensor:
    """[B, S, Y, Z] -> [B, n*C, Y, Z]."""
    return F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % size))


def _blocks(x: Tensor, size: int) -> Tensor:
    """[B, T, G, d] -> [B, G, ceil(T/C), C, d], zeros behind the end."""
    return _padded(x, size).unflatten(1, (-1, size)).permute(0, 3, 1, 2, 4)


def _summaries_seen(layout: Layout, documents: Tensor, number: int) -> Tensor:
    """[B, n, U, C] bool: the summaries that each chunk at hand sees, in blocks."""
    own = torch.arange(layout.first, layout.first + layout.count, device=documents.device)
    others = torch.arange(number, device=documents.device)
    seen = (others <= own[:, None] - layout.window) & (documents[:, None, :number] >= 0)
    seen = seen & (documents[:, own, None] == documents[:, None, :number])
    return F.pad(seen, (0, -number % layout.size)).unflatten(2, (-1, layout.size))


def _levels(
    layout: Layout, documents: Tensor, index: Tensor | None, seen: Tensor | None, blocks: int, groups: int
) -> Tensor:
    """[B, G, n, K] int8: the level at which a query chunk sees a key block, -1 where it does not."""
    own = torch.arange(layout.first, layout.first + layout.count, device=documents.device)
    others = torch.arange(layout.first - layout.halo, layout.first + layout.count, device=documents.device)
    near = (others <= own[:, None]) & (others > own[:, None] - layout.window)
    near = near & (documents[:, own, None] == documents[:, None, others]) & (documents[:, None, others] >= 0)
    batch, (chunks, held) = len(documents), near.shape[1:]
    # one block more, for the recalled chunks that are none
    level = torch.full((batch, groups, chunks, blocks + 1), -1, dtype=torch.int8, device=documents.device)
    if index is not None:
        # [B, n, G, R] -> [B, G, n, R]
        level.scatter_(3, torch.where(index < 0, blocks, index).transpose(1, 2), _RECALLED)
    level[..., :held].masked_fill_(near[:, None], _WINDOW)
    if seen is not None:
        level[..., blocks - seen.shape[2] : blocks].masked_fill_(seen.any(dim=3)[:, None], _SUMMARIES)
    return level[..., :blocks].contiguous()


def _block_mask(
    layout: Layout, documents: Tensor, level: Tensor, filled: Tensor, seen: Tensor | None, fan: int
) -> BlockMask:
    """The lists of key blocks, those seen whole apart from those in part, and the rule for single pairs."""
    size, device = layout.size, level.device
    own = torch.arange(layout.count, device=device)
    whole = (level >= 0) & (filled == size)[:, :, None]
    whole[:, :, own, own + layout.halo] = False

    # [B, G, K*C]: whose a key is, -1 where there is none. The level says whose tokens are: they are anybody's
    anybody = -2
    owner = torch.where(torch.arange(size, device=device) < filled[..., None], anybody, -1).flatten(2)
    # [K*C]: the first query slot that sees a key
    since = torch.arange(owner.shape[2], device=device) - layout.halo * size
    since = since.masked_fill(since >= layout.count * size, 0)
    if seen is not None:
        number = torch.arange(seen.shape[2] * size, device=device)
        padded = F.pad(documents, (0, len(number)), value=-1)
        owner[..., -len(number) :] = padded[:, None, : len(number)]
        since[-len(number) :] = (number + layout.window - layout.first) * size
        whole[..., -seen.shape[2] :] &= seen.all(dim=3)[:, None]
    document = documents[:, layout.first : layout.first + layout.count]

    def visible(b: Tensor, g: Tensor, query: Tensor, key: Tensor) -> Tensor:
        chunk = query // (fan * size)
        whose = owner[b, g, key]
        mine = (whose == anybody) | ((whose >= 0) & (whose == document[b, chunk]))
        return (level[b, g, chunk, key // size] >= 0) & mine & (since[key] <= chunk * size + query % size)

    part_blocks, part_order = _listed((level >= 0) & ~whole)
    whole_blocks, whole_order = _listed(whole)
    return BlockMask.from_kv_blocks(
        part_blocks,
        part_order,
        whole_blocks,
        whole_order,
        BLOCK_SIZE=(fan * size, size),
        mask_mod=visible,
        seq_lengths=(layout.count * fan * size, owner.shape[2]),
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """[B, G, n, K] bool -> how many there are [B, G, n], and all K, those first, ascending [B, G, n, K]; int32."""
    order = torch.argsort((~blocks).to(torch.int8), dim=3, stable=True)
    return blocks.sum(dim=3, dtype=torch.int32), order.to(torch.int32)


def _bias_by_level(layout: Layout, level: Tensor, bias: Tensor, fan: int) -> Callable[..., Tensor]:
    """score_mod: adds bias [B, n*C, G or 1, 3] of the pair's level."""
    size, shared = layout.size, bias.shape[2] == 1

    def add(score: Tensor, b: Tensor, g: Tensor, query: Tensor, key: Tensor) -> Tensor:
        chunk = query // (fan * size)
        slot = chunk * size + query % size
        at = level[b, g, chunk, key // size].clamp(min=0).to(torch.int32)
        return score + bias[b, slot, g * 0 if shared else g, at]

    return add
