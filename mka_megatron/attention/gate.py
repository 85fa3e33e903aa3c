"""The gate's arithmetic, fp32: two layers with SiLU between them, from queries or the layer input to the logits.

Shapes: ... batch and sequence in any order, H query heads, G KV heads, d head channels, h hidden size, r gate width,
L levels. The parameters are the adapter's, which says how they are sharded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def token_logits(
    q: Tensor, fc1: Tensor, bias1: Tensor, fc2: Tensor, bias2: Tensor, reduce: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """One route per token from all query heads.

    Args:
        q: [..., H, d] raw queries. fc1: [r, H*d]; bias1: [r]; fc2: [L, r]; bias2: [L].
        reduce: sums the first layer over ranks that hold some of the heads; None: there is one.

    Returns:
        [..., L] fp32.
    """
    partial = F.linear(q.flatten(-2).float(), fc1.float())
    hidden = F.silu((partial if reduce is None else reduce(partial)) + bias1.float())
    return F.linear(hidden, fc2.float(), bias2.float())


def input_logits(x: Tensor, fc1: Tensor, bias1: Tensor, fc2: Tensor, bias2: Tensor) -> Tensor:
    """Routes from the layer input: x [..., h], fc1 [r, h], fc2 [n, r] -> [..., n] fp32, n the logits of a token."""
    hidden = F.silu(F.linear(x.float(), fc1.float(), bias1.float()))
    return F.linear(hidden, fc2.float(), bias2.float())


def group_logits(q: Tensor, fc1: Tensor, bias1: Tensor, fc2: Tensor, bias2: Tensor) -> Tensor:
    """One route per token and KV head, from that head's own queries.

    Args:
        q: [..., H, d] raw queries. fc1: [G, r, H/G*d]; bias1: [G, r]; fc2: [G, L, r]; bias2: [G, L].

    Returns:
        [..., G, L] fp32.
    """
    # [..., H, d] -> [..., G, H/G*d]
    grouped = q.reshape(*q.shape[:-2], fc1.shape[0], -1).float()
    hidden = F.silu(torch.einsum("...gc,grc->...gr", grouped, fc1.float()) + bias1.float())
    return torch.einsum("...gr,glr->...gl", hidden, fc2.float()) + bias2.float()
