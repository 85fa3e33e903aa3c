"""Block attention's operators on CPU tensors: their kernels' blocks and lanes run one after the other, in the library."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from torch import Tensor

from mka_megatron.ops import library as package_library
from mka_megatron.ops.block_attention import cuda

_GUARD = 4096
"""Bytes behind the workspace that stay as they are."""


def run_on_host(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test's end `mka::block_attention` takes CPU tensors; what it does not write is NaN."""

    def run(entry: str, args: cuda.Args, x: Tensor, *, backward: bool) -> None:
        size = cuda.workspace_bytes(library, args, backward)
        assert size >= 0, "there is no kernel for these sizes"
        # as floats NaN, as indices -1
        workspace = torch.full((size + _GUARD + 16,), 0xFF, dtype=torch.uint8)
        args.workspace = (workspace.data_ptr() + 15) // 16 * 16
        assert getattr(library, entry.replace("mka_", "mka_host_"))(ctypes.byref(args)) == 0
        assert bool((workspace[size + 16 :] == 0xFF).all()), "nothing is written behind the workspace"

    def poisoned(x: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return x.new_full(shape or x.shape, math.nan, dtype=dtype)

    for made in (cuda._forward, cuda._backward):
        made.register_kernel("cpu")(made._init_fn)
    monkeypatch.setattr(cuda, "_run", run)
    monkeypatch.setattr(cuda, "_empty", poisoned)
    monkeypatch.setattr(package_library, "check", lambda *_, **__: None)
