"""Worker: gradients through our tensor-parallel regions for gradients that are not contiguous; writes them per rank."""

from __future__ import annotations

import sys
import weakref

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from mka_megatron.config.schema import ParallelConfig
from mka_megatron.parallel import groups
from mka_megatron.parallel.regions import copy_to_region, reduce_from_region
from mka_megatron.parallel.replicated import mark_partial, sum_partial_gradients


def main() -> weakref.ref:
    """Runs the cases; returns a reference to a group that nothing may keep alive."""
    topology = groups.initialize(ParallelConfig(tensor_parallel=2))
    generator = torch.Generator().manual_seed(topology.rank)
    weight = torch.randn(5, 3, generator=generator)

    entered = torch.ones(3, 5, requires_grad=True)
    (copy_to_region(entered, topology.tp_group).t() * weight).sum().backward()

    left = torch.ones(3, 5, requires_grad=True)
    out = reduce_from_region((left * (topology.rank + 1.0)).t(), topology.tp_group)
    (out * 2.0).sum().backward()

    module = torch.nn.Module()
    module.whole = torch.nn.Parameter(torch.ones(3, 5))
    module.partial = mark_partial(torch.nn.Parameter(torch.ones(3, 5)))
    names = sum_partial_gradients(module, topology.tp_group)
    ((module.whole + module.partial).t() * weight).sum().backward()

    save_file(
        {
            "weight": weight,
            "entered": entered.grad.contiguous(),
            "reduced": out.detach().contiguous(),
            "left": left.grad.contiguous(),
            "whole": module.whole.grad.contiguous(),
            "partial": module.partial.grad.contiguous(),
        },
        f"{sys.argv[1]}/rank{topology.rank}.safetensors",
    )
    assert names == ["partial"], names
    group = weakref.ref(topology.tp_group)
    dist.barrier()
    groups.destroy()
    return group


assert main()() is None, "a process group outlives groups.destroy()"
