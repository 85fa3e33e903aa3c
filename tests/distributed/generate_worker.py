"""Worker: every case's model continues the same prompts at this world's tensor-parallel size; rank 0 writes the tokens.

python -m torch.distributed.run --nproc_per_node=N generate_worker.py CASES.json OUT.json
"""

from __future__ import annotations

import json
import sys

import torch

from mka_megatron.config.load import load_config
from mka_megatron.inference.generate import generate, remember
from mka_megatron.memory.generation import open_pages
from mka_megatron.model.build import build_model
from mka_megatron.parallel import groups
from mka_megatron.parallel.groups import Topology

VOCAB, POSITIONS, NEW = 192, 128, 6
PROMPTS = [
    torch.randint(1, VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (22, 9)
]


def tokens(case: list[str], topology: Topology) -> list[list[int]]:
    """In fp64, so that no tie is decided by the order of sums over ranks."""
    config = load_config([], [*case, f"model.max_position_embeddings={POSITIONS}",
                              f"parallel.tensor_parallel={topology.tp_size}"])  # fmt: skip
    model = build_model(config, topology, VOCAB).double().eval()
    store = open_pages(config, torch.float64, topology.device, run="test", rank=topology.rank)
    memory = remember(model, config, topology, len(PROMPTS), store)
    made = generate(
        model, memory, PROMPTS, max_new_tokens=NEW, eos_id=None, positions=POSITIONS, prefill_slots=15
    ).tokens
    if store is not None:
        store.close()
    return made


def main(cases: dict[str, list[str]], out: str) -> None:
    found, topology = {}, None
    for name, case in cases.items():
        ranks = load_config([], [*case, "parallel.tensor_parallel=2"]).parallel
        topology = topology or groups.initialize(ranks)
        found[name] = tokens(case, topology)
    if topology is not None and topology.rank == 0:
        with open(out, "w") as file:
            json.dump(found, file)
    groups.destroy()


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        main(json.load(file), sys.argv[2])
