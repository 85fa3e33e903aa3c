"""Worker: import every Hugging Face directory at this world's layout; rank 0 writes the logits.

python -m torch.distributed.run --nproc_per_node=N hf_import_worker.py DIRECTORIES.json OUT.safetensors [key=value ...]
"""

from __future__ import annotations

import json
import sys

import torch
from safetensors.torch import save_file

from mka_megatron.config.load import load_config
from mka_megatron.memory.documents import Documents
from mka_megatron.model.build import build_model
from mka_megatron.parallel import groups
from mka_megatron.training.engine import Engine, construction_context
from tests.helpers.hf_checkpoints import TOKENS


def main(directories: dict[str, str], out: str, overrides: list[str]) -> None:
    logits: dict[str, torch.Tensor] = {}
    topology = None
    for name, directory in directories.items():
        config = load_config(
            [],
            [f"model.init_from={directory}", "attention.variant=gqa", f"data.sequence_length={TOKENS.shape[1]}", *overrides],
        )
        topology = topology or groups.initialize(config.parallel)
        model = build_model(config, topology, config.model.vocab_size, construction_context(config, topology))
        engine = Engine(config, model, topology)
        model.eval()
        ranks, slots = topology.cp_size, TOKENS.shape[1] // topology.cp_size
        rows = Documents.unpacked(*TOKENS.shape)
        if ranks > 1:
            rows = rows.part(topology.cp_rank * slots, (topology.cp_rank + 1) * slots)
        with torch.no_grad():
            shard = engine.deepspeed(TOKENS[:, rows.begin : rows.begin + slots], rows).contiguous()
        shards = [torch.empty_like(shard) for _ in range(ranks)]
        torch.distributed.all_gather(shards, shard, group=topology.cp_group)
        logits[name] = torch.cat(shards, dim=1)
        engine.close()
    if topology.rank == 0:
        save_file(logits, out)
    groups.destroy()


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        main(json.load(file), sys.argv[2], sys.argv[3:])
