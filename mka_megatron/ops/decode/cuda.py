"""Binding of the decode kernels (kernels/csrc/decode.cu, decode_update.cu). Shapes as in the package."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from mka_megatron.ops import library
from mka_megatron.ops.decode.cache import SELECTING_QUERIES, Cache, Hashing
from mka_megatron.ops.decode.structs import append_args, attend_args, close_args, fuse_args

HALVES = (torch.bfloat16, torch.float16)
CHANNELS = (64, 128, 256)
MOST_HEADS, MOST_WORDS, MOST_RECALLED = 16, 16, 256
_DTYPES = tuple(library.DTYPES)
_INT32, _INT64, _FP32 = (torch.int32,), (torch.int64,), (torch.float32,)


def fuse(
    cache: Cache,
    k: Tensor,
    v: Tensor,
    shares: Tensor,
    decay_k: Tensor | None,
    decay_v: Tensor | None,
    long_term: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor]:
    """As the package has it; fp32, bf16 or fp16."""
    shares = shares.float().contiguous()

    def one(x: Tensor, decay: Tensor | None, state: Tensor | None, l3: Tensor | None) -> Tensor:
        if decay is None or state is None:
            return x
        rate = decay.float().contiguous()
        return _fuse(x, rate, state, shares, l3, cache.chunk, cache.position)

    return one(k, decay_k, cache.ema_k, long_term[0]), one(v, decay_v, cache.ema_v, long_term[1])


def append(cache: Cache, q: Tensor, k: Tensor, rotated: Tensor, v: Tensor) -> None:
    """As the package has it; fp32, bf16 or fp16."""
    c = cache
    _append(q, k, rotated, v, c.k, c.v, c.table, c.lengths, c.chunk, c.position, c.sum_k, c.sum_v, c.code_sum, c.queries)


def attend(cache: Cache, q: Tensor, bias: Tensor | None, window: int, scale: float) -> Tensor:
    """As the package has it; bf16 or fp16, d of 64, 128 or 256, at most 16 query heads of a KV head."""
    c = cache
    batch, groups, chunks = c.table.shape
    recalled = 0 if c.recalled is None else c.recalled.shape[2]
    tiles = most_tiles(chunks, window, c.k.shape[1], c.summary_k is not None, recalled)
    splits = choose_splits(batch * groups, tiles, processors(q.device))
    wide = None if bias is None else bias.float().contiguous()
    return _attend(
        q, wide, c.k, c.v, c.table, c.lengths, c.chunk, c.summary_k, c.summary_v, c.recalled, c.arrived, window, scale,
        splits,
    )  # fmt: skip


def close(
    cache: Cache, cos: Tensor, sin: Tensor, hashing: Hashing | None, window: int, force: Tensor | None
) -> None:
    """As the package has it; fp32, bf16 or fp16, d of 64, 128 or 256, at most 16 words and 256 recalled chunks."""
    c = cache
    planes = None if hashing is None else hashing.planes
    bias = None if hashing is None or hashing.key_bias is None else hashing.key_bias.float().contiguous()
    _close(
        cos.float().contiguous(), sin.float().contiguous(), force, planes, bias, c.k, c.lengths, c.chunk, c.position,
        c.summary_k, c.summary_v, c.sum_k, c.sum_v, c.codes, c.recalled, c.code_sum, c.queries, window,
    )  # fmt: skip


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def choose_splits(pairs: int, tiles: int, processors: int) -> int:
    """How many splits the plan gives `pairs` (B * G) of at most so many tiles."""
    return _plan("mka_plan_decode_splits", pairs, tiles, processors)


def most_tiles(chunks: int, window: int, size: int, summaries: bool, recalled: int) -> int:
    """Tiles of a sequence that has filled all its chunks; window in chunks."""
    return _plan("mka_plan_decode_tiles", chunks - 1, window, size, int(summaries), recalled)


def _plan(name: str, *numbers: int) -> int:
    function = getattr(library.library(), name)
    function.restype = ctypes.c_int64
    return function(*map(ctypes.c_int64, numbers))


def _fuse_fake(
    x: Tensor, decay: Tensor, state: Tensor, shares: Tensor, long_term: Tensor | None, chunk: Tensor, position: Tensor
) -> Tensor:
    return torch.empty_like(x)


@library.operator("decode_fuse", _fuse_fake, mutates=("state",))
def _fuse(
    x: Tensor, decay: Tensor, state: Tensor, shares: Tensor, long_term: Tensor | None, chunk: Tensor, position: Tensor
) -> Tensor:
    check, on = library.check, x.device
    check("x", x, (-1, -1, -1), _DTYPES)
    check("decay", decay, x.shape[1:], _FP32, on)
    check("state", state, x.shape, _FP32, on)
    check("shares", shares, (x.shape[0], -1, -1), _FP32, on)
    check("chunk", chunk, x.shape[:1], _INT32, on)
    check("position", position, x.shape[:1], _INT64, on)
    if long_term is not None:
        check("long_term", long_term, x.shape, (x.dtype,), on)
    out = torch.empty_like(x)
    library.run("mka_decode_fuse", fuse_args(x, decay, state, shares, long_term, chunk, position, out), on)
    return out


def _append_fake(*_: Tensor | None) -> None:
    return None


@library.operator(
    "decode_append", _append_fake,
    mutates=("pages_k", "pages_v", "lengths", "position", "sum_k", "sum_v", "code_sum", "queries"),
)  # fmt: skip
def _append(
    q: Tensor,
    k: Tensor,
    rotated: Tensor,
    v: Tensor,
    pages_k: Tensor,
    pages_v: Tensor,
    table: Tensor,
    lengths: Tensor,
    chunk: Tensor,
    position: Tensor,
    sum_k: Tensor | None,
    sum_v: Tensor | None,
    code_sum: Tensor | None,
    queries: Tensor | None,
) -> None:
    check, on, kind = library.check, q.device, (pages_k.dtype,)
    batch, groups, channels = k.shape
    check("q", q, (batch, -1, channels), _DTYPES)
    for name, x in (("k", k), ("rotated", rotated), ("v", v)):
        check(name, x, (batch, groups, channels), kind, on)
    check("q", q, q.shape, kind, on)
    _check_cache(pages_k, pages_v, table, lengths, chunk, batch, groups, channels, on)
    check("position", position, (batch,), _INT64, on)
    for name, state, dtypes in (("sum_k", sum_k, _FP32), ("sum_v", sum_v, _FP32), ("code_sum", code_sum, _INT64)):
        if state is not None:
            check(name, state, k.shape, dtypes, on)
    if queries is not None:
        check("queries", queries, (batch, SELECTING_QUERIES, groups, channels), _INT64, on)
    args = append_args(
        q, k, rotated, v, pages_k, pages_v, table, lengths, chunk, position, sum_k, sum_v, code_sum, queries
    )
    library.run("mka_decode_append", args, on)


def _attend_fake(
    q: Tensor,
    bias: Tensor | None,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    lengths: Tensor,
    chunk: Tensor,
    summary_k: Tensor | None,
    summary_v: Tensor | None,
    recalled: Tensor | None,
    arrived: Tensor,
    window: int,
    scale: float,
    splits: int,
) -> Tensor:
    return torch.empty_like(q)


@library.operator("decode_attend", _attend_fake, mutates=("arrived",))
def _attend(
    q: Tensor,
    bias: Tensor | None,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    lengths: Tensor,
    chunk: Tensor,
    summary_k: Tensor | None,
    summary_v: Tensor | None,
    recalled: Tensor | None,
    arrived: Tensor,
    window: int,
    scale: float,
    splits: int,
) -> Tensor:
    check, on, kind = library.check, q.device, (q.dtype,)
    check("q", q, (-1, -1, -1), HALVES)
    batch, groups, chunks = table.shape
    heads, channels = q.shape[1:]
    if channels not in CHANNELS:
        raise ValueError(f"a head has {channels} channels: the decode kernel has {', '.join(map(str, CHANNELS))}.")
    if heads > MOST_HEADS * groups:
        raise ValueError(f"{heads} query heads over {groups} KV heads: the decode kernel has at most {MOST_HEADS} of one.")
    check("k", k, (-1, -1, channels), kind, on)
    _check_cache(k, v, table, lengths, chunk, batch, groups, channels, on)
    check("arrived", arrived, (batch, groups), _INT32, on)
    if bias is not None:
        check("bias", bias, (batch, -1, 3), _FP32, on)
    for name, x in (("summary_k", summary_k), ("summary_v", summary_v)):
        if x is not None:
            check(name, x, (batch, groups, chunks, channels), kind, on)
    if recalled is not None:
        check("recalled", recalled, (batch, groups, -1), _INT32, on)
    out = torch.empty_like(q)
    partial = partial_of(q, groups, splits)
    args = attend_args(
        q, bias, k, v, table, lengths, chunk, summary_k, summary_v, recalled, out, partial, arrived, window=window,
        scale=scale, splits=splits,
    )  # fmt: skip
    library.run("mka_decode_attend", args, on)
    return out


def partial_of(q: Tensor, groups: int, splits: int) -> Tensor | None:
    """[B, G, splits, H/G, d + 2] fp32 for the splits' outputs; None for one split."""
    batch, heads, channels = q.shape
    shape = (batch, groups, splits, heads // groups, channels + 2)
    return None if splits == 1 else q.new_empty(shape, dtype=torch.float32)


def _close_fake(*_: Any) -> None:
    return None


@library.operator(
    "decode_close", _close_fake,
    mutates=("chunk", "summary_k", "summary_v", "sum_k", "sum_v", "codes", "recalled", "code_sum"),
)  # fmt: skip
def _close(
    cos: Tensor,
    sin: Tensor,
    force: Tensor | None,
    planes: Tensor | None,
    key_bias: Tensor | None,
    pages: Tensor,
    lengths: Tensor,
    chunk: Tensor,
    position: Tensor,
    summary_k: Tensor | None,
    summary_v: Tensor | None,
    sum_k: Tensor | None,
    sum_v: Tensor | None,
    codes: Tensor | None,
    recalled: Tensor | None,
    code_sum: Tensor | None,
    queries: Tensor | None,
    window: int,
) -> None:
    check, on, kind = library.check, cos.device, (pages.dtype,)
    batch, chunks = lengths.shape
    channels = pages.shape[2]
    groups = groups_of(summary_k, codes)
    if channels not in CHANNELS:
        raise ValueError(f"a head has {channels} channels: the decode kernels have {', '.join(map(str, CHANNELS))}.")
    check("cos", cos, (batch, -1), _FP32)
    check("sin", sin, cos.shape, _FP32, on)
    check("pages", pages, pages.shape, _DTYPES, on)
    check("lengths", lengths, (batch, chunks), _INT32, on)
    check("chunk", chunk, (batch,), _INT32, on)
    check("position", position, (batch,), _INT64, on)
    if force is not None:
        check("force", force, (batch,), (torch.bool,), on)
    for name, x in (("summary_k", summary_k), ("summary_v", summary_v)):
        if x is not None:
            check(name, x, (batch, groups, chunks, channels), kind, on)
    for name, x, dtypes in (("sum_k", sum_k, _FP32), ("sum_v", sum_v, _FP32), ("code_sum", code_sum, _INT64)):
        if x is not None:
            check(name, x, (batch, groups, channels), dtypes, on)
    if planes is not None and codes is not None and recalled is not None and queries is not None:
        check("planes", planes, (-1, -1, channels), (torch.int8,), on)
        check("codes", codes, (batch, groups, chunks, -1), _INT64, on)
        check("recalled", recalled, (batch, groups, -1), _INT32, on)
        check("queries", queries, (batch, SELECTING_QUERIES, groups, channels), _INT64, on)
        if codes.shape[3] > MOST_WORDS or recalled.shape[2] > MOST_RECALLED:
            raise ValueError(
                f"codes of {codes.shape[3]} words and {recalled.shape[2]} recalled chunks: the decode kernels have at most "
                f"{MOST_WORDS} and {MOST_RECALLED}."
            )
    if key_bias is not None:
        check("key_bias", key_bias, (groups, channels), _FP32, on)
    args = close_args(
        cos, sin, force, planes, key_bias, pages, lengths, chunk, position, summary_k, summary_v, sum_k, sum_v, codes,
        recalled, code_sum, queries, groups=groups, window=window,
    )  # fmt: skip
    library.run("mka_decode_close", args, on)


def groups_of(summary_k: Tensor | None, codes: Tensor | None) -> int:
    """G of a cache; 1 where it has neither, and a chunk's end leaves nothing of any head."""
    known = summary_k if summary_k is not None else codes
    return 1 if known is None else known.shape[1]


def _check_cache(
    k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, chunk: Tensor, batch: int, groups: int, channels: int,
    device: torch.device,
) -> None:  # fmt: skip
    check = library.check
    check("pages k", k, (-1, -1, channels), _DTYPES, device)
    check("pages v", v, k.shape, (k.dtype,), device)
    check("table", table, (batch, groups, -1), _INT32, device)
    check("lengths", lengths, (batch, table.shape[2]), _INT32, device)
    check("chunk", chunk, (batch,), _INT32, device)
