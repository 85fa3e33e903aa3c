"""The specification of the decode in PyTorch: any device, no gradient. Shapes as in the package."""

from __future__ import annotations

import torch
from torch import Tensor

from mka_megatron.ops import recall
from mka_megatron.ops.decode.cache import Cache, Hashing

_INFINITY = float("inf")


@torch.no_grad()
def fuse(
    cache: Cache,
    k: Tensor,
    v: Tensor,
    shares: Tensor,
    decay_k: Tensor | None,
    decay_v: Tensor | None,
    long_term: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor]:
    """As the package has it."""
    active = (cache.chunk >= 0)[:, None, None]
    first = (cache.position == 0)[:, None, None]

    def fused(x: Tensor, decay: Tensor | None, state: Tensor | None, l3: Tensor | None) -> Tensor:
        if decay is None or state is None:
            return x
        wide = x.to(state.dtype)
        rate = decay.to(state.dtype)
        level = torch.where(first, wide, rate * state + (1 - rate) * wide)
        state.copy_(torch.where(active, level, state))
        out = wide + shares[..., 0:1].to(state.dtype) * (level - wide)
        if l3 is not None:
            out = out + shares[..., 1:2].to(state.dtype) * (l3.to(state.dtype) - wide)
        return out.to(x.dtype)

    return fused(k, decay_k, cache.ema_k, long_term[0]), fused(v, decay_v, cache.ema_v, long_term[1])


@torch.no_grad()
def append(cache: Cache, q: Tensor, k: Tensor, rotated: Tensor, v: Tensor) -> None:
    """As the package has it."""
    size, groups, chunks = cache.k.shape[1], k.shape[1], cache.lengths.shape[1]
    rows = torch.arange(len(k), device=k.device)
    open_chunk = cache.chunk.clamp(0, chunks - 1).long()
    slot = cache.lengths[rows, open_chunk].long()
    page = cache.table[rows, :, open_chunk].long()
    takes = (cache.chunk >= 0) & (cache.chunk < chunks) & (slot < size)
    # [B, G]: pages that get the token
    row, head = (takes[:, None] & (page >= 0)).nonzero(as_tuple=True)
    cache.k[page[row, head], slot[row]] = rotated[row, head].to(cache.k.dtype)
    cache.v[page[row, head], slot[row]] = v[row, head].to(cache.v.dtype)
    (row,) = takes.nonzero(as_tuple=True)
    if cache.sum_k is not None and cache.sum_v is not None:
        cache.sum_k[row] += k[row].to(cache.sum_k.dtype)
        cache.sum_v[row] += v[row].to(cache.sum_v.dtype)
    if cache.code_sum is not None and cache.queries is not None:
        cache.code_sum[row] += recall.fixed_point(k[row]).long()
        # [B, H, d] -> [B, G, H/G, d] -> [B, G, d]
        fixed = recall.fixed_point(q[row]).unflatten(1, (groups, -1)).sum(dim=2).long()
        cache.queries[row, cache.position[row] % cache.queries.shape[1]] = fixed
    cache.lengths[row, open_chunk[row]] += 1
    cache.position[row] += 1


@torch.no_grad()
def attend(cache: Cache, q: Tensor, bias: Tensor | None, window: int, scale: float) -> Tensor:
    """As the package has it; window in chunks."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    groups, chunks = cache.table.shape[1:]
    numbers = torch.arange(chunks, device=q.device)
    own = cache.chunk[:, None].long()
    # [B, w]: the window by number, negative before a sequence's first chunk and where it is idle
    near = own + torch.arange(1 - min(window, chunks), 1, device=q.device)
    parts = [_tokens(cache, near[:, None].expand(-1, groups, -1), wide)]
    if cache.summary_k is not None and cache.summary_v is not None:
        seen = ((numbers <= own - window) & (cache.lengths > 0))[:, None].expand(-1, groups, -1)
        parts.append((_kept(cache.summary_k, seen, wide), _kept(cache.summary_v, seen, wide), seen))
    if cache.recalled is not None:
        parts.append(_tokens(cache, cache.recalled.long().masked_fill(own[..., None] < 0, -1), wide))
    levels = [0] + [1] * (cache.summary_k is not None) + [2] * (cache.recalled is not None)

    # [B, H, d] -> [B, G, F, d]
    heads = q.to(wide).unflatten(1, (groups, -1)) * scale
    scores = []
    for level, (keys, _, seen) in zip(levels, parts, strict=True):
        score = heads @ keys.mT
        if bias is not None:
            score = score + bias[:, :, level].to(wide)[:, :, None, None]
        scores.append(score.masked_fill(~seen[:, :, None], -_INFINITY))
    joined = torch.cat(scores, dim=-1)
    largest = joined.amax(dim=-1, keepdim=True)
    weights = (joined - largest.masked_fill(largest == -_INFINITY, 0)).exp()
    total = weights.sum(dim=-1, keepdim=True)
    out = weights @ torch.cat([values for _, values, _ in parts], dim=2)
    return (out / total.masked_fill(total == 0, 1)).flatten(1, 2).to(q.dtype)


@torch.no_grad()
def close(
    cache: Cache, cos: Tensor, sin: Tensor, hashing: Hashing | None, window: int, force: Tensor | None
) -> None:
    """As the package has it; window in chunks."""
    for row, chunk in enumerate(cache.chunk.tolist()):
        if not 0 <= chunk < cache.lengths.shape[1]:
            continue
        tokens = int(cache.lengths[row, chunk])
        if tokens < cache.k.shape[1] and not (tokens and force is not None and bool(force[row])):
            continue
        if cache.summary_k is not None and cache.summary_v is not None and cache.sum_k is not None and cache.sum_v is not None:
            mean = cache.sum_k[row] / tokens
            cache.summary_k[row, :, chunk] = _rotated(mean, cos[row], sin[row]).to(cache.summary_k.dtype)
            cache.summary_v[row, :, chunk] = (cache.sum_v[row] / tokens).to(cache.summary_v.dtype)
            cache.sum_k[row] = 0
            cache.sum_v[row] = 0
        if hashing is not None and cache.codes is not None and cache.code_sum is not None:
            sums = cache.code_sum[row].double()
            if hashing.key_bias is not None:
                sums = sums - tokens * recall.fixed_point(hashing.key_bias)
            cache.codes[row, :, chunk] = recall.sign_codes(sums, hashing.planes)
            cache.code_sum[row] = 0
            _select(cache, hashing, row, chunk + 1, window)
        cache.chunk[row] = chunk + 1


def _select(cache: Cache, hashing: Hashing, row: int, chunk: int, window: int) -> None:
    """What chunk `chunk`, the next to open, recalls."""
    assert cache.codes is not None and cache.recalled is not None and cache.queries is not None
    held = min(int(cache.position[row]), cache.queries.shape[1])
    # the ring's slots are in use from the first on
    recent = cache.queries[row, :held].sum(dim=0).double()
    # a row's chunks with tokens are one document, the one to open among them
    documents = torch.cat((torch.where(cache.lengths[row, :chunk] > 0, 0, -1), cache.lengths.new_zeros(1))).long()
    among = recall.Candidates(documents[None], chunk, 1, window)
    query = recall.sign_codes(recent, hashing.planes)
    # [G, N, W] -> [1, N, G, W]
    codes = cache.codes[row, :, :chunk].transpose(0, 1)[None]
    found = recall.nearest_codes(query[None, None], codes, among, len(hashing.planes), cache.recalled.shape[2])
    cache.recalled[row] = found[0, 0].to(cache.recalled.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [G, d], its first r channels turned by tables [r]: Hugging Face's convention."""
    rotated = cos.shape[0]
    low, high = x[:, : rotated // 2], x[:, rotated // 2 : rotated]
    turned = torch.cat((-high, low), dim=-1) * sin.to(x.dtype) + x[:, :rotated] * cos.to(x.dtype)
    return torch.cat((turned, x[:, rotated:]), dim=-1)


def _tokens(cache: Cache, numbers: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [B, G, X*C, d] of the chunks `numbers` [B, G, X] (outside [0, N): none), and which slots [B, G, X*C]
    are tokens; the others are 0, whatever lies in the pages."""
    slots = torch.arange(cache.k.shape[1], device=cache.k.device)
    there = (numbers >= 0) & (numbers < cache.table.shape[2])
    chunk = numbers.clamp(0, cache.table.shape[2] - 1)
    pages = cache.table.gather(2, chunk)
    # [B, N] -> [B, G, X]
    lengths = cache.lengths[:, None].expand_as(cache.table).gather(2, chunk)
    seen = (slots < lengths[..., None]) & (there & (pages >= 0))[..., None]
    keys, values = (_kept(x[pages.clamp_min(0).long()], seen, wide).flatten(2, 3) for x in (cache.k, cache.v))
    return keys, values, seen.flatten(2)


def _kept(x: Tensor, seen: Tensor, wide: torch.dtype) -> Tensor:
    return torch.where(seen[..., None], x, 0).to(wide)
