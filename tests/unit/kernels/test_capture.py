"""What a CUDA graph asks of the layers over the kernels, as far as a machine without a GPU shows it: with tensors that have
no data (PyTorch's meta device), a value that the host would wait for and a copy to the host are errors."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mka_megatron.attention import fastmka
from mka_megatron.attention.inputs import Finish, RouteInputs
from mka_megatron.config.schema import AttentionConfig, Config, L1Config, L3Config, MemoryConfig
from mka_megatron.memory.chunks import Chunks
from mka_megatron.memory.documents import Documents
from mka_megatron.memory.hashing import Selector, pooled, select
from mka_megatron.ops import library
from mka_megatron.ops.block_attention import cuda as block_attention
from mka_megatron.ops.decode import cuda as decode
from mka_megatron.ops.recall import cuda as recall
from mka_megatron.ops.route_fuse import Stream, route_fuse
from mka_megatron.ops.route_fuse import cuda as route_fuse_cuda
from tests.helpers.layouts import chunked

B, S, H, G, D, C, R = 2, 8 * 64 + 21, 4, 2, 64, 64, 2
META = torch.device("meta")
BINDINGS = (library, block_attention, recall, route_fuse_cuda, decode)


class Ours(TorchDispatchMode):
    """Lists the operators of ours that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).startswith("mka."):
            self.called.append(str(func).split(".")[1])
        return func(*args, **(kwargs or {}))


def without_data(where: Documents) -> tuple[Documents, Chunks]:
    """The same documents and their chunks."""
    chunks = Chunks.of(where, C)
    tables = (x.to(META) for x in (chunks.lengths, chunks.documents, chunks.last))
    return where.to(META), Chunks(C, *tables, chunks.first, chunks.count)


def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META, requires_grad=True)


def called(body: Callable[[], Tensor]) -> list[str]:
    """Our operators in a forward and a backward pass of `body`."""
    with Ours() as ours:
        body().sum().backward()
    return ours.called


@pytest.fixture(autouse=True)
def any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bindings ask for CUDA tensors before they call an operator."""
    monkeypatch.setattr(library, "check", lambda *_, **__: None)


@pytest.mark.parametrize("waiting", [Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.nonzero, bool])
def test_what_waits_is_an_error_here(waiting: Callable[[Tensor], object]) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        waiting(leaf(1).detach())


@pytest.mark.parametrize("documents", ["whole", "packed"])
def test_the_fusion_waits_for_nothing(documents: str) -> None:
    rows, _ = without_data(Documents.unpacked(B, S) if documents == "whole" else chunked(B, S, C, seed=3))
    projected, logits = leaf(S, B, G, 4 * D), leaf(B, S, 3, dtype=torch.float32)
    _, k, v = projected.transpose(0, 1).split((2 * D, D, D), dim=3)
    decay, carry = leaf(G, D, dtype=torch.float32), leaf(B, G, D, dtype=torch.float32)
    streams = [Stream(x, decay, carry, leaf(B, S, G, D)) for x in (k, v)]
    late = torch.empty(B, S, 3, dtype=torch.bool, device=META)

    def body() -> Tensor:
        fused, weights = route_fuse(streams, logits, leaf(1), rows, late, mode="top2", backend="cuda")
        assert weights.shape == logits.shape and all(y.is_contiguous() for y, _ in fused)
        return sum(y.sum() + last.sum() for y, last in fused)

    assert called(body) == ["route_fuse", "route_fuse_backward"]
    assert projected.grad.shape == projected.shape and carry.grad.dtype == torch.float32


@pytest.mark.parametrize("normed", [False, True])
def test_the_recall_waits_for_nothing(normed: bool) -> None:
    rows, chunks = without_data(chunked(B, S, C, seed=3))
    planes = torch.empty(1, 128, D, dtype=torch.int8, device=META)
    q, k, v = leaf(B, S, H, D), leaf(B, S, G, D), leaf(B, S, G, D)
    selector = Selector("hash", R, planes, torch.empty(G, D, device=META))

    def body() -> Tensor:
        k_mean, v_mean, codes = pooled(k, v, chunks, selector, 2 * k if normed else None, backend="cuda")
        found, _ = select(q, codes, rows, chunks, selector, lambda last: last, 1, backend="cuda")
        assert found.shape == (B, chunks.count, G, R) and found.device == META
        return k_mean.sum() + v_mean.sum()

    assert called(body) == ["recall_pool", *["recall_codes"] * normed, "recall_queries", "recall_select"]


def test_a_layer_waits_for_nothing() -> None:
    """FastMKA with all levels, dense, up to the attention itself."""
    rows, chunks = without_data(Documents.unpacked(B, 8 * C))
    planes = torch.empty(1, 128, D, dtype=torch.int8, device=META)
    config = Config(memory_hierarchy=MemoryConfig(l1=L1Config(chunk_size=C), l3=L3Config(enabled=True)))
    finish = Finish(lambda x: 2 * x, lambda x: 2 * x, lambda x, _: x)
    slots = 8 * C
    q, k, v = leaf(B, slots, H, D), leaf(B, slots, G, D), leaf(B, slots, G, D)
    decay = leaf(G, D, dtype=torch.float32)
    route = RouteInputs(leaf(B, slots, 3, dtype=torch.float32), leaf(1, dtype=torch.float32), decay, decay)
    memory = fastmka.Memory(
        chunks=chunks, selector=Selector("hash", R, planes), fuse_backend="cuda", recall_backend="cuda"
    )
    ours = called(
        lambda: fastmka.attend(
            q, k, v, finish=finish, route=route, documents=rows, scale=1.0, config=config, memory=memory
        )[0]
    )
    assert {"route_fuse", "route_fuse_backward", "recall_pool", "recall_codes", "recall_select"} <= set(ours)


@pytest.mark.parametrize("documents", ["whole", "packed"])
def test_a_layer_over_the_block_core_waits_for_nothing(documents: str) -> None:
    """FastMKA with fusion, recall and the block core's attention."""
    rows, chunks = without_data(Documents.unpacked(B, S) if documents == "whole" else chunked(B, S, C, seed=3))
    levels = MemoryConfig(l1=L1Config(window=2 * C, chunk_size=C), l3=L3Config(enabled=True, recalled_chunks=R))
    config = Config(attention=AttentionConfig(core="block"), memory_hierarchy=levels)
    finish = Finish(lambda x: 2 * x, lambda x: 2 * x, lambda x, _: x)
    q, k, v = leaf(B, S, H, D), leaf(B, S, G, D), leaf(B, S, G, D)
    decay = leaf(G, D, dtype=torch.float32)
    fused, core = (leaf(B, S, levels, dtype=torch.float32) for levels in (2, 3))
    route = RouteInputs(fused, leaf(1, dtype=torch.float32), decay, decay, core)
    planes = torch.empty(1, 128, D, dtype=torch.int8, device=META)
    memory = fastmka.Memory(
        chunks=chunks, selector=Selector("hash", R, planes), backend="cuda", fuse_backend="cuda", recall_backend="cuda"
    )
    ours = called(
        lambda: fastmka.attend(
            q, k, v, finish=finish, route=route, documents=rows, scale=1.0, config=config, memory=memory
        )[0]
    )
    assert {"block_attention", "block_attention_backward", "route_fuse", "recall_pool", "recall_select"} <= set(ours)
    assert all(x.grad is not None and x.grad.shape == x.shape for x in (q, k, v, core))


@pytest.mark.parametrize("module", BINDINGS, ids=lambda module: module.__name__.split("ops.")[1])
def test_the_bindings_have_no_call_that_waits(module: ModuleType) -> None:
    """Neither a value nor a copy, nor a stream other than the current one."""
    waits = {"item", "tolist", "cpu", "numpy", "nonzero", "synchronize", "default_stream", "__bool__"}
    called = {
        node.func.attr: node.lineno
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }
    assert not waits & set(called), {name: called[name] for name in waits & set(called)}
