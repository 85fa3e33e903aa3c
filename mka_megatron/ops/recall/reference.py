"""The specification of the recall in PyTorch, on any device; only the means have a gradient. Shapes as in the package."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

FRACTION_BITS = 16
"""Numbers are rounded to multiples of 2^-16."""
RANGE = 2.0**15
"""Numbers beyond +-2^15 are taken for that, NaN for 0. So a fixed-point number is an integer of at most 2^31, and sums
of 2^22 of them (chunk size x d, or queries x heads of a group x d) are exact in fp64."""
_PRODUCT_BITS = 22
_BLOCK = 1 << 22


def fixed_point(x: Tensor) -> Tensor:
    """round(x * 2^16) in fp64, halves to even; the shape of x, of any floating dtype."""
    return x.detach().double().nan_to_num(nan=0.0).clamp_(-RANGE, RANGE).mul_(2.0**FRACTION_BITS).round_()


def chunk_sums(x: Tensor, lengths: Tensor, size: int, centre: Tensor | None = None) -> Tensor:
    """Exact sums over the tokens of each chunk.

    Args:
        x: [B, S, G, d] floating point, of the slots at hand.
        lengths: [B, n] int64 tokens at the head of each chunk.
        size: C.
        centre: [G, d] that is taken from every token, both as fixed point; None: 0.

    Returns:
        [B, n, G, d] fp64 integers.
    """
    sums = x.new_zeros(*lengths.shape, *x.shape[2:], dtype=torch.float64)
    step = max(1, _BLOCK // max(1, x.shape[0] * size * x.shape[2] * x.shape[3]))
    for begin in range(0, lengths.shape[1], step):
        count = lengths[:, begin : begin + step]
        # [B, S, G, d] -> [B, n, C, G, d]
        fixed = fixed_point(x[:, begin * size : (begin + step) * size])
        fixed = F.pad(fixed, (0, 0, 0, 0, 0, count.shape[1] * size - fixed.shape[1])).unflatten(1, (-1, size))
        empty = torch.arange(size, device=x.device) >= count[..., None]
        sums[:, begin : begin + step] = fixed.masked_fill_(empty[..., None, None], 0).sum(dim=2)
    if centre is not None:
        sums -= lengths[..., None, None] * fixed_point(centre)
    return sums


def chunk_means(x: Tensor, lengths: Tensor, size: int) -> Tensor:
    """Mean over the tokens of each chunk, summed in fp32 (fp64 for fp64) in an order of its own.

    Args:
        x: [B, S, ...] of the slots at hand.
        lengths: [B, n] int64 tokens at the head of each chunk.
        size: C.

    Returns:
        [B, n, ...], dtype of x; 0 for a chunk without tokens. Differentiable once.
    """
    return _ChunkMeans.apply(x, lengths, size)


def spread_means(grad: Tensor, lengths: Tensor, size: int, slots: int) -> Tensor:
    """The gradient of :func:`chunk_means`: [B, n, ...] -> [B, S, ...], 0 on padding."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    share = (grad.to(wide) / _broadcast(lengths.clamp_min(1), grad)).to(grad.dtype)
    spread = share[:, :, None].expand(-1, -1, size, *grad.shape[2:])
    # [B, n, C, ...] -> [B, S, ...]
    return _cleared(spread, lengths).flatten(1, 2)[:, :slots]


def centred_means(sums: Tensor, lengths: Tensor) -> Tensor:
    """Sums over chunks as means [B, n, G, d] fp64 of 22 significant bits under their largest entry; 0 for an empty
    chunk. So their products with queries of 22 bits have exact sums."""
    return _coarse(sums / lengths.clamp_min(1)[..., None, None])


def sign_codes(sums: Tensor, planes: Tensor) -> Tensor:
    """Which side of each plane a vector lies on.

    Args:
        sums: [..., d] fp64 integers.
        planes: [T, bits, d] of +-1, bits a multiple of 64.

    Returns:
        [..., W] int64: bit j of word w is 1 where plane 64 w + j of all tables' gives a sum >= 0.
    """
    sides = sums @ planes.flatten(0, 1).to(torch.float64).t() >= 0
    # [..., T*bits] -> [..., W, 64]; the 64 powers are disjoint bits, the last of them the sign bit
    powers = torch.ones(64, dtype=torch.int64, device=sums.device) << torch.arange(64, device=sums.device)
    return (sides.unflatten(-1, (-1, 64)) * powers).sum(dim=-1)


def recent_sums(
    fixed: Tensor, before: Tensor | None, lengths: Tensor, counts: Tensor, size: int, queries: int
) -> Tensor:
    """For each chunk at hand the sum over the last queries of its document before it.

    Args:
        fixed: [B, S, G, d] fp64 integers of the slots at hand.
        before: [B, Q, G, d], the same of the last Q tokens before slot 0, oldest first; None: there are none.
        lengths: [B, n] int64 tokens at the head of each chunk.
        counts: [B, n] int64 tokens of the chunk's document before the chunk.
        size: C.
        queries: Q.

    Returns:
        [B, n, G, d] fp64 integers, sums of min(Q, counts) queries.
    """
    batch, chunks = lengths.shape
    device = fixed.device
    through = lengths.cumsum(dim=1)
    # [B, n, Q]: number, among the row's tokens at hand, of the Q tokens before each chunk; negative: in `before`
    back = torch.arange(queries, device=device) - queries
    tokens = (through - lengths)[..., None] + back
    # a token's chunk is the first one whose tokens, with those before, are more than its number
    ordered = tokens.clamp_min(0).view(batch, -1)
    chunk = torch.searchsorted(through, ordered, right=True).clamp_max(chunks - 1)
    slots = (chunk * size + ordered - (through - lengths).gather(1, chunk)).view(tokens.shape)
    row = torch.arange(batch, device=device)[:, None, None]
    picked = fixed[row, slots.clamp_max(fixed.shape[1] - 1)]
    if before is not None:
        earlier = (tokens < 0)[..., None, None]
        picked = torch.where(earlier, before[row, (tokens + queries).clamp(0, queries - 1)], picked)
    wanted = -back <= counts[..., None]
    if before is None:
        wanted = wanted & (tokens >= 0)
    return picked.masked_fill(~wanted[..., None, None], 0).sum(dim=2)


@dataclass(frozen=True)
class Candidates:
    """The chunks among which each chunk at hand selects: its document's, at least `window` chunks back."""

    documents: Tensor
    """[B, N] int64 document of every chunk of the row; -1: empty, never selected."""
    first: int
    """Chunk number of the first one at hand."""
    count: int
    """n."""
    window: int
    """Chunks from here on, the own one included, that are attended anyway; at least 1."""

    def blocks(self, width: int) -> Iterator[tuple[slice, Tensor]]:
        """(chunks at hand, allowed [B, their number, 1, M] of the row's first M) in blocks of <= 2^22 `width` values."""
        batch, total = self.documents.shape
        step = max(1, _BLOCK // max(1, batch * total * width))
        numbers = torch.arange(total, device=self.documents.device)
        for begin in range(0, self.count, step):
            end = min(begin + step, self.count)
            last = max(0, self.first + end - self.window)
            own = self.documents[:, self.first + begin : self.first + end, None]
            allowed = (self.documents[:, None, :last] == own) & (own >= 0)
            allowed &= numbers[:last] <= numbers[self.first + begin : self.first + end, None] - self.window
            yield slice(begin, end), allowed[:, :, None]


def hamming(one: Tensor, other: Tensor) -> Tensor:
    """Bits in which int64 words differ, [...] int64 for broadcastable [...]."""
    x = one ^ other
    # the shifts drag the sign bit in, the masks drop it again
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    x = x + (x >> 8)
    x = x + (x >> 16)
    return (x + (x >> 32)) & 0x7F


def nearest_codes(
    queries: Tensor, codes: Tensor, candidates: Candidates, tables: int, recalled: int
) -> Tensor:
    """The `recalled` candidates of smallest Hamming distance, the smallest one over the tables; ties by number.

    Args:
        queries: [B, n, G, W] int64, of the chunks at hand.
        codes: [B, N', G, W] int64, of the row's chunks up to at least the last candidate.
        tables: T; each has W / T words.
        recalled: R.

    Returns:
        [B, n, G, R] int64 chunk numbers of the row, ascending, then -1.
    """
    batch, count, groups, words = queries.shape
    found = queries.new_full((batch, count, groups, recalled), -1)
    for block, allowed in candidates.blocks(groups * words):
        last = allowed.shape[-1]
        # [B, n, 1, G, W] ^ [B, 1, M, G, W] -> [B, n, M, G, T, W/T]
        bits = hamming(queries[:, block, None], codes[:, None, :last]).unflatten(-1, (tables, -1))
        distance = bits.sum(dim=-1).amin(dim=-1).transpose(2, 3)
        # one integer orders by distance, then by number
        order = distance * last + torch.arange(last, device=codes.device)
        none = 64 * words * last + last
        order = torch.where(allowed, order, none)
        best = order.topk(min(recalled, last), dim=-1, largest=False).values
        found[:, block, :, : best.shape[-1]] = _ascending(best % max(last, 1), best < none)
    return found


def largest_products(queries: Tensor, means: Tensor, candidates: Candidates, recalled: int) -> Tensor:
    """The `recalled` candidates with the largest dot products; ties by number.

    Args:
        queries: [B, n, G, d] fp64.
        means: [B, N', G, d] from :func:`centred_means`, of the row's chunks up to at least the last candidate.
        recalled: R.

    Returns:
        as :func:`nearest_codes`.
    """
    batch, count, groups, _ = queries.shape
    found = torch.full((batch, count, groups, recalled), -1, dtype=torch.int64, device=queries.device)
    queries = _coarse(queries)
    for block, allowed in candidates.blocks(groups):
        last = allowed.shape[-1]
        # [B, n, G, d] . [B, M, G, d] -> [B, n, G, M]
        products = queries[:, block].transpose(1, 2) @ means[:, :last].permute(0, 2, 3, 1)
        products = products.transpose(1, 2).masked_fill(~allowed, float("-inf"))
        best = products.sort(dim=-1, descending=True, stable=True)
        some = slice(min(recalled, last))
        found[:, block, :, some] = _ascending(best.indices[..., some], best.values[..., some] > float("-inf"))
    return found


def _ascending(numbers: Tensor, found: Tensor) -> Tensor:
    """Chunk numbers in order, and -1 for what was not found behind them."""
    nowhere = torch.iinfo(torch.int64).max
    ordered = numbers.masked_fill(~found, nowhere).sort(dim=-1).values
    return ordered.masked_fill(ordered == nowhere, -1)


def _coarse(x: Tensor) -> Tensor:
    """x [..., d] fp64 rounded to 22 bits under the largest entry of each vector."""
    exponent = x.abs().amax(dim=-1, keepdim=True).frexp().exponent.long() - _PRODUCT_BITS
    return (x * _power(-exponent)).round() * _power(exponent)


def _power(exponent: Tensor) -> Tensor:
    """2^exponent in fp64, by its bits: exact on every device."""
    return ((exponent + 1023) << 52).view(torch.float64)


class _ChunkMeans(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(lengths)
        ctx.size, ctx.slots = size, x.shape[1]
        part = _chunked(x, lengths, size)
        # halves onto halves: every chunk's sum has the same order, wherever it lies and whatever lies beside it
        while part.shape[2] > 1:
            half = (part.shape[2] + 1) // 2
            rest = part[:, :, half:]
            part = part[:, :, :half]
            part[:, :, : rest.shape[2]] += rest
        return (part[:, :, 0] / _broadcast(lengths.clamp_min(1), part[:, :, 0])).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (lengths,) = ctx.saved_tensors
        return spread_means(grad, lengths, ctx.size, ctx.slots), None, None


def _chunked(x: Tensor, lengths: Tensor, size: int) -> Tensor:
    """[B, S, ...] -> [B, n, C, ...] in fp32 or wider, 0 on padding."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    missing = lengths.shape[1] * size - x.shape[1]
    wide = F.pad(wide, (0, 0) * (x.dim() - 2) + (0, missing)) if missing else wide
    return _cleared(wide.unflatten(1, (-1, size)), lengths)


def _cleared(x: Tensor, lengths: Tensor) -> Tensor:
    """[B, n, C, ...] with 0 on padding, a new tensor."""
    empty = torch.arange(x.shape[2], device=x.device) >= lengths[..., None]
    return x.masked_fill(empty.view(empty.shape + (1,) * (x.dim() - 3)), 0)


def _broadcast(counts: Tensor, like: Tensor) -> Tensor:
    return counts.view(counts.shape + (1,) * (like.dim() - 2))
