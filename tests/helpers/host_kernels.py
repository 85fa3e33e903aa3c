"""The recall's operators on CPU tensors: their kernels' threads run one after the other, in the library."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from mka_megatron.ops.library import rows as library_rows
from mka_megatron.ops.recall import cuda


def register_recall(library: ctypes.CDLL) -> None:
    """From here on `mka::recall_*` take CPU tensors too."""

    def call(entry: str, args: ctypes.Structure) -> None:
        assert getattr(library, entry)(ctypes.byref(args)) == 0

    @cuda._pool.register_kernel("cpu")
    def _(k, v, lengths, size, planes, centre):  # type: ignore[no-untyped-def]
        out, k, v = poisoned(*cuda.pool_out(k, v, lengths, planes)), library_rows(k), library_rows(v)
        call("mka_host_recall_pool", cuda.pool_args(k, v, lengths, size, planes, centre, out))
        return out

    @cuda._codes.register_kernel("cpu")
    def _(k, lengths, size, planes, centre):  # type: ignore[no-untyped-def]
        (out,), k = poisoned(cuda.codes_out(k, lengths, planes)), library_rows(k)
        call("mka_host_recall_pool", cuda.pool_args(k, None, lengths, size, planes, centre, (None, None, out)))
        return out

    @cuda._queries.register_kernel("cpu")
    def _(q, before, lengths, counts, size, groups, planes):  # type: ignore[no-untyped-def]
        out, q = poisoned(*cuda.queries_out(q, lengths, groups, planes)), library_rows(q)
        args = cuda.queries_args(q, before, lengths, counts, size, groups, planes, out)
        call("mka_host_recall_queries", args)
        return out

    @cuda._select.register_kernel("cpu")
    def _(queries, codes, documents, first, window, tables, recalled):  # type: ignore[no-untyped-def]
        (out,) = poisoned(queries.new_empty(*queries.shape[:3], recalled))
        args = cuda.select_args(queries, codes, documents, first, window, tables, recalled, out)
        call("mka_host_recall_select", args)
        return out


def poisoned(*out: Tensor) -> tuple[Tensor, ...]:
    """Filled with values that no result has."""
    return tuple(torch.Tensor.fill_(x, math.nan if x.is_floating_point() else -77) for x in out)
