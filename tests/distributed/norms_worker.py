"""Worker: size and norm of one model in every layout of two ranks, before and after two steps.

python -m torch.distributed.run --nproc_per_node=2 norms_worker.py OUT.json
"""

from __future__ import annotations

import json
import sys
import weakref

from megatron.core import parallel_state

from mka_megatron.parallel import groups
from mka_megatron.training.norms import parameter_count, parameter_norm
from tests.helpers.engine_runs import config_of, engine_of, train

CASES = {
    "replicas": ["engine.zero_stage=0"],
    "zero1": ["engine.zero_stage=1"],
    "zero3": ["engine.zero_stage=3"],
    "tp2": ["parallel.tensor_parallel=2"],
    "tp2-sp": ["parallel.tensor_parallel=2", "parallel.sequence_parallel=true"],
}


def main(out: str) -> list[weakref.ref]:
    """Writes the figures; returns references to process groups that nothing may keep alive."""
    found = {}
    rank = 0
    for name, case in CASES.items():
        config = config_of(case)
        topology = groups.initialize(config.parallel)
        engine = engine_of(config, topology)
        count, before = parameter_count(engine.model, topology), parameter_norm(engine.model, topology)
        # Plain sums of what a replica holds whole: the expectation, where it is one.
        parameters = list(engine.model.parameters())
        held = sum(parameter.numel() for parameter in parameters)
        squares = sum(float(parameter.detach().double().square().sum()) for parameter in parameters)
        train(engine, 0, 2)
        found[name] = [count, before, parameter_norm(engine.model, topology), held, squares**0.5]
        rank = topology.rank
        engine.close()
        alive = [weakref.ref(group) for group in (topology.dp_group, topology.groups.dp_cp)]
        parallel_state.destroy_model_parallel()
    if rank == 0:
        with open(out, "w") as file:
            json.dump(found, file)
    del engine, parameters
    groups.destroy()
    return alive


if __name__ == "__main__":
    assert [group() for group in main(sys.argv[1])] == [None, None], "a process group outlives Engine.close() and groups.destroy()"
