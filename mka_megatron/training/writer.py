"""Files of a checkpoint: hashed while they are written, forced to the disk, and never raising on one rank alone."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine


class HashingFile(io.RawIOBase):
    """A file that torch.save writes to; remembers size, SHA-256 and the operating system's first refusal."""

    def __init__(self, path: Path) -> None:
        self.file = open(path, "wb")
        self.digest, self.size = hashlib.sha256(), 0
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise
        self.digest.update(data)
        self.size += len(data)
        return len(data)

    def finish(self) -> dict[str, Any]:
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
        finally:
            self.file.close()
        return {"size": self.size, "sha256": self.digest.hexdigest()}


class Writer(CheckpointEngine):
    """Writes this rank's files, DeepSpeed's included, and remembers failure instead of raising it.

    DeepSpeed's ranks meet in barriers while they save: one that raised would leave the others there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, dict[str, Any]] = {}
        self.problem: str | None = None

    def save(self, state_dict: Any, path: str | Path) -> None:
        if self.problem is not None:
            return
        file = None
        try:
            file = HashingFile(Path(path))
            torch.save(state_dict, cast(IO[bytes], file))
            entry = file.finish()
        except (OSError, RuntimeError) as error:  # torch.save turns a refused write into a RuntimeError
            cause = (file and file.error) or error
            reason = getattr(cause, "strerror", None) or str(cause).splitlines()[0]
            self.problem = f"rank {dist.get_rank()}, {Path(path).name}: {reason}"
            if file is not None:
                _close_quietly(file)
            return
        self.files[str(Path(path).relative_to(self.folder))] = entry

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        try:
            os.makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self.problem = self.problem or f"rank {dist.get_rank()}: {error}"

    def load(self, path: str, map_location: Any = None) -> Any:
        raise NotImplementedError("this checkpoint engine only writes")

    def create(self, info: CheckpointCommitInfo) -> None:
        pass

    def commit(self, info: CheckpointCommitInfo) -> bool:
        return True


def _close_quietly(file: HashingFile) -> None:
    try:
        file.file.close()
    except OSError:
        pass
