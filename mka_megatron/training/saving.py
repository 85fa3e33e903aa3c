"""Checkpoints in the making: every rank's files under a temporary name, then a manifest and one rename.

Nothing here reads the training's state but :func:`begin`, so what follows can wait for a thread while training goes on.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mka_megatron.parallel import rng
from mka_megatron.training import loss_scale, manifest, swapped
from mka_megatron.training.engine import Engine
from mka_megatron.training.manifest import CheckpointError
from mka_megatron.training.writer import BackgroundWriter, Writer

TAG = "deepspeed"
PREFIX = "step-"
_TEMPORARY = ".tmp-"


@dataclasses.dataclass(frozen=True)
class Pending:
    """A checkpoint whose files are being written."""

    parent: Path
    temporary: Path
    step: int
    body: dict[str, Any]
    """The manifest without the files."""
    writer: Writer
    problem: str | None
    """Why nothing is written at all."""
    group: dist.ProcessGroup | None
    """Ranks agree through it; None: through the default group."""


class Saver:
    """Saves of one run, at most one of them in flight.

    Args:
        engine: where the run begins; at a step boundary whenever `save` is called.
        output_dir: the run's folder, on a file system that all ranks share.
        keep_last: newest checkpoints to keep.
        group: of all ranks on the host (gloo): agreement must not wait behind the device's stream. None: one rank.
        background: files are written by a thread, from a copy in host memory.
        published: told of every checkpoint that is complete.

    All methods are collective calls, and raise CheckpointError on every rank where a rank could not write.
    """

    def __init__(self, engine: Engine, output_dir: Path, keep_last: int, group: dist.ProcessGroup | None, *, background: bool,
                 published: Callable[[Path], None]) -> None:
        self._engine, self._output_dir, self._keep_last = engine, output_dir, keep_last
        self._group, self._background, self._published = group, background, published
        self._pending: Pending | None = None
        self._passed_over = {step for step in steps(output_dir / "checkpoints") if step > engine.step}  # damaged

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Begin a checkpoint of `step` (:func:`begin`), once the one before it is complete."""
        self.finish()
        self._pending = begin(self._engine, self._output_dir, step, state, self._group, background=self._background)
        if not self._background:
            self.finish()

    def poll(self) -> None:
        """At every step boundary: publish the checkpoint in flight if all ranks have written their files."""
        if self._pending is not None and _all(self._pending.writer.done, self._group):
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint in flight, if there is one, and publish it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._passed_over.discard(pending.step)
            self._published(complete(pending, self._keep_last, self._passed_over))


def begin(engine: Engine, output_dir: str | Path, step: int, state: dict[str, Any], group: dist.ProcessGroup | None = None, *,
          background: bool = False) -> Pending:
    """Write, or copy for writing, all of a checkpoint's files; a collective call.

    Args:
        engine: at a step boundary.
        output_dir: the run's folder, on a file system that all ranks share.
        step: optimizer steps taken.
        state: the caller's own state (JSON values, equal on every rank), which `checkpoint.load` returns.
        group, background: as in :class:`Saver`.
    """
    parent = Path(output_dir) / "checkpoints"
    temporary = parent / f"{_TEMPORARY}{PREFIX}{step:08d}"
    problem = _on_rank_0(lambda: _prepare(parent, temporary), group)
    writer = BackgroundWriter(temporary) if background else Writer(temporary)
    if problem is None:
        _write(engine, temporary, writer)
    writer.close()
    body = {
        "step": step,
        "state": state,
        "engine": {
            "step": engine.step,
            "bad_steps": engine.bad_steps,
            "loss_scale": loss_scale.capture(engine.deepspeed.optimizer),
        },
        "layout": layout(engine),
        "config": dataclasses.asdict(engine.config),
    }
    return Pending(parent, temporary, step, body, writer, problem, group)


def complete(pending: Pending, keep_last: int, passed_over: Collection[int] = ()) -> Path:
    """Wait for all ranks' files and publish the checkpoint; a collective call.

    Args:
        keep_last: newest checkpoints to keep; older ones are removed once this one is published, and so are those of later
            steps, from which this run has gone back.
        passed_over: steps whose checkpoints do not count among them, and are removed too.

    Raises:
        CheckpointError: on every rank, if any rank could not write; older checkpoints are untouched.
    """
    parent, temporary, group = pending.parent, pending.temporary, pending.group
    final = parent / f"{PREFIX}{pending.step:08d}"
    pending.writer.wait()
    problem = pending.problem
    if problem is None:
        files, problem = _agree(pending.writer, group)
    if problem is None:
        problem = _on_rank_0(lambda: _publish(temporary, final, pending.body | {"files": files}), group)
    if problem is not None:
        _on_rank_0(lambda: shutil.rmtree(temporary, ignore_errors=True), group)
        raise CheckpointError(
            f"checkpoint {final} could not be written ({problem}); older checkpoints in {parent} are untouched."
        )
    _on_rank_0(lambda: _prune(parent, pending.step, keep_last, passed_over), group)
    return final


def layout(engine: Engine) -> dict[str, Any]:
    """What must be the same for each rank to read the files that it wrote."""
    topology, config = engine.topology, engine.config
    return {
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
        **engine.cuts,
    }


def steps(parent: Path) -> list[int]:
    """Of the published checkpoints."""
    names = [path.name.removeprefix(PREFIX) for path in parent.glob(f"{PREFIX}*")]
    return [int(name) for name in names if name.isdigit()]


def rng_name() -> str:
    """File of this rank's random generators."""
    return f"rng-{dist.get_rank():05d}.pt"


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
            deepspeed_engine.save_checkpoint(str(temporary), tag=TAG, save_latest=False)
        finally:
            deepspeed_engine.checkpoint_engine = reader
            deepspeed_engine._copy_recovery_script = recovery
    writer.save(rng.capture(), temporary / rng_name())
    if engine.segments is not None:
        engine.segments.save(lambda content, name: writer.save(content, temporary / name))


def _all(here: bool, group: dist.ProcessGroup | None) -> bool:
    """Whether it is so on every rank."""
    if group is None:
        return here
    flag = torch.tensor(int(here))
    dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=group)
    return bool(flag)


def _agree(writer: Writer, group: dist.ProcessGroup | None) -> tuple[dict[str, dict[str, Any]], str | None]:
    """All ranks' files, and the first rank's problem if any had one."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (writer.files, writer.problem), group=group)
    problems = [problem for _, problem in gathered if problem is not None]
    files = {name: entry for written, _ in gathered for name, entry in written.items()}
    return files, problems[0] if problems else None


def _on_rank_0(action: Any, group: dist.ProcessGroup | None) -> str | None:
    """Run `action` on rank 0; every rank gets the problem it met, or None."""
    outcome: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except OSError as error:
            outcome[0] = str(error)
    dist.broadcast_object_list(outcome, src=0, group=group)
    return outcome[0]


def _prepare(parent: Path, temporary: Path) -> None:
    parent.mkdir(parents=True, exist_ok=True)
    for leftover in parent.glob(f"{_TEMPORARY}*"):  # of a save that was killed
        shutil.rmtree(leftover)
    (temporary / TAG).mkdir(parents=True)


def _publish(temporary: Path, final: Path, body: dict[str, Any]) -> None:
    manifest.sync_folder(temporary / TAG)
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


def _prune(parent: Path, newest: int, keep_last: int, passed_over: Collection[int]) -> None:
    present = steps(parent)
    kept = sorted(step for step in present if step <= newest and step not in passed_over)[-max(1, keep_last) :]
    for step in set(present) - set(kept):
        path = parent / f"{PREFIX}{step:08d}"
        doomed = parent / f"{_TEMPORARY}old-{path.name}"
        path.rename(doomed)  # never half a checkpoint under a published name
        shutil.rmtree(doomed)
