"""Build the model of one rank of a world, and take one optimizer step, without data."""

from __future__ import annotations

import dataclasses
import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from mka_megatron.config.errors import refuse
from mka_megatron.config.schema import Config
from mka_megatron.data.batch import Batch
from mka_megatron.dry_run.recall import recall_most
from mka_megatron.dry_run.recorder import Collective, Recorder
from mka_megatron.dry_run.tensors import keep_in_place, use_kernels, without_data
from mka_megatron.dry_run.world import Created, rank_of
from mka_megatron.memory.documents import Documents
from mka_megatron.model.build import build_model
from mka_megatron.parallel.groups import Topology
from mka_megatron.training.alone import unanswered
from mka_megatron.training.deepspeed_config import accumulation_steps
from mka_megatron.training.engine import Engine, construction_context
from mka_megatron.training.partitions import Partition, partitions


@dataclass(frozen=True)
class Held:
    """A parameter or saved buffer as this rank holds it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    trained: bool
    """Not a buffer."""
    dim: int | None
    """The dimension that is split over the tensor-parallel ranks; None: every rank holds the whole."""


@dataclass(frozen=True)
class RankRun:
    """What one rank did."""

    rank: int
    place: tuple[int, int, int]
    """Its tensor-, context- and data-parallel rank."""
    groups: dict[str, tuple[int, ...]]
    """Ranks of its groups: tensor, context, data, replicas (those that hold the same weights), world."""
    created: tuple[Created, ...]
    held: tuple[Held, ...]
    partitions: tuple[Partition, ...] | None
    step: tuple[Collective, ...]
    """What it issued, in order: in a step of at most two micro-batches."""
    counts: tuple[int, ...]
    """How often each of them occurs in a whole step."""
    accumulation: int
    """Micro-batches of a whole step."""
    seconds: float


def prepared(config: Config) -> Config:
    """`config` without what only data needs; raises ConfigError for what a dry run cannot show."""
    if config.model.vocab_size is None:
        raise refuse("model.vocab_size", None, "a dry run reads no tokenizer; give the number of its entries")
    if config.training.segment_length is not None:
        raise refuse("training.segment_length", config.training.segment_length,
                     "which pages a segment reads depends on data that a dry run has not; leave it out")
    engine = config.engine
    # swap files are no collectives, and there is nothing to write to them
    offload = {
        name: "cpu" for name in ("offload_optimizer", "offload_param") if getattr(engine, name) == "nvme"
    }
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, init_from=None),
        engine=dataclasses.replace(engine, **offload),  # type: ignore[arg-type]
    )


def run_rank(config: Config, rank: int, ranks: int, ranks_per_node: int) -> RankRun:
    """Rank `rank` of `ranks`, with a `config` that :func:`prepared` gave.

    The world has its own process group, so none may be initialised.
    """
    began = time.perf_counter()
    with rank_of(rank, ranks, config.parallel, ranks_per_node) as (topology, created):
        recorder = Recorder()
        accumulation = accumulation_steps(config, topology.dp_size)
        brief = _with_accumulation(config, min(accumulation, 2), topology)
        with without_data() as absent, unanswered(), recorder:
            construction = construction_context(brief, topology) or nullcontext()
            model = build_model(brief, topology, brief.model.vocab_size or 0, construction)
            use_kernels(model, brief)
            keep_in_place(model)
            held = tuple(held_by(model))
            recall_most(model, brief, topology, absent)
            engine = Engine(brief, model, topology)
            cut = partitions(engine)
            step, counts = record_step(engine, recorder, [unpacked(brief)] * engine.accumulation, accumulation)
            engine.close()
        return RankRun(
            rank, (topology.tp_rank, topology.cp_rank, topology.dp_rank), _groups(topology), tuple(created), held, cut,
            step, counts, accumulation, time.perf_counter() - began,
        )  # fmt: skip


def record_step(
    engine: Engine, recorder: Recorder, micro_batches: list[Batch], accumulation: int
) -> tuple[tuple[Collective, ...], tuple[int, ...]]:
    """Take one step of one or two micro-batches: its collectives, and how often a step of `accumulation` has each.

    Every micro-batch but the last is like the first.
    """
    marking = engine.model.register_forward_pre_hook(lambda *_: recorder.mark())
    begin = len(recorder.collectives)
    recorder.marks.clear()
    try:
        engine.train_step(micro_batches)
    finally:
        marking.remove()
    step = tuple(recorder.collectives[begin:])
    first, last = recorder.marks[0] - begin, recorder.marks[-1] - begin
    counts = [1] * first + [accumulation - 1] * (last - first) + [1] * (len(step) - last)
    return step, tuple(counts)


def unpacked(config: Config) -> Batch:
    """A micro-batch whose rows are one document each."""
    rows, slots = config.training.micro_batch_size, config.data.sequence_length
    tokens = torch.zeros(rows, slots, dtype=torch.int64)
    return Batch(tokens, tokens, Documents.unpacked(rows, slots))


def held_by(model: nn.Module) -> list[Held]:
    """The parameters and saved buffers of `model`, as they are before any engine has them."""
    found = []
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor):
            continue  # Megatron's extra state
        split = getattr(tensor, "tensor_model_parallel", False)
        dim = getattr(tensor, "partition_dim", None) if split else None
        shape = getattr(tensor, "ds_shape", tensor.shape)
        found.append(Held(name, tuple(shape), str(tensor.dtype).removeprefix("torch."), tensor.requires_grad, dim))
    return found


def whole_model(config: Config, ranks_per_node: int) -> list[Held]:
    """The parameters and saved buffers of the model on one rank."""
    alone = dataclasses.replace(
        config,
        parallel=dataclasses.replace(
            config.parallel, tensor_parallel=1, context_parallel=1, sequence_parallel=False, data_parallel=None
        ),
    )
    with rank_of(0, 1, alone.parallel, ranks_per_node) as (topology, _), without_data():
        return held_by(build_model(alone, topology, alone.model.vocab_size or 0, nullcontext()))


def _with_accumulation(config: Config, micro_batches: int, topology: Topology) -> Config:
    training = config.training
    size = micro_batches * training.micro_batch_size * topology.dp_size
    return dataclasses.replace(config, training=dataclasses.replace(training, global_batch_size=size))


def _groups(topology: Topology) -> dict[str, tuple[int, ...]]:
    groups = {"tensor": topology.tp_group, "context": topology.cp_group, "data": topology.dp_group,
              "replicas": topology.dp_cp_group}  # fmt: skip
    found = {name: tuple(dist.get_process_group_ranks(group)) for name, group in groups.items()}
    return found | {"world": tuple(range(topology.world_size))}
