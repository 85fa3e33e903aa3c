"""The fusion's operator on CPU tensors: its kernels' blocks and threads run one after the other, in the library."""

from __future__ import annotations

import ctypes

import pytest
from torch import Tensor

from mka_megatron.ops import library as package_library
from mka_megatron.ops.route_fuse import cuda


def run_on_host(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test's end `mka::route_fuse` takes CPU tensors."""

    def run(entry: str, args: cuda.Args, x: Tensor, *, backward: bool) -> None:
        assert cuda.workspace_bytes(library, args, backward) > 0
        assert getattr(library, entry.replace("mka_", "mka_host_"))(ctypes.byref(args)) == 0

    for made in (cuda._forward, cuda._backward):
        made.register_kernel("cpu")(made._init_fn)
    monkeypatch.setattr(cuda, "_run", run)
    monkeypatch.setattr(package_library, "check", lambda *_, **__: None)
