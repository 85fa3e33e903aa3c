"""MKA: attend to every level, then mix by the route: outputs (Algorithm 1) or scores under one softmax (eq. 5).

Shapes: B batch, S sequence, H query heads, G KV heads, d head channels, L levels.
Level 1 is the tokens; level l > 1 has one raw key and value per token, a causal summary up to that token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mka_megatron.attention.continued import continued_mixture
from mka_megatron.attention.fastmka import summaries
from mka_megatron.attention.flash import causal_backward, causal_forward
from mka_megatron.attention.grouped import causal_attention
from mka_megatron.attention.inputs import Finish, RouteInputs
from mka_megatron.attention.long_term import available, l3_level, mixes_l3
from mka_megatron.config.schema import Config
from mka_megatron.memory import routing
from mka_megatron.memory.documents import Documents, Span
from mka_megatron.memory.view import NO_MEMORY, Memory, Update, View


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
) -> tuple[Tensor, Tensor | None, Update]:
    """Attention over every level, mixed as `attention.mixture` says.

    output: out_1 + beta * (sum_l lambda_l out_l - out_1), every level causal over its own S keys.
    score: sum_l lambda_l exp(s_l) v_l / sum_l lambda_l exp(s_l), one normalisation over all levels; beta has no part.

    Args:
        q, k, v: [B, S, H, d], [B, S, G, d], [B, S, G, d], raw.
        route: the gate's output; None when L1 is the only level, where both mixtures are plain attention.
        config: reads attention.mixture, routing.mode and which levels are enabled.
        memory: with L3, chunks of the rows and the selector; the view of the slots before.

    Returns:
        ([B, S, H, d], the weights for monitoring, detached, [B, S, L] or [B, S, G, L]; None without a route, the
        memory's update). Raises ValueError for routing.mode top1 under the score mixture.
    """
    update = Update(None, None, None, None, None, None)
    if route is None or route.logits is None:
        return causal_attention(finish.q(q), finish.k(k), v, documents, scale, memory.view), None, update
    assert route.beta is not None
    size = 0
    k3, v3 = None, None
    if mixes_l3(config):
        k3, v3, update = l3_level(q, k, v, finish, documents, scale, memory)
        assert memory.chunks is not None
        size = memory.chunks.size
    later_k, carry_k = summaries(k, k3, route.decay_k, documents, config, memory.view, "k")
    later_v, carry_v = summaries(v, v3, route.decay_v, documents, config, memory.view, "v")
    update = replace(update, carry_k=carry_k, carry_v=carry_v)
    q, keys, values = finish.q(q), [finish.k(level) for level in (k, *later_k)], [v, *later_v]
    levels = available(route.logits, config, memory)
    if config.attention.mixture == "score":
        bias = routing.score_bias(route.logits, levels, config.routing.mode)
        out = score_mixture(q, keys, values, bias, documents, scale, size, memory.view)
        return out, bias.detach().softmax(dim=-1), update
    weights = routing.route(route.logits, levels, config.routing.mode)
    out = output_mixture(q, keys, values, weights, route.beta, documents, scale, memory.view, size)
    return out, weights.detach(), update


def output_mixture(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    weights: Tensor,
    beta: Tensor,
    documents: Documents,
    scale: float,
    view: View = NO_MEMORY.view,
    late: int = 0,
) -> Tensor:
    """out_1 + beta * (sum_l lambda_l out_l - out_1), Algorithm 1 for beta = 1.

    Args:
        q: [B, S, H, d], finished; keys, values: L tensors [B, S, G, d], finished keys.
        weights: [B, S, L] or [B, S, G, L], summing to one over L.
        beta: scalar or [1].
        view: of the slots before.
        late: slots of each document without a key of the last level, whose weight is 0 there.

    Returns:
        [B, S, H, d], dtype of q.
    """
    # [B, S, L] -> [B, S, H or 1, L]
    shares = beta * (_per_head(weights, q.shape[2]) if weights.dim() == 4 else weights[:, :, None])
    first = causal_attention(q, keys[0], values[0], documents, scale, view).to(shares.dtype)
    mixed = first
    for level in range(1, len(keys)):
        where = documents.once(Documents.later, late) if late and level == len(keys) - 1 else documents
        out = causal_attention(q, keys[level], values[level], where, scale, view, level)
        mixed = mixed + shares[..., level, None] * (out.to(shares.dtype) - first)
    return mixed.to(q.dtype)


def score_mixture(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    bias: Tensor,
    documents: Documents,
    scale: float,
    late: int = 0,
    view: View = NO_MEMORY.view,
) -> Tensor:
    """One softmax over the keys of all levels, level l's scores raised by its bias (eq. 5 with bias = log lambda).

    Level by level in flash kernels that are joined by their logsumexps: memory is O(S) per head.

    Args:
        q: [B, S, H, d], finished; keys, values: L tensors [B, S, G, d], finished keys.
        bias: fp32 (or wider), [B, S, L] or [B, S, G, L], -inf where a level takes no part (never all of them).
        documents: boundaries of the [B, S] slots, which are whole rows.
        scale: factor on the scores.
        late: slots of each document without a key of the last level, whose bias is -inf there; no run of tokens
            begins within them.
        view: of the slots before, of continued rows.

    Returns:
        [B, S, H, d], dtype of q, 0 on padding. Differentiable once in q, keys, values and bias; the gradient of the
        bias sums to zero over the levels. Raises ValueError for a part of rows.
    """
    if documents.continued is not None:
        seen = [view.keys_values(k, v, level) for level, (k, v) in enumerate(zip(keys, values, strict=True))]
        keys, values = [k for k, _ in seen], [v for _, v in seen]
        per_head = _per_head(bias, q.shape[2]).double()
        return continued_mixture(q, keys, values, per_head, documents, scale, late > 0)
    if documents.whole is not None:
        raise ValueError("attention.mixture score works on whole rows, these are a part: use mixture output.")
    heads = tuple(min(late, end - begin) for _, begin, end in documents.once(_first_runs))
    if documents.gaps:
        moved = documents.compacted
        q, bias, *rest = (moved.take(x) for x in (q, bias, *keys, *values))
        return moved.put(_ScoreMixture.apply(q, bias, moved.documents, scale, heads, *rest))
    return _ScoreMixture.apply(q, bias, documents, scale, heads, *keys, *values)


def _first_runs(documents: Documents) -> tuple[Span, ...]:
    """The first run of every document."""
    runs = {(row, begin): (row, begin, end) for row, begin, end in documents.runs}
    return tuple(runs[row, begin] for row, begin, _ in documents.spans)


def _per_head(per_group: Tensor, heads: int) -> Tensor:
    """[B, S, L] or [B, S, G, L] -> [B, S, H, L]."""
    grouped = per_group if per_group.dim() == 4 else per_group[:, :, None]
    return grouped.repeat_interleave(heads // grouped.shape[2], dim=2)


class _ScoreMixture(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, bias: Tensor, documents: Documents, scale: float, heads: tuple[int, ...],
        *keys_values: Tensor,
    ) -> Tensor:  # fmt: skip
        levels = len(keys_values) // 2
        keys, values = keys_values[:levels], keys_values[levels:]
        # [B, S, H, L] -> [L, B, H, S]; fp64, for a logsumexp's roundoff is a relative error of its probabilities
        biases = _per_head(bias, q.shape[2]).permute(3, 0, 2, 1).double()
        out = torch.zeros_like(q, memory_format=torch.contiguous_format)
        level_outs = [torch.zeros_like(out) for _ in range(levels)]
        total = torch.zeros_like(biases[0], memory_format=torch.contiguous_format)
        dtype = torch.promote_types(q.dtype, torch.float32)
        shares = torch.zeros_like(biases, dtype=dtype, memory_format=torch.contiguous_format)
        scores = biases.clone()
        regions = documents.regions
        pieces = [_pieces(times, late, length, levels)
                  for (_, times), late, length in zip(regions, heads, documents.lengths, strict=False)]  # fmt: skip
        extras: list[list[tuple[Any, ...]]] = []
        for (rows, times), own in zip(regions, pieces, strict=True):
            extras.append([])
            for level, here in enumerate(own):
                if here is None:
                    extras[-1].append(())
                    continue
                level_outs[level][rows, here], lse, extra = causal_forward(
                    q[rows, here], keys[level][rows, here], values[level][rows, here], scale
                )
                scores[level, rows, :, here] += lse
                extras[-1].append(extra)
            raised = scores[:, rows, :, times]
            total[rows, :, times] = raised.logsumexp(dim=0)
            shares[:, rows, :, times] = (raised - total[rows, :, times]).exp()
            mixed = sum(
                # [B, H, S] -> [B, S, H, 1]
                share.transpose(1, 2)[..., None] * level_out[rows, times].to(share.dtype)
                for share, level_out in zip(shares[:, rows, :, times], level_outs, strict=True)
            )
            out[rows, times] = mixed.to(out.dtype)
        ctx.save_for_backward(q, bias, out, total, shares, *level_outs, *keys_values)
        ctx.pieces = [(rows, own) for (rows, _), own in zip(regions, pieces, strict=True)]
        ctx.scale, ctx.extras = scale, extras
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, bias, out, total, shares, *rest = ctx.saved_tensors
        levels = len(rest) // 3
        level_outs, keys, values = rest[:levels], rest[levels : 2 * levels], rest[2 * levels :]
        biases = _per_head(bias, q.shape[2]).permute(3, 0, 2, 1).double()
        grad_q = torch.zeros_like(q, memory_format=torch.contiguous_format)
        grad_keys = [torch.zeros_like(k, memory_format=torch.contiguous_format) for k in keys]
        grad_values = [torch.zeros_like(v, memory_format=torch.contiguous_format) for v in values]
        for (rows, own), extras in zip(ctx.pieces, ctx.extras, strict=True):
            for level, here in enumerate(own):
                if here is None:
                    continue
                # exp(s + b_l - LSE) = exp(s - (LSE - b_l)): this level's part of the one softmax
                lse = (total[rows, :, here] - biases[level, rows, :, here]).to(shares.dtype)
                part_q, part_k, part_v = causal_backward(
                    grad[rows, here], q[rows, here], keys[level][rows, here], values[level][rows, here],
                    out[rows, here], lse, extras[level], ctx.scale,
                )  # fmt: skip
                grad_q[rows, here] += part_q
                grad_keys[level][rows, here] = part_k
                grad_values[level][rows, here] = part_v
        grad_bias = None
        if ctx.needs_input_grad[1]:
            wide = grad.to(shares.dtype)
            # db_l = share_l * (grad . out_l - grad . out), [B, S, H, L]
            mean = (wide * out.to(shares.dtype)).sum(dim=-1)
            gains = torch.stack([(wide * o.to(shares.dtype)).sum(dim=-1) - mean for o in level_outs], dim=-1)
            per_head = shares.permute(1, 3, 2, 0) * gains
            # [B, S, H, L] -> [B, S, G or 1, H/G or H, L]
            groups = bias.shape[2] if bias.dim() == 4 else 1
            grad_bias = per_head.unflatten(2, (groups, -1)).sum(dim=3)
            grad_bias = grad_bias.view(bias.shape).to(bias.dtype)
        return grad_q, grad_bias, None, None, None, *grad_keys, *grad_values


def _pieces(times: slice, late: int, length: int, levels: int) -> list[slice | None]:
    """Of a region of `length` slots, those with keys of each level: `late` of them less for the last one, None if
    that leaves nothing."""
    behind = slice((times.start or 0) + late, times.stop) if late < length else None
    return [times] * (levels - 1) + [behind]
