"""Worker: trains cases and saves what their live models hold beside each checkpoint, or loads exported directories.

python -m torch.distributed.run --nproc_per_node=N export_worker.py train CASES.json DIRECTORY
python -m torch.distributed.run --nproc_per_node=N export_worker.py load CASES.json DIRECTORY

train: per case DIRECTORY/<name>/checkpoints/step-00000003, live-<tensor-parallel rank>.safetensors with that rank's
parameters, gathered by DeepSpeed itself where they are partitioned, and, where rows are not shared, logits.safetensors.
load: a case has `model.init_from`; DIRECTORY/<name>.safetensors has the logits.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import GatheredParameters
from megatron.core import parallel_state
from safetensors.torch import save_file

from mka_megatron.config.load import load_config
from mka_megatron.data.batch import Batch
from mka_megatron.memory.documents import Documents
from mka_megatron.model.build import build_model
from mka_megatron.parallel import groups
from mka_megatron.parallel.groups import Topology
from mka_megatron.training import checkpoint
from mka_megatron.training.engine import Engine, construction_context

STEPS, ROWS, SLOTS = 3, 8, 32
RUN = [f"data.sequence_length={SLOTS}", "training.micro_batch_size=2", f"training.global_batch_size={ROWS}",
       "training.learning_rate=2e-2", "training.min_learning_rate=2e-2", "training.schedule=constant",
       "training.warmup_steps=0", "training.steps=20"]


def micro_batches(step: int, engine: Engine) -> list[Batch]:
    """This replica's rows of a random global batch."""
    tokens = torch.randint(0, 64, (ROWS, SLOTS + 1), generator=torch.Generator().manual_seed(step))
    blocks = [Batch(block[:, :-1].clone(), block[:, 1:].clone(), Documents.unpacked(2, SLOTS)) for block in tokens.split(2)]
    return blocks[engine.topology.dp_rank :: engine.topology.dp_size]


def engine_of(case: list[str]) -> Engine:
    config = load_config([], [*RUN, *case])
    topology = groups.initialize(config.parallel)
    vocab_size = config.model.vocab_size
    assert vocab_size is not None
    return Engine(config, build_model(config, topology, vocab_size, construction_context(config, topology)), topology)


def logits(engine: Engine) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, 64, (2, SLOTS), generator=torch.Generator().manual_seed(99))
    engine.model.eval()
    with torch.no_grad():
        return {"logits": engine.deepspeed(tokens, Documents.unpacked(2, SLOTS)).float().contiguous()}


def live(engine: Engine) -> dict[str, torch.Tensor]:
    """This tensor-parallel rank's parameters and planes, whole."""
    held = {name: b.clone() for name, b in engine.model.named_buffers() if name.endswith(".planes")}
    for name, parameter in engine.model.named_parameters():
        with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            held[name] = parameter.detach().cpu().clone()
    return held


def train(case: list[str], folder: Path) -> Topology:
    engine = engine_of([*case, f"training.output_dir={folder}"])
    for step in range(STEPS):
        engine.train_step(micro_batches(step, engine))
    checkpoint.save(engine, folder, STEPS, {}, keep_last=1)
    topology, held = engine.topology, live(engine)
    if topology.dp_rank == 0 and topology.cp_rank == 0:
        save_file(held, folder / f"live-{topology.tp_rank}.safetensors")
    if topology.cp_size == 1:
        found = logits(engine)
        if topology.rank == 0:
            save_file(found, folder / "logits.safetensors")
    engine.close()
    return topology


def load(case: list[str], out: Path) -> Topology:
    engine = engine_of(case)
    found = logits(engine)
    if engine.topology.rank == 0:
        save_file(found, out.with_suffix(".safetensors"))
    engine.close()
    return engine.topology


def main(mode: str, cases: dict[str, list[str]], directory: Path) -> None:
    get_accelerator().is_fp16_supported = lambda: True
    for name, case in cases.items():
        (train if mode == "train" else load)(case, directory / name)
        dist.barrier()
        if dist.get_rank() == 0:
            print(name, flush=True)
        parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3]))
