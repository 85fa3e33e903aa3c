"""The structs of kernels/c_api.h for the decode, and how they are filled. Shapes as in the package.

The tensors must outlive the structs.
"""

from __future__ import annotations

import ctypes

from torch import Tensor

from mka_megatron.ops import library


class AttendArgs(ctypes.Structure):
    """MkaDecodeAttendArgs."""

    _fields_ = library.fields(
        q="p", bias="p", k="p", v="p", table="p", lengths="p", chunk="p", summary_k="p", summary_v="p", recalled="p",
        out="p", partial="p", arrived="p", batch="i", groups="i", heads="i", channels="i", size="i", chunks="i",
        window="i", recalled_chunks="i", bias_groups="i", splits="i", dtype="i", scale="f",
    )  # fmt: skip


class FuseArgs(ctypes.Structure):
    """MkaDecodeFuseArgs; pairs of keys and values one after the other."""

    _fields_ = library.fields(
        x_k="p", x_v="p", long_term_k="p", long_term_v="p", decay_k="p", decay_v="p", state_k="p", state_v="p",
        out_k="p", out_v="p", shares="p", chunk="p", position="p", batch="i", groups="i", channels="i",
        share_groups="i", levels="i", dtype="i",
    )  # fmt: skip


class AppendArgs(ctypes.Structure):
    """MkaDecodeAppendArgs."""

    _fields_ = library.fields(
        q="p", key="p", rotated="p", value="p", k="p", v="p", table="p", lengths="p", chunk="p", position="p",
        sum_k="p", sum_v="p", code_sum="p", queries="p", batch="i", groups="i", heads="i", channels="i", size="i",
        chunks="i", dtype="i",
    )  # fmt: skip


class CloseArgs(ctypes.Structure):
    """MkaDecodeCloseArgs."""

    _fields_ = library.fields(
        cos="p", sin="p", force="p", planes="p", key_bias="p", lengths="p", chunk="p", position="p", summary_k="p",
        summary_v="p", sum_k="p", sum_v="p", codes="p", recalled="p", code_sum="p", queries="p", batch="i", groups="i",
        channels="i", size="i", chunks="i", rotated="i", window="i", words="i", tables="i", recalled_chunks="i",
        dtype="i",
    )  # fmt: skip


def attend_args(
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
    out: Tensor,
    partial: Tensor | None,
    arrived: Tensor | None,
    *,
    window: int,
    scale: float,
    splits: int,
) -> AttendArgs:
    """The attention's struct; window in chunks."""
    at = library.pointer
    batch, groups, chunks = table.shape
    return AttendArgs(
        at(q), at(bias), at(k), at(v), at(table), at(lengths), at(chunk),
        at(summary_k), at(summary_v), at(recalled), at(out), at(partial), at(arrived),
        batch, groups, q.shape[1], q.shape[2], k.shape[1], chunks, window,
        0 if recalled is None else recalled.shape[2], 1 if bias is None else bias.shape[1], splits, library.DTYPES[q.dtype], scale,
    )  # fmt: skip


def fuse_args(
    x: Tensor,
    decay: Tensor,
    state: Tensor,
    shares: Tensor,
    long_term: Tensor | None,
    chunk: Tensor,
    position: Tensor,
    out: Tensor,
) -> FuseArgs:
    """The struct of fuse, for keys or values alone."""
    at = library.pointer
    return FuseArgs(
        at(x), None, at(long_term), None, at(decay), None, at(state), None, at(out), None, at(shares), at(chunk),
        at(position), *x.shape, *shares.shape[1:], library.DTYPES[x.dtype],
    )  # fmt: skip


def append_args(q: Tensor, k: Tensor, rotated: Tensor, v: Tensor, *cache: Tensor | None) -> AppendArgs:
    """The call's struct; `cache`: pages k, v, table, lengths, chunk, position, sum_k, sum_v, code_sum, queries."""
    at = library.pointer
    pages, lengths = cache[0], cache[3]
    assert pages is not None and lengths is not None
    batch, groups, channels = k.shape
    return AppendArgs(
        at(q), at(k), at(rotated), at(v), *map(at, cache), batch, groups, q.shape[1], channels, pages.shape[1],
        lengths.shape[1], library.DTYPES[k.dtype],
    )  # fmt: skip


def close_args(
    cos: Tensor,
    sin: Tensor,
    force: Tensor | None,
    planes: Tensor | None,
    key_bias: Tensor | None,
    pages: Tensor,
    lengths: Tensor,
    *cache: Tensor | None,
    groups: int,
    window: int,
) -> CloseArgs:
    """The call's struct; `cache`: chunk, position, summary_k, summary_v, sum_k, sum_v, codes, recalled, code_sum,
    queries; window in chunks."""
    at = library.pointer
    codes, recalled = cache[6], cache[7]
    return CloseArgs(
        at(cos), at(sin), at(force), at(planes), at(key_bias), at(lengths), *map(at, cache), cos.shape[0], groups,
        pages.shape[2], pages.shape[1], lengths.shape[1], cos.shape[1], window, 0 if codes is None else codes.shape[3],
        1 if planes is None else planes.shape[0], 0 if recalled is None else recalled.shape[2],
        library.DTYPES[pages.dtype],
    )  # fmt: skip
