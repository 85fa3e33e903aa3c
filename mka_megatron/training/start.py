"""Before the first step: where the run writes, who prepares the data, and which checkpoint it goes on from."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mka_megatron.config.errors import refuse
from mka_megatron.config.schema import TrainingConfig
from mka_megatron.data.tokenizer import Tokenizer
from mka_megatron.parallel.groups import Topology
from mka_megatron.training import checkpoint, manifest
from mka_megatron.training.engine import Engine
from mka_megatron.training.manifest import Checkpoint, CheckpointError
from mka_megatron.training.saving import PREFIX

_PREPARATION_LIMIT = timedelta(days=2)

T = TypeVar("T")


class PeerFailedError(RuntimeError):
    """Rank 0 failed at what the other ranks waited for; it says why."""


def check_output(training: TrainingConfig) -> None:
    """Create output_dir.

    Raises:
        ConfigError: it cannot be created, or the run would mix its checkpoints with those of another future: later ones, that
            did not begin where this run does.
    """
    try:
        Path(training.output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise refuse(
            "training.output_dir",
            training.output_dir,
            f"it cannot be created ({error.strerror}); choose another",
        ) from None
    if training.resume == "auto" or _has_begun(training):
        return
    present = Path(training.output_dir, "checkpoints")
    chosen = Path(training.resume).resolve().name
    begun = chosen if chosen.startswith(PREFIX) else ""  # none, or a copy that does not tell its step
    later = [path for path in present.glob(f"{PREFIX}*") if path.name > begun]  # the next save would remove them
    if later:
        raise refuse(
            "training.resume",
            training.resume,
            f"{present} holds later checkpoints, which auto would go on from; move {max(later).name} "
            "and its like away, or choose another training.output_dir",
        )


def begins_at(training: TrainingConfig) -> str | None:
    """The checkpoint, by its absolute path, that training.resume names; None for auto and none."""
    return None if training.resume in ("auto", "none") else str(Path(training.resume).resolve())


def _has_begun(training: TrainingConfig) -> bool:
    """Whether output_dir has checkpoints of a run that began at the one in training.resume: of this run, interrupted."""
    path = begins_at(training)
    if path is None:
        return False
    for folder in Path(training.output_dir, "checkpoints").glob(f"{PREFIX}*"):
        with contextlib.suppress(CheckpointError):  # damaged
            if manifest.read(folder)["state"].get("begun_at") == path:
                return True
    return False


def rank_0_first(action: Callable[[], T], topology: Topology) -> T:
    """`action()` on rank 0, then, if that went well, on every other rank.

    Raises:
        PeerFailedError: on the other ranks, where rank 0 raised.
    """
    if topology.world_size == 1:
        return action()
    group = dist.new_group(backend="gloo", timeout=_PREPARATION_LIMIT)
    failure: Exception | None = None
    if topology.rank == 0:
        try:
            result = action()
        except Exception as error:
            failure = error
    failed = torch.tensor([failure is not None])
    dist.broadcast(failed, src=0, group=group)
    dist.destroy_process_group(group)
    if failure is not None:
        raise failure
    if bool(failed):
        raise PeerFailedError
    return result if topology.rank == 0 else action()


def resume(
    engine: Engine, training: TrainingConfig, tokenizer: Tokenizer | None = None
) -> tuple[Path | None, dict[str, Any]]:
    """Bring `engine` to the checkpoint that `training.resume` asks for; to the newest of a run that began there, if there is one.

    Args:
        tokenizer: the run's; None where all data is tokens already.

    Returns:
        The checkpoint's path and the state saved with it; (None, {}) where the run starts from the beginning.

    Raises:
        CheckpointError: the one asked for cannot be loaded, or was trained with another tokenizer.
    """
    if training.resume == "none":
        return None, {}
    begun = [_has_begun(training)]
    if dist.is_initialized():
        dist.broadcast_object_list(begun, src=0)  # all ranks take the same
    newest = training.resume == "auto" or begun[0]
    found = checkpoint.newest_intact(training.output_dir) if newest else manifest.verify(Path(training.resume))
    if found is None:
        return None, {}
    if tokenizer is not None and engine.config.data.tokenizer is None:
        _check_trained_tokenizer(found, tokenizer)
    return found.path, checkpoint.load(engine, found)


def _check_trained_tokenizer(found: Checkpoint, tokenizer: Tokenizer) -> None:
    """Raises CheckpointError where `tokenizer`, which was trained on the text of data.train, is not the one before."""
    state = found.body["state"]
    if state.get("tokenizer_fingerprint", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise CheckpointError(
            f"checkpoint {found.path} was trained with the tokenizer {state['tokenizer']}, but data.tokenizer null means one that "
            "was trained on data.train as it is now; set data.tokenizer to the former, or start in another training.output_dir."
        )
