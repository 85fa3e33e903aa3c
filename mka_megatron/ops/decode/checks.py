"""What the arguments must be, checked before work starts. Shapes as in the package."""

from __future__ import annotations

import torch
from torch import Tensor

from mka_megatron.ops.decode.cache import Cache, Hashing


def check_fuse(
    cache: Cache,
    k: Tensor,
    v: Tensor,
    shares: Tensor,
    decay_k: Tensor | None,
    decay_v: Tensor | None,
    long_term: tuple[Tensor | None, Tensor | None],
) -> None:
    """Raises ValueError for arguments of fuse that contradict each other."""
    batch, groups, _, channels = _sizes(cache)
    head, levels = (batch, groups, channels), 1 + any(x is not None for x in long_term)
    _shape("k", k, head)
    _shape("v", v, head)
    _shape("shares", shares, (batch, groups if shares.dim() == 3 and shares.shape[1] != 1 else 1, levels))
    for name, decay, state, l3 in (("k", decay_k, cache.ema_k, long_term[0]), ("v", decay_v, cache.ema_v, long_term[1])):
        if decay is not None:
            _shape(f"decay_{name}", decay, (groups, channels))
            if state is None:
                raise ValueError(f"decay_{name} is given, but the cache holds no moving average: build it with ema=True.")
        if l3 is not None:
            _shape(f"long_term {name}", l3, head)


def check_append(cache: Cache, q: Tensor, k: Tensor, rotated: Tensor, v: Tensor) -> None:
    """Raises ValueError for arguments of append that contradict each other."""
    batch, groups, _, channels = _sizes(cache)
    _queries(q, batch, groups, channels)
    for name, x in (("k", k), ("rotated", rotated), ("v", v)):
        _shape(name, x, (batch, groups, channels))


def check_attend(cache: Cache, q: Tensor, bias: Tensor | None, window: int) -> None:
    """Raises ValueError for arguments of attend that contradict each other."""
    batch, groups, _, channels = _sizes(cache)
    _queries(q, batch, groups, channels)
    _window(cache, window)
    if bias is not None:
        _shape("bias", bias, (batch, groups if bias.dim() == 3 and bias.shape[1] != 1 else 1, 3))


def check_close(
    cache: Cache, cos: Tensor, sin: Tensor, hashing: Hashing | None, window: int, force: Tensor | None
) -> None:
    """Raises ValueError for arguments of close that contradict each other."""
    batch, groups, _, channels = _sizes(cache)
    _window(cache, window)
    rotated = cos.shape[-1]
    if rotated % 2 or rotated > channels:
        raise ValueError(f"rotary tables have {rotated} channels, heads {channels}: give an even number, at most that.")
    _shape("cos", cos, (batch, rotated))
    _shape("sin", sin, (batch, rotated))
    if force is not None:
        _shape("force", force, (batch,))
        if force.dtype != torch.bool:
            raise ValueError(f"force is {force.dtype}: give a bool tensor.")
    if (hashing is None) != (cache.codes is None):
        raise ValueError("hashing goes with a cache that has codes: pass it exactly where words is not 0.")
    if hashing is not None and cache.codes is not None:
        tables, bits, _ = hashing.planes.shape
        _shape("planes", hashing.planes, (tables, bits, channels))
        if tables * bits != 64 * cache.codes.shape[3] or bits % 64:
            raise ValueError(f"{tables} tables of {bits} planes make no codes of {cache.codes.shape[3]} words: give multiples of 64.")
        if hashing.key_bias is not None:
            _shape("key_bias", hashing.key_bias, (groups, channels))


def _sizes(cache: Cache) -> tuple[int, int, int, int]:
    """B, G, N, d."""
    return *cache.table.shape, cache.k.shape[2]


def _queries(q: Tensor, batch: int, groups: int, channels: int) -> None:
    heads = q.shape[1] if q.dim() == 3 else 0
    if heads < 1 or heads % groups:
        raise ValueError(f"q has shape {list(q.shape)} over {groups} KV heads: give [B, H, d] with H a multiple of G.")
    _shape("q", q, (batch, heads, channels))


def _window(cache: Cache, window: int) -> None:
    size = cache.k.shape[1]
    if window < size or window % size:
        raise ValueError(f"window is {window}: give a multiple of the chunk size {size}.")


def _shape(name: str, tensor: Tensor, wanted: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != wanted:
        raise ValueError(f"{name} has shape {list(tensor.shape)}: give {list(wanted)}.")
