"""The specification of route_fuse: plain PyTorch on any device, differentiated by autograd.

Shapes: B batch, S slots, G KV heads, d head channels, L levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from mka_megatron.ops.route_fuse.slots import FRESH, HOLD, LEVEL_SHIFT, STEP

if TYPE_CHECKING:
    from mka_megatron.ops.route_fuse import Stream


def route_fuse(
    streams: Sequence[Stream], logits: Tensor, beta: Tensor, slots: Tensor, mode: str
) -> list[tuple[Tensor, Tensor | None]]:
    """As the contract says; checked inputs."""
    weights = route(logits, slots, mode)
    # [B, S, L] -> [B, S, 1, L]
    shares = beta * (weights if weights.dim() == 4 else weights[:, :, None])
    return [_fuse(stream, shares, slots & (2**LEVEL_SHIFT - 1)) for stream in streams]


def route(logits: Tensor, slots: Tensor, mode: str) -> Tensor:
    """The weights of the available levels, of the shape of `logits` in fp32 (fp64 for fp64)."""
    bits = 1 << torch.arange(LEVEL_SHIFT, LEVEL_SHIFT + logits.shape[-1], device=slots.device)
    # [B, S] -> [B, S, L] or [B, S, 1, L]
    closed = (slots[..., None] & bits) == 0
    closed = closed if logits.dim() == 3 else closed[:, :, None]
    masked = logits.to(torch.promote_types(logits.dtype, torch.float32)).masked_fill(closed, float("-inf"))
    soft = masked.softmax(dim=-1)
    if mode == "soft":
        return soft
    if mode == "fixed":
        return torch.zeros_like(masked).masked_fill(closed, float("-inf")).softmax(dim=-1)
    order = masked.detach().sort(dim=-1, descending=True, stable=True).indices
    highest = torch.zeros_like(closed.expand_as(masked)).scatter(-1, order[..., : int(mode[-1])], True)
    hard = masked.detach().masked_fill(~highest, float("-inf")).softmax(dim=-1)
    # straight-through: the gradient of the soft weights
    return hard + (soft - soft.detach())


def _fuse(stream: Stream, shares: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor | None]:
    x = stream.x.to(torch.promote_types(stream.x.dtype, torch.float32))
    levels, last = [], None
    if stream.decay is not None:
        state = ema(x, stream.decay.to(x.dtype), stream.carry, kinds)
        levels, last = [state], state[:, -1]
    if stream.long_term is not None:
        levels.append(stream.long_term.to(x.dtype))
    fused = x
    for number, level in enumerate(levels, start=1):
        fused = fused + shares[..., number, None] * (level - x)
    return fused.to(stream.x.dtype), last


def ema(x: Tensor, decay: Tensor, carry: Tensor | None, kinds: Tensor) -> Tensor:
    """States [B, S, G, d] by doubling: the maps s -> a s + b of 1, 2, 4, ... slots are composed."""
    kind = kinds[..., None, None]
    step = kind == STEP
    a = torch.where(step, decay, (kind == HOLD).to(x.dtype))
    b = torch.where(step, (1 - decay) * x.masked_fill(~step, 0), x.masked_fill(kind != FRESH, 0))
    if carry is not None:
        first = a[:, :1] * carry[:, None].to(x.dtype).masked_fill(kind[:, :1] == FRESH, 0)
        b = torch.cat((b[:, :1] + first, b[:, 1:]), dim=1)
    # a map that passed a FRESH slot takes nothing from before it, not even NaN
    sealed = (kind == FRESH).expand_as(x)
    reach = 1
    while reach < x.shape[1]:
        b = b + a * _shifted(b, reach).masked_fill(sealed, 0)
        a = a * _shifted(a, reach)
        sealed = sealed | _shifted(sealed, reach)
        reach *= 2
    return b


def _shifted(x: Tensor, by: int) -> Tensor:
    """What the slot `by` before holds, 0 where there is none."""
    return F.pad(x[:, :-by], (0, 0, 0, 0, by, 0))
