"""Training checkpoints: written under a temporary name, verified by a manifest, then published by one rename.

Everything that one run needs to go on bitwise: parameters, optimizer and loss-scale states (DeepSpeed's
files), the random generators of each rank, the memory of samples in progress, and the caller's state. A rank that cannot write does not
hang or kill the others: all learn of it, and the older checkpoints stay.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mka_megatron.config.hf_sections import PLACEMENT
from mka_megatron.parallel import rng
from mka_megatron.training import manifest, swapped
from mka_megatron.training.engine import Engine
from mka_megatron.training.manifest import Checkpoint, CheckpointError
from mka_megatron.training.writer import Writer

__all__ = ["Checkpoint", "CheckpointError", "load", "newest_intact", "save"]

log = logging.getLogger(__name__)

_TAG = "deepspeed"
_PREFIX = "step-"
_TEMPORARY = ".tmp-"
_MODEL_SECTIONS = ("model", "attention", "routing", "memory_hierarchy")
_FREE_TO_CHANGE = ("model.init_from", *PLACEMENT)
"""Keys that only the start reads, or that say where things lie and are computed, not what they are."""


def save(engine: Engine, output_dir: str | Path, step: int, state: dict[str, Any], keep_last: int) -> Path:
    """Write `output_dir/checkpoints/step-<step>`; a collective call.

    Args:
        engine: at a step boundary.
        output_dir: the run's folder, on a file system that all ranks share.
        step: optimizer steps taken.
        state: the caller's own state (JSON values, equal on every rank), which `load` returns.
        keep_last: newest checkpoints to keep; older ones are removed once this one is published, and so are
            those of later steps, from which this run has gone back.

    Raises:
        CheckpointError: on every rank, if any rank could not write; older checkpoints are untouched.
    """
    parent = Path(output_dir) / "checkpoints"
    final, temporary = parent / f"{_PREFIX}{step:08d}", parent / f"{_TEMPORARY}{_PREFIX}{step:08d}"
    files: dict[str, dict[str, Any]] = {}
    problem = _on_rank_0(lambda: _prepare(parent, temporary))
    if problem is None:
        writer = Writer(temporary)
        _write(engine, temporary, writer)
        files, problem = _agree(writer)
    if problem is None:
        body = {
            "step": step,
            "state": state,
            "engine": {"step": engine.step, "bad_steps": engine.bad_steps},
            "layout": _layout(engine),
            "config": dataclasses.asdict(engine.config),
            "files": files,
        }
        problem = _on_rank_0(lambda: _publish(temporary, final, body))
    if problem is not None:
        _on_rank_0(lambda: shutil.rmtree(temporary, ignore_errors=True))
        raise CheckpointError(
            f"checkpoint {final} could not be written ({problem}); older checkpoints in {parent} are untouched."
        )
    _on_rank_0(lambda: _prune(parent, step, keep_last))
    return final


def newest_intact(output_dir: str | Path) -> Checkpoint | None:
    """The newest checkpoint that verifies, None if there is none; what is wrong with newer ones is logged.

    A collective call; rank 0's listing counts.
    """
    parent = Path(output_dir) / "checkpoints"
    steps = sorted(_broadcast_steps(parent), reverse=True)
    for step in steps:
        try:
            return manifest.verify(parent / f"{_PREFIX}{step:08d}")
        except CheckpointError as error:
            if _rank() == 0:
                log.warning("%s It is passed over.", error)
    if steps and _rank() == 0:
        log.warning("no checkpoint in %s is intact.", parent)
    return None


def load(engine: Engine, checkpoint: Checkpoint | str | Path) -> dict[str, Any]:
    """Bring a fresh engine to where `checkpoint` was written; returns the caller's state. A collective call.

    Args:
        engine: just built, from the same model configuration and in the same topology.
        checkpoint: from `newest_intact`, or the path of a published checkpoint, which is verified first.

    Raises:
        CheckpointError: not intact, another topology, or another model; nothing has been unpickled then.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = manifest.verify(Path(checkpoint))
    _check_layout(engine, checkpoint)
    _check_model(engine, checkpoint)
    hyperparameters = [_hyperparameters(group) for group in engine.deepspeed.optimizer.param_groups]
    if swapped.applies(engine):
        swapped.load(engine, checkpoint.path)
    else:
        loaded, _ = engine.deepspeed.load_checkpoint(str(checkpoint.path), tag=_TAG)
        if loaded is None:
            raise CheckpointError(f"checkpoint {checkpoint.path} holds no {_TAG} state for this rank.")
    for group, configured in zip(engine.deepspeed.optimizer.param_groups, hyperparameters, strict=True):
        group.update(configured)
    engine.step = checkpoint.body["engine"]["step"]
    engine.bad_steps = checkpoint.body["engine"]["bad_steps"]
    if engine.segments is not None:
        engine.segments.load(checkpoint.path)
    rng.restore(torch.load(checkpoint.path / _rng_name(), weights_only=True))
    return checkpoint.body["state"]


def _write(engine: Engine, temporary: Path, writer: Writer) -> None:
    """This rank's files."""
    if swapped.applies(engine):
        swapped.save(engine, temporary, writer.save)
    else:
        deepspeed_engine = engine.deepspeed
        reader, recovery = deepspeed_engine.checkpoint_engine, deepspeed_engine._copy_recovery_script
        deepspeed_engine.checkpoint_engine = writer
        deepspeed_engine._copy_recovery_script = lambda path: None  # a script that would write past the writer
        try:
            deepspeed_engine.save_checkpoint(str(temporary), tag=_TAG, save_latest=False)
        finally:
            deepspeed_engine.checkpoint_engine = reader
            deepspeed_engine._copy_recovery_script = recovery
    writer.save(rng.capture(), temporary / _rng_name())
    if engine.segments is not None:
        engine.segments.save(lambda content, name: writer.save(content, temporary / name))


def _agree(writer: Writer) -> tuple[dict[str, dict[str, Any]], str | None]:
    """All ranks' files, and the first rank's problem if any had one."""
    gathered: list[Any] = [None] * _world_size()
    dist.all_gather_object(gathered, (writer.files, writer.problem))
    problems = [problem for _, problem in gathered if problem is not None]
    files = {name: entry for written, _ in gathered for name, entry in written.items()}
    return files, problems[0] if problems else None


def _on_rank_0(action: Any) -> str | None:
    """Run `action` on rank 0; every rank gets the problem it met, or None."""
    outcome: list[str | None] = [None]
    if _rank() == 0:
        try:
            action()
        except OSError as error:
            outcome[0] = str(error)
    dist.broadcast_object_list(outcome, src=0)
    return outcome[0]


def _prepare(parent: Path, temporary: Path) -> None:
    parent.mkdir(parents=True, exist_ok=True)
    for leftover in parent.glob(f"{_TEMPORARY}*"):  # of a save that was killed
        shutil.rmtree(leftover)
    (temporary / _TAG).mkdir(parents=True)


def _publish(temporary: Path, final: Path, body: dict[str, Any]) -> None:
    manifest.sync_folder(temporary / _TAG)
    manifest.write(temporary, body)
    replaced = final.with_name(f"{_TEMPORARY}replaced-{final.name}")
    if final.exists():  # the same step again, after its checkpoint was found damaged
        final.rename(replaced)
    try:
        temporary.rename(final)
    except OSError:
        if replaced.exists():
            replaced.rename(final)
        raise
    manifest.sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _prune(parent: Path, newest: int, keep_last: int) -> None:
    steps = _steps(parent)
    kept = sorted(step for step in steps if step <= newest)[-max(1, keep_last) :]
    for step in set(steps) - set(kept):
        path = parent / f"{_PREFIX}{step:08d}"
        doomed = parent / f"{_TEMPORARY}old-{path.name}"
        path.rename(doomed)  # never half a checkpoint under a published name
        shutil.rmtree(doomed)


def _steps(parent: Path) -> list[int]:
    names = [path.name.removeprefix(_PREFIX) for path in parent.glob(f"{_PREFIX}*")]
    return [int(name) for name in names if name.isdigit()]


def _broadcast_steps(parent: Path) -> list[int]:
    found: list[list[int]] = [_steps(parent) if _rank() == 0 else []]
    if dist.is_initialized():
        dist.broadcast_object_list(found, src=0)
    return found[0]


def _layout(engine: Engine) -> dict[str, Any]:
    """What must be the same for DeepSpeed's files to fit."""
    topology, config = engine.topology, engine.config
    return {
        "world size": topology.world_size,
        "parallel.tensor_parallel": topology.tp_size,
        "parallel.context_parallel": topology.cp_size,
        "parallel.data_parallel": topology.dp_size,
        "training.segment_length": config.training.segment_length,
        "training.segments_per_step": config.training.segments_per_step,
        "engine.zero_stage": config.engine.zero_stage,
        "engine.offload_optimizer": config.engine.offload_optimizer,
        "engine.offload_param": config.engine.offload_param,
        "training.precision": config.training.precision,
        "optimizer": engine.optimizer_name,
    }


def _check_layout(engine: Engine, checkpoint: Checkpoint) -> None:
    for key, here in _layout(engine).items():
        there = checkpoint.body["layout"].get(key)
        if there != here:
            raise CheckpointError(
                f"checkpoint {checkpoint.path} was written with {key} {there}, but this run has {here}; "
                "resume in the layout that wrote it."
            )


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


def _rng_name() -> str:
    return f"rng-{_rank():05d}.pt"


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
