"""One byte per slot: how the EMA passes it, and which levels hold something there. Shapes: B batch, S slots, L levels."""

from __future__ import annotations

import torch
from torch import Tensor

from mka_megatron.ops.scan import Rows

STEP, FRESH, HOLD = 0, 1, 2
"""Kinds, in bits 0 and 1: a token, a document's first token, padding."""
LEVEL_SHIFT = 2
"""Bit LEVEL_SHIFT + l is set where level l (in the order of the logits) is available."""


def pack(rows: Rows, available: Tensor | None, levels: int, carried: bool) -> Tensor:
    """The slots of `rows`, as the kernels read them; nothing waits for a device.

    Args:
        available: [B, S, L] or [B, S, 1, L] bool, the levels that hold something, at least one everywhere; None: all.
        levels: L.
        carried: a state comes in, which the first document of every row continues; else every row starts afresh.

    Returns:
        [B, S] uint8.
    """
    # the same for all layers, so that it is made once
    kinds = rows.once(_kinds, carried)
    if available is None:
        return rows.once(_all_levels, levels, carried)
    available = available.view(*rows.starts.shape, levels)
    bits = (available.long() << torch.arange(levels, device=kinds.device)).sum(dim=-1)
    return kinds | (bits << LEVEL_SHIFT).to(torch.uint8)


def _kinds(rows: Rows, carried: bool) -> Tensor:
    starts = rows.starts
    tokens = torch.ones_like(starts) if rows.padding is None else ~rows.padding
    if carried:
        fresh = starts.clone()
        fresh[:, 0] = False
    else:
        fresh = starts | (tokens.cumsum(dim=1) == 1)
    return torch.where(tokens, torch.where(fresh, FRESH, STEP), HOLD).to(torch.uint8)


def _all_levels(rows: Rows, levels: int, carried: bool) -> Tensor:
    return rows.once(_kinds, carried) | (2**levels - 1) << LEVEL_SHIFT
