"""A world of which only one rank exists: PyTorch's fake process group under the project's own topology."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from mka_megatron.config.schema import ParallelConfig
from mka_megatron.parallel import groups
from mka_megatron.parallel.groups import Topology


@dataclass(frozen=True)
class Created:
    """A process group as every rank of the world creates it, members or not."""

    kind: str
    """What Megatron calls it."""
    ranks: tuple[int, ...]


@contextmanager
def rank_of(rank: int, ranks: int, parallel: ParallelConfig, ranks_per_node: int) -> Iterator[tuple[Topology, list[Created]]]:
    """This process as `rank` of `ranks`: its topology, and the groups in the order of their creation.

    A collective returns at once and moves nothing.
    """
    created: list[Created] = []
    new_group = dist.new_group

    def watched(ranks: Any = None, *arguments: Any, **keywords: Any) -> Any:
        members = range(dist.get_world_size()) if ranks is None else ranks
        created.append(Created(keywords.get("group_desc") or "", tuple(members)))
        return new_group(ranks, *arguments, **keywords)

    variables = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank % ranks_per_node}
    with mock.patch.dict(os.environ, {name: str(value) for name, value in variables.items()}):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
        try:
            with mock.patch.object(dist, "new_group", watched):
                topology = groups.initialize(parallel)
            yield topology, created
        finally:
            groups.destroy()
