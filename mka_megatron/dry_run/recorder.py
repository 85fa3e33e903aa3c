"""Every collective that this process issues, in order, on real ranks as on fake ones.

PyTorch's collectives are operators of its dispatcher (`c10d::...`), whoever calls them: Megatron, DeepSpeed, autograd's
backward. A dispatch mode sees them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_NAMES = {
    "allreduce_": "all-reduce", "allreduce_coalesced_": "all-reduce", "broadcast_": "broadcast", "reduce_": "reduce",
    "allgather_": "all-gather", "_allgather_base_": "all-gather", "allgather_into_tensor_coalesced_": "all-gather",
    "reduce_scatter_": "reduce-scatter", "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter", "alltoall_": "all-to-all", "alltoall_base_": "all-to-all",
}  # fmt: skip
_IN_PLACE = ("all-reduce", "broadcast", "reduce")


@dataclass(frozen=True)
class Collective:
    """One call."""

    op: str
    ranks: tuple[int, ...]
    """Of the group, in its order, as ranks of the world."""
    dtype: str
    given: int
    """Bytes that this rank puts in."""
    received: int
    """Bytes that come out."""
    splits: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    """all-to-all: bytes to every rank of the group, and from it."""

    def sent(self, rank: int) -> int:
        """Bytes that `rank` of the world sends: all-to-all what is not its own, the others as rings do (an all-reduce
        is a reduce-scatter and an all-gather; a broadcast and a reduce are pipelined)."""
        size, place = len(self.ranks), self.ranks.index(rank)
        if size == 1:
            return 0
        if self.op == "all-to-all":
            return self.given - (self.splits[0][place] if self.splits[0] else self.given // size)
        if self.op == "all-reduce":
            return 2 * self.given * (size - 1) // size
        if self.op == "all-gather":
            return self.given * (size - 1)
        if self.op == "reduce-scatter":
            return self.given * (size - 1) // size
        return self.given

    def agrees(self, other: Collective) -> bool:
        """Two members of a group may issue these as one collective."""
        mine, theirs = (self.op, self.ranks, self.dtype), (other.op, other.ranks, other.dtype)
        if self.op == "all-to-all":  # every pair has its own size
            return mine == theirs
        return mine == theirs and (self.given, self.received) == (other.given, other.received)


class Recorder(TorchDispatchMode):
    """Lists the collectives that are issued while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[Collective] = []
        self.marks: list[int] = []

    def mark(self) -> None:
        """Remember the place between the collectives before and after this call."""
        self.marks.append(len(self.collectives))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func.namespace == "c10d" and (found := _collective(func, args)) is not None:
            self.collectives.append(found)
        return func(*args, **(kwargs or {}))


def _collective(func: Any, args: Any) -> Collective | None:
    """None for what moves no tensors (a barrier's is a dummy) and for helpers that are no collective."""
    name = func._schema.name.removeprefix("c10d::")
    place = next((number for number, each in enumerate(args) if isinstance(each, torch.ScriptObject)), None)
    if place is None:
        return None
    group = dist.ProcessGroup.unbox(args[place])
    ranks = tuple(dist.get_process_group_ranks(group))
    op = _NAMES.get(name, name.strip("_"))
    tensors = [[leaf for leaf in tree_leaves(each) if isinstance(leaf, Tensor)] for each in args[:place]]
    out = tensors[0]
    into = out if op in _IN_PLACE or len(tensors) == 1 else tensors[1]
    if op == "barrier" or not out:
        return Collective(op, ranks, "", 0, 0)
    width = out[0].element_size()
    splits: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    if name == "alltoall_base_":
        splits = (_bytes(args[place + 2], into[0], len(ranks)), _bytes(args[place + 1], out[0], len(ranks)))
    elif name == "alltoall_":
        splits = tuple(x.nbytes for x in into), tuple(x.nbytes for x in out)
    given, received = (sum(x.numel() for x in each) * width for each in (into, out))
    return Collective(op, ranks, str(out[0].dtype).removeprefix("torch."), given, received, splits)


def _bytes(rows: list[int], x: Tensor, ranks: int) -> tuple[int, ...]:
    """Bytes by rank, of a tensor that is split along its first dimension; no split: into equal parts."""
    if not rows:
        return (x.nbytes // ranks,) * ranks
    whole = sum(rows)
    return tuple(count * (x.nbytes // whole) if whole else 0 for count in rows)
