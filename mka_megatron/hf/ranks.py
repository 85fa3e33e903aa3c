"""The processes of a fine-tuning run: torchrun's environment, sums over ranks, and stopping together.

Ranks that share a model's layers (tensor parallelism) are neighbours: rank = replica * tp_size + share.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@dataclass
class Ranks:
    """This process among those of the run."""

    rank: int
    size: int
    tp_size: int
    device: torch.device
    received: list[signal.Signals] = field(default_factory=list)
    """Signals that asked this rank to stop."""

    @property
    def dp_rank(self) -> int:
        """Which replica this rank is part of."""
        return self.rank // self.tp_size

    @property
    def dp_size(self) -> int:
        """Replicas."""
        return self.size // self.tp_size

    @cached_property
    def mesh(self) -> DeviceMesh:
        """The processes by the names that transformers has for their roles; made by all of them together."""
        shape = (1, self.dp_size, 1, self.tp_size)
        return init_device_mesh(self.device.type, shape, mesh_dim_names=("pp", "dp_replicate", "fsdp", "tp"))

    def sum(self, values: Tensor) -> Tensor:
        """`values` (any shape, fp64) summed over the replicas; the ranks of one hold the same."""
        if self.size > 1:
            dist.all_reduce(values)
        return values / self.tp_size

    def largest(self, value: float) -> float:
        """The largest over all ranks."""
        found = torch.tensor([value], dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return float(found)

    def stop(self) -> signal.Signals | None:
        """The signal that any rank received, the same answer on all of them; None when none did. Collective."""
        number = int(self.largest(float(self.received[0] if self.received else 0)))
        return signal.Signals(number) if number else None

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """What rank 0 does before the others do it too."""
        if self.rank > 0:
            self.barrier()
        yield
        if self.rank == 0:
            self.barrier()


@contextlib.contextmanager
def joined(tp_size: int, timeout_seconds: int) -> Iterator[Ranks]:
    """Join the processes that torchrun (or accelerate launch) started; alone without them.

    Inside, SIGTERM, SIGINT and SIGUSR1 are requests to stop, a second one ends the process.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
    ranks = Ranks(rank, size, tp_size, device)
    previous = {number: signal.getsignal(number) for number in SIGNALS}

    def handle(number: int, frame: FrameType | None) -> None:
        ranks.received.append(signal.Signals(number))
        if len(ranks.received) > 1:
            signal.signal(number, previous[signal.Signals(number)])

    for number in SIGNALS:
        signal.signal(number, handle)
    try:
        yield ranks
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if size > 1:
            dist.destroy_process_group()
