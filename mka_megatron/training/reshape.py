"""A checkpoint goes on in another layout: other tensor-, context- or data-parallel sizes, ZeRO stage or offload.

Each rank reads, from the files as they are (training/resharded.py), the intervals of masters and moments that it keeps,
and writes them into its engine (training/masters.py). Nothing is converted on disk, nothing is unpickled but tensors and
plain values, and beside its own states a rank holds some hundred MiB: the pages it reads through and a block of columns.
DeepSpeed's universal checkpoint is not used: it writes all states once more, unpickles whatever the files name, and knows
no parameter whose rows tensor-parallel ranks interleave.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mka_megatron.config.errors import ConfigError
from mka_megatron.config.schema import DataConfig
from mka_megatron.training import loss_scale
from mka_megatron.training.engine import Engine
from mka_megatron.training.manifest import Checkpoint, CheckpointError
from mka_megatron.training.masters import MOMENTS, masters, set_state, settle
from mka_megatron.training.resharded import Resharded

_RANKS = ("parallel.tensor_parallel", "parallel.context_parallel", "parallel.data_parallel")
_SAMPLES = (
    "training.global_batch_size", "training.micro_batch_size", "training.seed",
    *(f"data.{field.name}" for field in dataclasses.fields(DataConfig) if field.name not in ("cache_dir", "workers")),
)
_FIXED = ("training.precision", "training.segment_length", "training.segments_per_step")


def check(engine: Engine, checkpoint: Checkpoint, changes: dict[str, tuple[Any, Any]]) -> None:
    """Raise CheckpointError where `changes` (key -> value in the checkpoint, in this run) cannot be resumed."""
    for key in _FIXED:
        if key in changes:
            there, here = changes[key]
            raise CheckpointError(
                f"checkpoint {checkpoint.path} was written with {key} {there}, but this run has {here}; set it back, or export "
                "the checkpoint and start from that (model.init_from)."
            )
    if engine.segments is None or not engine.segments.saved_position(checkpoint.path):
        return
    other, there, here = _first_other(engine, checkpoint, changes)
    if other is not None:
        raise CheckpointError(
            f"checkpoint {checkpoint.path} was written with {other} {there} in the middle of a sample "
            f"(training.segments_per_step), but this run has {here}; set it back, or resume from a checkpoint between two samples."
        )


def _first_other(engine: Engine, checkpoint: Checkpoint, changes: dict[str, tuple[Any, Any]]) -> tuple[str | None, Any, Any]:
    """The first key that gives the samples in progress to other ranks or rows, or makes them others, and its two values."""
    for key in _RANKS:
        if key in changes:
            return key, *changes[key]
    # as a manifest has them
    here: dict[str, dict[str, Any]] = json.loads(json.dumps(dataclasses.asdict(engine.config)))
    for key in _SAMPLES:
        section, name = key.split(".")
        saved = checkpoint.body["config"].get(section, {})
        if saved.get(name, here[section][name]) != here[section][name]:
            return key, saved[name], here[section][name]
    return None, None, None


def ranks_change(changes: dict[str, tuple[Any, Any]]) -> bool:
    """Whether ranks hold other parts of the model or of the data than those that wrote the checkpoint."""
    return any(key in changes for key in _RANKS)


def load(engine: Engine, checkpoint: Checkpoint, agree: Callable[[str | None], str | None]) -> None:
    """Fill the fresh `engine` with the weights, moments and loss scale of `checkpoint`; a collective call.

    Args:
        agree: this rank's problem -> the first rank's that has one.

    Raises:
        CheckpointError: on every rank; the files are not those of this model, or it cannot be cut anew.
    """
    problem = None
    try:
        source = Resharded(engine.model, engine.config, checkpoint, engine.topology.tp_rank)
        steps = source.shards.adam_steps()
        for master, slots in masters(engine.deepspeed):
            flat = master.data.view(-1)
            for slot in slots:
                source.read("masters", slot.name, slot.start, flat[slot.offset : slot.offset + slot.length])
            if steps is None:
                continue
            state: dict[str, Tensor] = {}
            for key in MOMENTS:
                state[key] = torch.zeros_like(master.data)
                flat = state[key].view(-1)
                for slot in slots:
                    source.read(key, slot.name, slot.start, flat[slot.offset : slot.offset + slot.length])
            set_state(engine.deepspeed, master, state, steps)
        source.read_planes(engine.model)
    except (ConfigError, OSError) as error:
        problem = str(error)
    problem = agree(problem)
    if problem is not None:
        raise CheckpointError(problem)
    settle(engine.deepspeed)
    loss_scale.restore(engine.deepspeed.optimizer, checkpoint.body["engine"]["loss_scale"])
