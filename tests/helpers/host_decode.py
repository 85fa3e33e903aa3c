"""The decode's operators on CPU tensors: their kernels' lanes and threads run one after the other, in the library."""

from __future__ import annotations

import ctypes
import math

import torch

from mka_megatron.ops.decode import cuda, structs


def register_decode(library: ctypes.CDLL) -> None:
    """From here on `mka::decode_*` take CPU tensors too; what they return was NaN before."""

    def call(entry: str, args: ctypes.Structure) -> None:
        assert getattr(library, entry)(ctypes.byref(args)) == 0

    @cuda._attend.register_kernel("cpu")
    def _(q, bias, k, v, table, lengths, chunk, summary_k, summary_v, recalled, arrived, window, scale, splits):  # type: ignore[no-untyped-def]
        out = torch.full_like(q, math.nan)
        partial = cuda.partial_of(q, table.shape[1], splits)
        args = structs.attend_args(
            q, bias, k, v, table, lengths, chunk, summary_k, summary_v, recalled, out, partial, arrived,
            window=window, scale=scale, splits=splits,
        )  # fmt: skip
        call("mka_host_decode_attend", args)
        return out

    @cuda._fuse.register_kernel("cpu")
    def _(x, decay, state, shares, long_term, chunk, position):  # type: ignore[no-untyped-def]
        out = torch.full_like(x, math.nan)
        call("mka_host_decode_fuse", structs.fuse_args(x, decay, state, shares, long_term, chunk, position, out))
        return out

    @cuda._append.register_kernel("cpu")
    def _(q, k, rotated, v, *cache):  # type: ignore[no-untyped-def]
        call("mka_host_decode_append", structs.append_args(q, k, rotated, v, *cache))

    @cuda._close.register_kernel("cpu")
    def _(cos, sin, force, planes, key_bias, pages, lengths, *cache):  # type: ignore[no-untyped-def]
        *cache, window = cache
        groups = cuda.groups_of(cache[2], cache[6])
        args = structs.close_args(
            cos, sin, force, planes, key_bias, pages, lengths, *cache, groups=groups, window=window
        )
        call("mka_host_decode_close", args)
