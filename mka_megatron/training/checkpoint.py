"""Training checkpoints: written under a temporary name, verified by a manifest, then published by one rename.

Everything that one run needs to go on bitwise: parameters, optimizer and loss-scale states (DeepSpeed's
files), the random generators of each rank, the memory of samples in progress, and the caller's state. A rank that cannot
write does not hang or kill the others: all learn of it, and the older checkpoints stay (training/saving.py).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mka_megatron.config.hf_sections import PLACEMENT
from mka_megatron.parallel import rng
from mka_megatron.training import loss_scale, manifest, reshape, saving, swapped
from mka_megatron.training.engine import Engine
from mka_megatron.training.manifest import Checkpoint, CheckpointError

__all__ = ["Checkpoint", "CheckpointError", "load", "newest_intact", "save"]

log = logging.getLogger(__name__)

_MODEL_SECTIONS = ("model", "attention", "routing", "memory_hierarchy")
_FREE_TO_CHANGE = ("model.init_from", *PLACEMENT)
"""Keys that only the start reads, or that say where things lie and are computed, not what they are."""


def save(engine: Engine, output_dir: str | Path, step: int, state: dict[str, Any], keep_last: int) -> Path:
    """Write and publish `output_dir/checkpoints/step-<step>`; a collective call.

    Arguments and errors are those of `saving.begin` and `saving.complete`.
    """
    return saving.complete(saving.begin(engine, output_dir, step, state), keep_last)


def newest_intact(output_dir: str | Path) -> Checkpoint | None:
    """The newest checkpoint that verifies, None if there is none; what is wrong with newer ones is logged.

    A collective call; rank 0's listing counts.
    """
    parent = Path(output_dir) / "checkpoints"
    steps = sorted(_broadcast_steps(parent), reverse=True)
    for step in steps:
        try:
            return manifest.verify(parent / f"{saving.PREFIX}{step:08d}")
        except CheckpointError as error:
            if _rank() == 0:
                log.warning("%s It is passed over.", error)
    if steps and _rank() == 0:
        log.warning("no checkpoint in %s is intact.", parent)
    return None


def load(engine: Engine, checkpoint: Checkpoint | str | Path) -> dict[str, Any]:
    """Bring a fresh engine to where `checkpoint` was written; returns the caller's state. A collective call.

    Args:
        engine: just built, from the same model configuration; in the same layout it goes on bitwise, in another one
            (training/reshape.py) up to roundoff.
        checkpoint: from `newest_intact`, or the path of a published checkpoint, which is verified first.

    Raises:
        CheckpointError: not intact, another model, or a layout that it cannot go on in; nothing has been unpickled then.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = manifest.verify(Path(checkpoint))
    _check_model(engine, checkpoint)
    changes = _changes(engine, checkpoint)
    reshape.check(engine, checkpoint, changes)
    hyperparameters = [_hyperparameters(group) for group in engine.deepspeed.optimizer.param_groups]
    if changes:
        reshape.load(engine, checkpoint, _first_problem)
        _announce(checkpoint, changes)
    elif swapped.applies(engine):
        swapped.load(engine, checkpoint.path)
        loss_scale.restore(engine.deepspeed.optimizer, checkpoint.body["engine"]["loss_scale"])
    else:
        loaded, _ = engine.deepspeed.load_checkpoint(str(checkpoint.path), tag=saving.TAG)
        if loaded is None:
            raise CheckpointError(f"checkpoint {checkpoint.path} holds no {saving.TAG} state for this rank.")
    for group, configured in zip(engine.deepspeed.optimizer.param_groups, hyperparameters, strict=True):
        group.update(configured)
    engine.step = checkpoint.body["engine"]["step"]
    engine.bad_steps = checkpoint.body["engine"]["bad_steps"]
    if not reshape.ranks_change(changes):
        if engine.segments is not None:
            engine.segments.load(checkpoint.path)
        rng.restore(torch.load(checkpoint.path / saving.rng_name(), weights_only=True))
    elif engine.segments is not None:
        engine.segments.load_between_samples(checkpoint.path)
    return checkpoint.body["state"]


def _broadcast_steps(parent: Path) -> list[int]:
    found: list[list[int]] = [saving.steps(parent) if _rank() == 0 else []]
    if dist.is_initialized():
        dist.broadcast_object_list(found, src=0)
    return found[0]


def _changes(engine: Engine, checkpoint: Checkpoint) -> dict[str, tuple[Any, Any]]:
    """Keys of the layout that differ: in the checkpoint, in this run."""
    there = checkpoint.body["layout"]
    return {key: (there.get(key), here) for key, here in saving.layout(engine).items() if there.get(key) != here}


def _announce(checkpoint: Checkpoint, changes: dict[str, tuple[Any, Any]]) -> None:
    if _rank() == 0:
        there, here = (", ".join(f"{key} {pair[side]}" for key, pair in changes.items()) for side in (0, 1))
        log.warning("checkpoint %s was written with %s; continuing with %s.", checkpoint.path, there, here)


def _first_problem(problem: str | None) -> str | None:
    gathered: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, problem)
    return next((each for each in gathered if each is not None), None)


def _check_model(engine: Engine, checkpoint: Checkpoint) -> None:
    here, there = dataclasses.asdict(engine.config), checkpoint.body["config"]
    for section in _MODEL_SECTIONS:
        saved = dict(_flatten(there.get(section, {}), section))
        for key, value in _flatten(here[section], section):
            if key not in _FREE_TO_CHANGE and saved.get(key, value) != value:
                raise CheckpointError(
                    f"checkpoint {checkpoint.path} was written with {key} {saved[key]}, but this run has {value}; "
                    "set it back, or start in another training.output_dir."
                )


def _flatten(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}.{key}")
        else:
            yield f"{prefix}.{key}", list(value) if isinstance(value, tuple) else value


def _hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    """What the configuration decides of a parameter group; a checkpoint must not bring back older values."""
    return {key: group[key] for key in ("betas", "eps", "weight_decay")}


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
