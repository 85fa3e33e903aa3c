"""Tensors without data on a CPU host, and what the host code that reads them is told.

Shapes, dtypes and autograd are PyTorch's own (FakeTensorMode); our CUDA operators give their outputs' shapes by their
fake implementations. A value that host code asks of such a tensor is 0: no overflow, a finite loss, no label. A mask
selects everything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed._tools.fake_collectives  # registers the collectives for tensors without data
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mka_megatron.attention.backends import Backends
from mka_megatron.config.schema import Config
from mka_megatron.model.core_attention import VariantCore
from mka_megatron.ops import library
from mka_megatron.ops.block_attention import cuda as block_attention
from mka_megatron.ops.recall import cuda as recall
from mka_megatron.ops.route_fuse import cuda as route_fuse
from mka_megatron.ops.scan import summaries as scan

_KERNELS = (block_attention, recall, route_fuse)
_aten = torch.ops.aten


class Absent(TorchDispatchMode):
    """Answers for values that tensors without data do not have. Inside :meth:`real`, operators on tensors with data, and
    factories, give tensors with data."""

    def __init__(self) -> None:
        super().__init__()
        self._real = False

    @contextmanager
    def real(self) -> Iterator[None]:
        """For the few index tensors whose values decide shapes."""
        before, self._real = self._real, True
        try:
            yield
        finally:
            self._real = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if self._real and not any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs))):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is _aten._local_scalar_dense.default:
            dtype = args[0].dtype
            return False if dtype is torch.bool else 0.0 if dtype.is_floating_point else 0
        if func is _aten.index.Tensor:
            args = (args[0], [_everything(each) for each in args[1]])
            args = (args[0], [leaf for each in args[1] for leaf in each])
        return func(*args, **kwargs)


def _everything(index: Tensor | None) -> list[Tensor | None]:
    """Integer indices in place of a mask: of as many elements as it has."""
    if index is None or index.dtype is not torch.bool:
        return [index]
    return [index.new_zeros(index.numel(), dtype=torch.int64) for _ in range(index.dim())]


@contextmanager
def without_data() -> Iterator[Absent]:
    """Every tensor made inside has no data; our kernels' bindings accept it on the CPU."""
    absent = Absent()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(library, "check", lambda *_, **__: None))
        for module in _KERNELS:
            stack.enter_context(mock.patch.object(module, "lacks", lambda *_, **__: ""))
        # thousands of steps in place, which change no shape
        stack.enter_context(mock.patch.object(scan, "scan_", lambda *_, **__: None))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(absent)
        yield absent


def use_kernels(model: nn.Module, config: Config) -> None:
    """Give the layers the operators of a GPU, which never read values on the host; what only the reference computes (a
    prefix mean, exact selection) stays there."""
    levels = config.memory_hierarchy
    fuse = "reference" if levels.l2.enabled and levels.l2.summary == "mean" else "cuda"
    recalled = "reference" if levels.l3.enabled and levels.l3.selection == "exact" else "cuda"
    for module in model.modules():
        if isinstance(module, VariantCore):
            module.backends = Backends("cuda", fuse, recalled)


def keep_in_place(model: nn.Module) -> None:
    """Moves and casts of a model without data change nothing: it is built in its dtype, and PyTorch cannot swap its
    parameters."""
    for name in ("to", "bfloat16", "half", "float"):
        setattr(model, name, lambda *_, **__: model)
