"""Everything that must hold of a world, from the ranks of it that were run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from mka_megatron.attention.registry import VARIANTS
from mka_megatron.config.schema import Config
from mka_megatron.dry_run.layout import group_problems, partition_problems, table_problems, weight_problems
from mka_megatron.dry_run.order import order_problems
from mka_megatron.dry_run.rank import Held, RankRun
from mka_megatron.model.hf_table import hf_table


def ranks_to_run(config: Config, ranks: int, every_corner: bool) -> list[int]:
    """First, last and middle rank, and a whole tensor- and a whole context-parallel group; `every_corner`: every
    combination of these places, in the first and in the last replica. Rank = (data * context + c) * tensor + t."""
    parallel = config.parallel
    tensor, context = parallel.tensor_parallel, parallel.context_parallel
    replica = tensor * context
    if every_corner:
        return sorted({*range(replica), *range(ranks - replica, ranks)})
    middle = (ranks // replica // 2) * replica + replica // 2
    return sorted({*range(tensor), *range(0, replica, tensor), middle, ranks - 1})


def problems(config: Config, runs: Sequence[RankRun], whole: Sequence[Held], ranks: int, ranks_per_node: int) -> list[str]:
    """What is wrong, one sentence each; nothing where all is well."""
    parallel = config.parallel
    tensor, context = parallel.tensor_parallel, parallel.context_parallel
    sizes = {"tensor": tensor, "context": context, "data": ranks // (tensor * context), "replicas": ranks // tensor}
    shards: dict[int, Sequence[Held]] = {}
    found = []
    for run in runs:
        first = shards.setdefault(run.place[0], run.held)
        if first != run.held:
            found.append(f"rank {run.rank} holds other shapes than another rank of tensor-parallel rank {run.place[0]}.")
    found += group_problems(runs, ranks, sizes, ranks_per_node)
    found += weight_problems(whole, shards, tensor)
    if VARIANTS[config.attention.variant].projection == "grouped":
        found += table_problems(_table(config, tensor), _table(config, 1), shards, tensor)
    found += partition_problems(runs)
    found += order_problems({run.rank: run.step for run in runs})
    return list(_unique(found))


def _table(config: Config, tensor: int) -> dict:
    cut = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, tensor_parallel=tensor))
    return hf_table(cut, config.model.vocab_size or 0)


def _unique(sentences: Iterable[str]) -> dict[str, None]:
    return dict.fromkeys(sentences)
