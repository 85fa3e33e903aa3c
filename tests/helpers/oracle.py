"""Attention and memory as the papers write them: dense, in fp64, one token at a time, nothing clever.

Independent of the package on purpose. Torch tensors, so that autograd gives the gradients to compare with.
Shapes: B batch, S sequence, H query heads, G KV heads, d head channels, L levels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def ema(
    x: Tensor, decay: Tensor, starts: Tensor, padding: Tensor | None = None, carry: Tensor | None = None
) -> Tensor:
    """s = a s + b x token by token: (0, 1) at a start, (1, 0) on padding, else (decay, 1 - decay)."""
    rows = []
    for row in range(x.shape[0]):
        state = torch.zeros_like(x[row, 0]) if carry is None else carry[row]
        states = []
        for time in range(x.shape[1]):
            fresh = bool(starts[row, time]) and (time > 0 or carry is None)
            if padding is None or not bool(padding[row, time]):
                state = x[row, time] if fresh else decay * state + (1 - decay) * x[row, time]
            states.append(state)
        rows.append(torch.stack(states))
    return torch.stack(rows)


def prefix_mean(
    x: Tensor,
    starts: Tensor,
    padding: Tensor | None = None,
    carry: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Mean of the document's tokens so far; `carry`: (sum, count) that the row's first document continues."""
    rows = []
    for row in range(x.shape[0]):
        total = torch.zeros_like(x[row, 0]) if carry is None else carry[0][row]
        count = 0.0 if carry is None else carry[1][row].item()
        means = []
        for time in range(x.shape[1]):
            if bool(starts[row, time]) and time > 0:
                total, count = torch.zeros_like(total), 0.0
            if padding is None or not bool(padding[row, time]):
                total, count = total + x[row, time], count + 1
            means.append(total / max(count, 1.0))
        rows.append(torch.stack(means))
    return torch.stack(rows)


def chunk_tokens(starts: Tensor, padding: Tensor | None, size: int) -> list[list[tuple[int, list[int]]]]:
    """Per row and chunk: (its document, the slots of its tokens)."""
    rows = []
    for row in range(starts.shape[0]):
        document, chunks = -1, []
        for slot in range(starts.shape[1]):
            document += int(starts[row, slot])
            if slot % size == 0:
                chunks.append((document, []))
            if padding is None or not bool(padding[row, slot]):
                chunks[-1][1].append(slot)
        rows.append(chunks)
    return rows


def recalled(
    q: Tensor, k: Tensor, starts: Tensor, padding: Tensor | None, size: int, count: int, planes: Tensor | None = None,
    back: int = 1,
) -> list[list[list[list[int]]]]:
    """Per row, chunk and KV head, the `count` chunks recalled of those of the document at least `back` before.

    By the mean, over heads and the last 16 tokens before the chunk, of `q` [B, S, H, d]: the largest products with
    the mean of a chunk's `k` [B, S, G, d], or with `planes` [bits, d] the most equal signs.
    """
    groups = k.shape[2]
    rows = []
    for row, chunks in enumerate(chunk_tokens(starts, padding, size)):
        rows.append([])
        for number, (document, own) in enumerate(chunks):
            past = [s for d, slots in chunks[:number] if d == document for s in slots][-16:]
            rows[-1].append([[] for _ in range(groups)])
            if not own or not past:
                continue
            for group in range(groups):
                heads = q.shape[2] // groups
                query = q[row, past, group * heads : (group + 1) * heads].mean(dim=(0, 1))
                ranked = []
                for earlier in range(number - back + 1):
                    if chunks[earlier][0] == document and chunks[earlier][1]:
                        key = k[row, chunks[earlier][1], group].mean(dim=0)
                        if planes is None:
                            likeness = (query * key).sum().item()
                        else:
                            one, other = (planes.to(x.dtype) @ x >= 0 for x in (query, key))
                            likeness = (one == other).sum().item()
                        ranked.append((-likeness, earlier))
                rows[-1][-1][group] = sorted(number for _, number in sorted(ranked)[:count])
    return rows


def long_term(
    q: Tensor, k: Tensor, v: Tensor, chosen: list[list[list[list[int]]]], starts: Tensor, padding: Tensor | None, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """L3 under the dense core, token by token: K3, V3 [B, S, G, d] and where they exist [B, S]."""
    channels = k.shape[3]
    levels = [torch.zeros_like(x) for x in (k, v)]
    exists = torch.zeros(k.shape[:2], dtype=torch.bool)
    for row, chunks in enumerate(chunk_tokens(starts, padding, size)):
        for number, (_, slots) in enumerate(chunks):
            for slot in slots:
                for group, numbers in enumerate(chosen[row][number]):
                    if not numbers:
                        continue
                    heads = q.shape[2] // k.shape[2]
                    query = q[row, slot, group * heads : (group + 1) * heads].mean(dim=0)
                    keys, values = (
                        torch.stack([x[row, chunks[n][1], group].mean(dim=0) for n in numbers]) for x in (k, v)
                    )
                    weights = (keys @ query / channels**0.5).softmax(dim=0)
                    mask = torch.zeros_like(k)
                    mask[row, slot, group] = 1
                    levels = [old + mask * (weights @ new) for old, new in zip(levels, (keys, values), strict=True)]
                    exists[row, slot] = True
    return levels[0], levels[1], exists


def visible(starts: Tensor, padding: Tensor | None = None) -> Tensor:
    """[B, S, S] bool: query t may look at key u: u <= t, the same document, neither padding."""
    document = starts.long().cumsum(dim=1)
    sequence = starts.shape[1]
    earlier = torch.ones(sequence, sequence, dtype=torch.bool).tril()
    seen = earlier & (document[:, :, None] == document[:, None, :])
    if padding is not None:
        seen = seen & ~padding[:, :, None] & ~padding[:, None, :]
    return seen


def scores(q: Tensor, k: Tensor, seen: Tensor, scale: float) -> Tensor:
    """[B, H, S, S] scaled scores, -inf where a query may not look."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    return (torch.einsum("bthd,buhd->bhtu", q, k) * scale).masked_fill(~seen[:, None], float("-inf"))


def attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    """[B, S, H, e]; a query that sees nothing gets 0."""
    return score_mixture(q, [k], [v], torch.zeros(*q.shape[:3], 1, dtype=q.dtype), seen, scale)


def score_mixture(
    q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], bias: Tensor, seen: Tensor, scale: float
) -> Tensor:
    """Eq. 5: one softmax over the keys of all levels; bias [B, S, H, L] = log lambda."""
    raised = [
        scores(q, k, seen, scale) + bias[..., level].transpose(1, 2)[..., None]
        for level, k in enumerate(keys)
    ]
    blind = ~seen.any(dim=2)[:, None, :, None]
    weights = torch.cat(raised, dim=-1).masked_fill(blind, 0).softmax(dim=-1).masked_fill(blind, 0)
    stacked = torch.cat([v.repeat_interleave(q.shape[2] // v.shape[2], dim=2) for v in values], dim=1)
    return torch.einsum("bhtu,buhe->bthe", weights, stacked)


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """RoPE as rotation of the complex numbers x[i] + j x[i + d/2] by position * theta^(-2i/d)."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = positions[:, :, None, None].double() * frequencies
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), dim=-1)


def tables(positions: Tensor, channels: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [B, S, channels] in fp64, each frequency twice."""
    half = channels // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = positions[..., None].double() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean x^2 + eps) * weight."""
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight
