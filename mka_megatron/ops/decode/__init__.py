"""Decode: one token per sequence over a window, chunk summaries and recalled chunks in paged keys and values.

Token by token it gives what block_attention gives for the whole row: the same keys are visible, with the same
summaries, and the same chunks are recalled. The dense decode is the case where the window holds every chunk.

A token's life, every function on the cache in place: :func:`fuse` (fastmka: the level of raw keys and values), norm
and RoPE by the caller, :func:`append`, :func:`attend`, :func:`close`, which closes chunks that are full and those that
are told to, at a prompt's end say.

Shapes: B sequences, P pages of C tokens, N chunks of a sequence, w = window / C, H query heads, G KV heads, d head
channels, r rotated channels, L levels, T tables, W = T * bits / 64 words of a code, R recalled chunks, Q = 16 queries
that select.
"""

from __future__ import annotations

from torch import Tensor

from mka_megatron.ops.decode import cuda, reference
from mka_megatron.ops.decode.cache import Cache as Cache
from mka_megatron.ops.decode.cache import Hashing as Hashing
from mka_megatron.ops.decode.checks import check_append, check_attend, check_close, check_fuse

BACKENDS = {"reference": reference, "cuda": cuda}


def fuse(
    cache: Cache,
    k: Tensor,
    v: Tensor,
    shares: Tensor,
    decay_k: Tensor | None,
    decay_v: Tensor | None,
    long_term: tuple[Tensor | None, Tensor | None] = (None, None),
    *,
    backend: str = "reference",
) -> tuple[Tensor, Tensor]:
    """FastMKA, Algorithm 2 for one token: x + sum over levels l > 1 of share_l * (level_l - x), for keys and values.

    L2 is the moving average s = decay * s + (1 - decay) * x, or x at a sequence's first token, kept in the cache.

    Args:
        k, v: [B, G, d] raw.
        shares: [B, 1 or G, L - 1] beta * lambda_l in fp32 or wider: of L2, then (with `long_term`) of L3.
        decay_k, decay_v: [G, d] in (0, 1); None leaves the keys or values as they are (attention.fuse).
        long_term: L3's raw keys and values [B, G, d], where L3 is fused.

    Returns:
        Fused k and v [B, G, d], dtype of k. Raises ValueError when shapes contradict each other.
    """
    check_fuse(cache, k, v, shares, decay_k, decay_v, long_term)
    return BACKENDS[backend].fuse(cache, k, v, shares, decay_k, decay_v, long_term)


def append(
    cache: Cache, q: Tensor, k: Tensor, rotated: Tensor, v: Tensor, *, backend: str = "reference"
) -> None:
    """Adds a token to the open chunk of every sequence that is not idle.

    Args:
        q: [B, H, d] after q-norm, before RoPE. k: [B, G, d] after k-norm, before RoPE.
        rotated: [B, G, d] k after RoPE. v: [B, G, d].

    Raises ValueError when shapes contradict each other. A full open chunk (close was not called) takes no token.
    """
    check_append(cache, q, k, rotated, v)
    BACKENDS[backend].append(cache, q, k, rotated, v)


def attend(
    cache: Cache, q: Tensor, bias: Tensor | None, *, window: int, scale: float, backend: str = "reference"
) -> Tensor:
    """The attention of the last token appended.

    Args:
        q: [B, H, d] after RoPE.
        bias: [B, 1 or G, 3] fp32 or wider, added to the scaled scores of window, summaries and recalled chunks; -inf
            hides the latter two; None: 0.
        window: w * C tokens, from the open chunk on back; N * C or more: every token (dense decode).
        scale: factor on the scores.

    Returns:
        [B, H, d], dtype of q; 0 for idle sequences. Raises ValueError when shapes contradict each other.
    """
    check_attend(cache, q, bias, window)
    return BACKENDS[backend].attend(cache, q, bias, window // cache.k.shape[1], scale)


def close(
    cache: Cache,
    cos: Tensor,
    sin: Tensor,
    hashing: Hashing | None,
    *,
    window: int,
    force: Tensor | None = None,
    backend: str = "reference",
) -> None:
    """Closes the open chunks that are full, or that hold a token and are told to: summary, code, and the chunks that
    the next one recalls by the last 16 queries.

    Args:
        cos, sin: [B, r] rotary tables at the last token's position, r even.
        hashing: as the cache has codes; None without L3.
        window: w * C, as for :func:`attend`.
        force: [B] bool; None: none.

    Raises ValueError when shapes contradict each other.
    """
    check_close(cache, cos, sin, hashing, window, force)
    BACKENDS[backend].close(cache, cos, sin, hashing, window // cache.k.shape[1], force)
