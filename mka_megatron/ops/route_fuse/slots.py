"""One byte per slot: how the EMA passes it, and which levels hold something there. Shapes: B batch, S slots, L levels."""

from __future__ import annotations

import torch
from torch import Tensor

STEP, FRESH, HOLD = 0, 1, 2
"""Kinds, in bits 0 and 1: a token, a document's first token, padding."""
LEVEL_SHIFT = 2
"""Bit LEVEL_SHIFT + l is set where level l (in the order of the logits) is available."""


def pack(starts: Tensor, padding: Tensor | None, available: Tensor | None, *, levels: int, carried: bool) -> Tensor:
    """The slots of memory.Documents' `starts` and `padding`, both [B, S] bool; nothing waits for a device.

    Args:
        available: [B, S, L] bool, the levels that hold something, at least one everywhere; None: all.
        levels: L.
        carried: a state comes in, which the first document of every row continues; else every row starts afresh.

    Returns:
        [B, S] uint8.
    """
    tokens = torch.ones_like(starts) if padding is None else ~padding
    if carried:
        fresh = starts.clone()
        fresh[:, 0] = False
    else:
        fresh = starts | (tokens.cumsum(dim=1) == 1)
    kinds = torch.where(tokens, torch.where(fresh, FRESH, STEP), HOLD)
    if available is None:
        bits = torch.full_like(kinds, 2**levels - 1)
    else:
        bits = (available.long() << torch.arange(levels, device=starts.device)).sum(dim=-1)
    return (kinds | bits << LEVEL_SHIFT).to(torch.uint8)
