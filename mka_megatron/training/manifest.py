"""What a checkpoint folder must contain: sizes and SHA-256 of every file, and the manifest's own checksum."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

NAME = "manifest.json"
_FORMAT = 1
_CHUNK = 1 << 22
_REASONS = ("is missing", "has the wrong size (truncated?)", "has the wrong SHA-256 (damaged)")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or used; the message is one sentence."""


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint whose every file has been verified; only :func:`verify` makes one."""

    path: Path
    body: dict[str, Any]
    """step, state, layout, config, engine and files, as `checkpoint.save` put them in."""

    @property
    def step(self) -> int:
        """Optimizer steps taken when it was written."""
        return int(self.body["step"])


def write(folder: Path, body: dict[str, Any]) -> None:
    """Write `folder/manifest.json` and force it and the folder to the disk. Raises OSError."""
    text = json.dumps({"format": _FORMAT, "sha256": _digest(body), "body": body}, indent=1, sort_keys=True)
    with open(folder / NAME, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)


def verify(folder: Path) -> Checkpoint:
    """Check the manifest and every file it lists; a collective call, the ranks share the reading.

    Raises:
        CheckpointError: on every rank, naming the folder and the first thing wrong.
    """
    body = _shared(folder)
    files = sorted(body["files"].items())
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    first = len(files) * len(_REASONS)
    for index in range(rank, len(files), ranks):
        reason = _check(folder / files[index][0], **files[index][1])
        if reason is not None:
            first = index * len(_REASONS) + reason
            break
    first = _minimum(first)
    if first < len(files) * len(_REASONS):
        name, reason = files[first // len(_REASONS)][0], first % len(_REASONS)
        raise CheckpointError(f"checkpoint {folder} is not intact: {name} {_REASONS[reason]}.")
    return Checkpoint(folder, body)


def sync_folder(folder: Path) -> None:
    """Force the folder's entries (new names, renames) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _shared(folder: Path) -> dict[str, Any]:
    """The manifest's body as rank 0 reads it: a rank that saw another would go on from another checkpoint."""
    outcome: list[Any] = [None, None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            outcome = [read(folder), None]
        except CheckpointError as error:
            outcome = [None, str(error)]
    if dist.is_initialized():
        dist.broadcast_object_list(outcome, src=0)
    body, problem = outcome
    if problem is not None:
        raise CheckpointError(problem)
    return body


def read(folder: Path) -> dict[str, Any]:
    """The manifest's body, whatever the files are. Raises CheckpointError where it is missing or damaged."""
    try:
        content = json.loads((folder / NAME).read_text(encoding="utf-8"))
        body = content["body"]
        if content["format"] != _FORMAT:
            raise CheckpointError(f"checkpoint {folder} has manifest format {content['format']}, not {_FORMAT}.")
        if content["sha256"] != _digest(body):
            raise CheckpointError(f"checkpoint {folder} is not intact: {NAME} has the wrong SHA-256 (damaged).")
    except OSError:
        raise CheckpointError(f"checkpoint {folder} is not intact: it has no readable {NAME}.") from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"checkpoint {folder} is not intact: {NAME} is not a manifest (damaged).") from None
    return body


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _check(path: Path, size: int, sha256: str) -> int | None:
    """Index into _REASONS, or None for an intact file."""
    try:
        if path.stat().st_size != size:
            return 1
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError:
        return 0
    return None if digest.hexdigest() == sha256 else 2


def _minimum(value: int) -> int:
    if not dist.is_initialized():
        return value
    on_cuda = dist.get_backend() == "nccl"
    tensor = torch.tensor(value, device="cuda" if on_cuda else "cpu")
    dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
    return int(tensor)
