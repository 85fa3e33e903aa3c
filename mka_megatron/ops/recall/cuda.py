"""The recall's CUDA kernels: the reference's results bit for bit, in one read of the keys and values.

Shapes as in the package. All arguments are CUDA tensors, of any strides; ValueError for what the kernels cannot do.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from mka_megatron.ops import library
from mka_megatron.ops.recall.reference import Candidates, spread_means

CHANNELS = (64, 128, 256)
SIZES = (64, 128)
QUERIES = 16
_DTYPES = tuple(library.DTYPES)


class PoolArgs(ctypes.Structure):
    """MkaRecallPoolArgs."""

    _fields_ = library.fields(
        k="p", v="p", lengths="p", planes="p", centre="p", k_mean="p", v_mean="p", codes="p",
        k_strides="i3", v_strides="i3", dtype="i", centre_dtype="i", batch="i", slots="i", chunks="i", groups="i", channels="i", size="i", words="i",
    )  # fmt: skip


class QueriesArgs(ctypes.Structure):
    """MkaRecallQueriesArgs."""

    _fields_ = library.fields(
        q="p", before="p", lengths="p", counts="p", planes="p", sums="p", codes="p",
        q_strides="i3", dtype="i", batch="i", slots="i", chunks="i", heads="i", groups="i", channels="i", size="i", words="i",
    )  # fmt: skip


class SelectArgs(ctypes.Structure):
    """MkaRecallSelectArgs."""

    _fields_ = library.fields(
        queries="p", codes="p", documents="p", found="p",
        batch="i", count="i", groups="i", words="i", tables="i", total="i", stored="i",
        first="i", window="i", recalled="i",
    )  # fmt: skip


def lacks(channels: int, size: int, dtype: torch.dtype, selection: str) -> str:
    """Why there is no kernel for heads of so many channels, a chunk size, a dtype and a selection; "": there is."""
    if selection == "exact":
        return "it selects by hash codes, not by exact products"
    if dtype not in _DTYPES:
        return f"its dtypes are {', '.join(map(str, _DTYPES))}, not {dtype}"
    if channels not in CHANNELS:
        return f"a head must have {', '.join(map(str, CHANNELS))} channels, not {channels}"
    return "" if size in SIZES else f"its chunk sizes are {' and '.join(map(str, SIZES))}, not {size}"


def pool(
    k: Tensor, v: Tensor, lengths: Tensor, size: int, planes: Tensor, centre: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What is kept of each chunk at hand.

    Args:
        k, v: [B, S, G, d] fp32, bf16 or fp16; d in CHANNELS.
        lengths: [B, n] int64 tokens at the head of each chunk.
        size: C, in SIZES.
        planes: [T, bits, d] int8 of +-1.
        centre: [G, d] that is taken from every key before its code is made.

    Returns:
        mean keys and values [B, n, G, d], differentiable, and codes [B, n, G, W] int64: `chunk_means` of both, and
        `sign_codes` of the keys' `chunk_sums`.
    """
    return _pool(k, v, lengths.contiguous(), size, planes, None if centre is None else centre.contiguous())


def means(k: Tensor, v: Tensor, lengths: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The means of :func:`pool` alone."""
    return _pool(k, v, lengths.contiguous(), size, None, None)[:2]


def codes(k: Tensor, lengths: Tensor, size: int, planes: Tensor, centre: Tensor | None = None) -> Tensor:
    """The codes of :func:`pool` alone."""
    return _codes(k, lengths.contiguous(), size, planes, None if centre is None else centre.contiguous())


def recent_codes(
    q: Tensor, before: Tensor | None, lengths: Tensor, counts: Tensor, size: int, groups: int, planes: Tensor
) -> tuple[Tensor, Tensor]:
    """What each chunk at hand selects by.

    Args:
        q: [B, S, H, d] fp32, bf16 or fp16; d in CHANNELS.
        before: [B, 16, G, d] fp64 integers of the last 16 tokens before slot 0, oldest first; None: there are none.
        lengths, counts: [B, n] int64, as in `recent_sums`.
        groups: G.
        planes: [T, bits, d] int8 of +-1.

    Returns:
        sums [B, n, G, d] fp64 as `recent_sums` gives them, and their codes [B, n, G, W] int64.
    """
    earlier = None if before is None else before.contiguous()
    return _queries(q, earlier, lengths.contiguous(), counts.contiguous(), size, groups, planes)


def nearest_codes(
    queries: Tensor, codes: Tensor, candidates: Candidates, tables: int, recalled: int
) -> Tensor:
    """As the reference's `nearest_codes`."""
    given = (x.contiguous() for x in (queries, codes, candidates.documents))
    return _select(*given, candidates.first, candidates.window, tables, recalled)


def pool_args(
    k: Tensor,
    v: Tensor | None,
    lengths: Tensor,
    size: int,
    planes: Tensor | None,
    centre: Tensor | None,
    out: tuple[Tensor | None, Tensor | None, Tensor],
) -> PoolArgs:
    """The call's struct; the tensors must outlive it."""
    batch, slots, groups, channels = k.shape
    at = library.pointer
    return PoolArgs(
        at(k), at(v), at(lengths), at(planes), at(centre), *map(at, out),
        library.strides(k), library.strides(k if v is None else v),
        library.DTYPES[k.dtype], 0 if centre is None else library.DTYPES[centre.dtype],
        batch, slots, lengths.shape[1], groups, channels, size, out[2].shape[-1],
    )  # fmt: skip


def queries_args(
    q: Tensor,
    before: Tensor | None,
    lengths: Tensor,
    counts: Tensor,
    size: int,
    groups: int,
    planes: Tensor,
    out: tuple[Tensor, Tensor],
) -> QueriesArgs:
    """The call's struct; the tensors must outlive it."""
    batch, slots, heads, channels = q.shape
    at = library.pointer
    return QueriesArgs(
        at(q), at(before), at(lengths), at(counts), at(planes), *map(at, out),
        library.strides(q), library.DTYPES[q.dtype], batch, slots, lengths.shape[1], heads, groups, channels, size, out[1].shape[-1],
    )  # fmt: skip


def select_args(
    queries: Tensor,
    codes: Tensor,
    documents: Tensor,
    first: int,
    window: int,
    tables: int,
    recalled: int,
    out: Tensor,
) -> SelectArgs:
    """The call's struct; the tensors must outlive it."""
    batch, count, groups, words = queries.shape
    at = library.pointer
    return SelectArgs(
        at(queries), at(codes), at(documents), at(out),
        batch, count, groups, words, tables, documents.shape[1], codes.shape[1], first, window, recalled,
    )  # fmt: skip


def pool_out(k: Tensor, v: Tensor, lengths: Tensor, planes: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Empty outputs of :func:`pool`; without planes the codes have no words."""
    batch, _, groups, channels = k.shape
    chunks = lengths.shape[1]
    return (
        k.new_empty(batch, chunks, groups, channels),
        v.new_empty(batch, chunks, groups, channels),
        codes_out(k, lengths, planes),
    )


def codes_out(k: Tensor, lengths: Tensor, planes: Tensor | None) -> Tensor:
    """Empty codes."""
    return lengths.new_empty(*lengths.shape, k.shape[2], 0 if planes is None else planes.shape[0] * planes.shape[1] // 64)


def queries_out(q: Tensor, lengths: Tensor, groups: int, planes: Tensor) -> tuple[Tensor, Tensor]:
    """Empty outputs of :func:`recent_codes`."""
    batch, chunks = lengths.shape
    return (
        q.new_empty(batch, chunks, groups, q.shape[3], dtype=torch.float64),
        lengths.new_empty(batch, chunks, groups, planes.shape[0] * planes.shape[1] // 64),
    )


def _pool_fake(
    k: Tensor, v: Tensor, lengths: Tensor, size: int, planes: Tensor | None, centre: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return pool_out(k, v, lengths, planes)


def _pool_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    k, _, lengths, ctx.size, _, _ = inputs
    ctx.slots = k.shape[1]
    ctx.save_for_backward(lengths)
    ctx.mark_non_differentiable(output[2])


def _pool_backward(
    ctx: Any, grad_k: Tensor, grad_v: Tensor, _: Any
) -> tuple[Tensor, Tensor, None, None, None, None]:
    (lengths,) = ctx.saved_tensors
    of_k, of_v = (spread_means(grad, lengths, ctx.size, ctx.slots) for grad in (grad_k, grad_v))
    return of_k, of_v, None, None, None, None


@library.operator("recall_pool", _pool_fake, backward=_pool_backward, save=_pool_save)
def _pool(
    k: Tensor, v: Tensor, lengths: Tensor, size: int, planes: Tensor | None, centre: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    _check_pool(k, lengths, size, planes, centre)
    library.check("v", v, k.shape, (k.dtype,), k.device, strided=True)
    out = pool_out(k, v, lengths, planes)
    k, v = library.rows(k), library.rows(v)
    library.run("mka_recall_pool", pool_args(k, v, lengths, size, planes, centre, out), k.device)
    return out


def _codes_fake(k: Tensor, lengths: Tensor, size: int, planes: Tensor, centre: Tensor | None) -> Tensor:
    return codes_out(k, lengths, planes)


@library.operator("recall_codes", _codes_fake)
def _codes(k: Tensor, lengths: Tensor, size: int, planes: Tensor, centre: Tensor | None) -> Tensor:
    _check_pool(k, lengths, size, planes, centre)
    out, k = codes_out(k, lengths, planes), library.rows(k)
    args = pool_args(k, None, lengths, size, planes, centre, (None, None, out))
    library.run("mka_recall_pool", args, k.device)
    return out


def _check_pool(k: Tensor, lengths: Tensor, size: int, planes: Tensor | None, centre: Tensor | None) -> None:
    library.check("k", k, (-1, -1, -1, -1), _DTYPES, strided=True)
    batch, slots, groups, channels = k.shape
    _sizes(size, channels, k.dtype)
    library.check("lengths", lengths, (batch, -(-slots // size)), (torch.int64,), k.device)
    if planes is not None:
        _check_planes(planes, channels, k.device)
    if centre is not None:
        library.check("centre", centre, (groups, channels), _DTYPES, k.device)


def _queries_fake(
    q: Tensor, before: Tensor | None, lengths: Tensor, counts: Tensor, size: int, groups: int, planes: Tensor
) -> tuple[Tensor, Tensor]:
    return queries_out(q, lengths, groups, planes)


@library.operator("recall_queries", _queries_fake)
def _queries(
    q: Tensor, before: Tensor | None, lengths: Tensor, counts: Tensor, size: int, groups: int, planes: Tensor
) -> tuple[Tensor, Tensor]:
    library.check("q", q, (-1, -1, -1, -1), _DTYPES, strided=True)
    batch, slots, heads, channels = q.shape
    _sizes(size, channels, q.dtype)
    if groups < 1 or heads % groups:
        raise ValueError(f"q has {heads} heads: they must be a multiple of the {groups} KV heads.")
    if before is not None:
        library.check("before", before, (batch, QUERIES, groups, channels), (torch.float64,), q.device)
    library.check("lengths", lengths, (batch, -(-slots // size)), (torch.int64,), q.device)
    library.check("counts", counts, lengths.shape, (torch.int64,), q.device)
    _check_planes(planes, channels, q.device)
    out, q = queries_out(q, lengths, groups, planes), library.rows(q)
    args = queries_args(q, before, lengths, counts, size, groups, planes, out)
    library.run("mka_recall_queries", args, q.device)
    return out


def _select_fake(
    queries: Tensor, codes: Tensor, documents: Tensor, first: int, window: int, tables: int, recalled: int
) -> Tensor:
    return queries.new_empty(*queries.shape[:3], recalled)


@library.operator("recall_select", _select_fake)
def _select(
    queries: Tensor, codes: Tensor, documents: Tensor, first: int, window: int, tables: int, recalled: int
) -> Tensor:
    library.check("queries", queries, (-1, -1, -1, -1), (torch.int64,))
    batch, count, groups, words = queries.shape
    library.check("codes", codes, (batch, -1, groups, words), (torch.int64,), queries.device)
    library.check("documents", documents, (batch, -1), (torch.int64,), queries.device)
    last = first + count - window
    if codes.shape[1] < last:
        raise ValueError(f"codes has {codes.shape[1]} chunks: the last candidate needs {last}.")
    out = _select_fake(queries, codes, documents, first, window, tables, recalled)
    args = select_args(queries, codes, documents, first, window, tables, recalled, out)
    library.run("mka_recall_select", args, queries.device)
    return out


def _sizes(size: int, channels: int, dtype: torch.dtype) -> None:
    if problem := lacks(channels, size, dtype, "hash"):
        raise ValueError(f"recall has no kernel: {problem}.")


def _check_planes(planes: Tensor, channels: int, device: torch.device) -> None:
    library.check("planes", planes, (-1, -1, channels), (torch.int8,), device)
    if planes.shape[1] % 64:
        raise ValueError(f"planes has {planes.shape[1]} bits a table: give a multiple of 64.")
