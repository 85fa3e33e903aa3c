"""Worker: the same model with and without tiles, in every layout of two ranks; rank 0 writes what both gave.

python -m torch.distributed.run --nproc_per_node=2 tiles_worker.py DIRECTORY
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from deepspeed.runtime.zero import partition_parameters
from megatron.core import parallel_state
from torch import Tensor

from mka_megatron.config.load import load_config
from mka_megatron.config.schema import Config
from mka_megatron.data.batch import IGNORE, Batch
from mka_megatron.memory.documents import Documents
from mka_megatron.model import tiles
from mka_megatron.model.build import build_model
from mka_megatron.parallel import groups
from mka_megatron.parallel.groups import Topology
from mka_megatron.training.engine import Engine, construction_context

VOCAB, SEQUENCE, MICRO = 203, 32, 2  # padded to 256 entries: the second tensor-parallel rank has some of its own, and padding
BASE = [
    "model.num_layers=2", "model.hidden_size=64", "model.ffn_hidden_size=96", "model.num_attention_heads=4",
    "model.num_kv_heads=2", "model.head_dim=16", "model.max_position_embeddings=64", "model.qk_norm=true",
    "routing.gate_hidden_size=16", f"data.sequence_length={SEQUENCE}", f"training.micro_batch_size={MICRO}",
    "training.warmup_steps=1", "training.steps=2",
]
TILES = ["training.logits_tile=12", "training.mlp_tile=12"]  # the last one is smaller in every layout
LAYOUTS = {  # two micro-batches a step in each
    "dp2": ["training.global_batch_size=8"],
    "tp2": ["training.global_batch_size=4", "parallel.tensor_parallel=2"],
    "tp2-sp": ["training.global_batch_size=4", "parallel.tensor_parallel=2", "parallel.sequence_parallel=true"],
    "cp2": ["training.global_batch_size=4", "parallel.context_parallel=2"],
}
MODELS = {"tied": [], "untied, full": ["model.tie_embeddings=false", "training.recompute=full"]}
# Engine runs by layout: the ZeRO stages of each model
STAGES = {
    "dp2": {"tied": (0, 1, 2, 3), "untied, full": (0, 1, 2, 3)},
    "tp2": {"untied, full": (2,)},
    "tp2-sp": {"tied": (1, 3), "untied, full": (2,)},
    "cp2": {"tied": (3,)},
}
# ZeRO-3 keeps small weights, and those that are needed again soon: here it must not
GATHER_ALL = {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}


def rows(step: int, topology: Topology, config: Config) -> list[Batch]:
    """A replica's micro-batches: two documents a row, some labels off."""
    made = []
    for number in range(config.training.global_batch_size // MICRO // topology.dp_size):
        generator = torch.Generator().manual_seed(1000 * step + 10 * number + topology.dp_rank)
        text = torch.randint(0, VOCAB, (MICRO, SEQUENCE + 1), generator=generator)
        labels = text[:, 1:].clone()
        labels[:, 3:9] = IGNORE
        starts = torch.zeros(MICRO, SEQUENCE, dtype=torch.bool)
        starts[:, [0, 13]] = True
        made.append(Batch(text[:, :-1].contiguous(), labels, Documents.from_starts(starts)))
    return made


def model_run(case: list[str], topology: Topology) -> dict[str, dict[str, Tensor]]:
    """Losses with and without gradients, and every parameter's gradient, of one micro-batch."""
    config = load_config([], [*BASE, *case])
    model = build_model(config, topology, VOCAB)
    begin = topology.cp_rank * (SEQUENCE // topology.cp_size)
    batch = rows(0, topology, config)[0].part(begin, begin + SEQUENCE // topology.cp_size)
    nll = model(batch.tokens, batch.documents, batch.labels)
    nll.sum().backward()
    with torch.no_grad():
        evaluated = model(batch.tokens, batch.documents, batch.labels)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"losses": {"training": nll.detach(), "evaluation": evaluated}, "gradients": gradients}


@contextmanager
def logits_seen() -> Iterator[list[int]]:
    """Tokens of every block of logits that a loss was taken of."""
    seen: list[int] = []
    original = tiles.token_losses

    def counted(logits: Tensor, *others: object) -> Tensor:
        seen.append(logits.shape[0] * logits.shape[1])
        return original(logits, *others)

    tiles.token_losses = counted
    yield seen
    tiles.token_losses = original


@contextmanager
def gathered() -> Iterator[list[int]]:
    """Elements of every weight that ZeRO-3 gathers."""
    sizes: list[int] = []
    original = partition_parameters._dist_allgather_fn

    def counted(mine: Tensor, all_ranks: Tensor, group: object = None) -> object:
        sizes.append(all_ranks.numel())
        return original(mine, all_ranks, group)

    partition_parameters._dist_allgather_fn = counted
    yield sizes
    partition_parameters._dist_allgather_fn = original


def engine_run(case: list[str], topology: Topology) -> dict:
    """Two steps and an evaluation; hooks and all-gathers of the last step."""
    config = load_config([], [*BASE, *case])
    engine = Engine(config, build_model(config, topology, VOCAB, construction_context(config, topology)), topology)
    calls: Counter[str] = Counter()
    for name, parameter in engine.model.named_parameters():
        parameter.register_hook(lambda grad, name=name: calls.update([name]))
    losses, norms = [], []
    for step in range(config.training.steps):
        calls.clear()
        with gathered() as sizes, logits_seen() as seen:
            result = engine.train_step(rows(step, topology, config))
        losses.append(result.loss)
        norms.append(result.grad_norm)
    with logits_seen() as evaluated:
        evaluation = engine.evaluate(rows(7, topology, config)).loss
    parameters = len(list(engine.model.parameters()))
    passes = engine.passes
    engine.close()
    return {
        "losses": losses, "norms": norms, "evaluation": evaluation, "gathered": sum(sizes),
        "hooks": sorted(set(calls.values())), "hooked": len(calls), "parameters": parameters, "passes": passes,
        "largest": max(seen), "largest_evaluated": max(evaluated),
    }


def main(directory: Path) -> None:
    settings = directory / "gather-all.json"
    settings.write_text(json.dumps({"zero_optimization": GATHER_ALL}))
    engines: dict[str, dict] = {}
    models: dict[str, dict] = {}
    for layout, parallel in LAYOUTS.items():
        topology = groups.initialize(load_config([], [*BASE, *parallel]).parallel)
        for name, model in MODELS.items():
            case = [*parallel, *model]
            models[f"{layout}, {name}"] = {
                "plain": model_run(case, topology), "tiled": model_run([*case, *TILES], topology)
            }
            for stage in STAGES[layout].get(name, ()):
                zero = [*case, f"engine.zero_stage={stage}"] + [f"engine.deepspeed_config={settings}"] * (stage == 3)
                engines[f"{layout}, {name}, zero{stage}"] = {
                    "plain": engine_run(zero, topology), "tiled": engine_run([*zero, *TILES], topology)
                }
                if topology.rank == 0:
                    print(layout, name, stage, flush=True)
        if layout != "cp2":
            parallel_state.destroy_model_parallel()
    torch.save(models, directory / f"models-{topology.rank}.pt")
    if topology.rank == 0:
        (directory / "engines.json").write_text(json.dumps(engines))
    groups.destroy()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
