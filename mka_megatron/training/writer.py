"""Files of a checkpoint: hashed while they are written, forced to the disk, and never raising on one rank alone."""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
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
            self.error = self.error or OSError(error.errno, error.strerror)  # without the frames, which hold the data
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


class Copy(io.RawIOBase):
    """A file in host memory that torch.save writes to."""

    def __init__(self) -> None:
        self.pieces: deque[bytes] = deque()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.pieces.append(bytes(data))
        return len(data)


class Writer(CheckpointEngine):
    """Writes this rank's files, DeepSpeed's included, and remembers failure instead of raising it.

    DeepSpeed's ranks meet in barriers while they save: one that raised would leave the others there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, dict[str, Any]] = {}
        self.problem: str | None = None

    def save(self, state_dict: Any, path: str | Path) -> None:
        self._write(Path(path), lambda file: torch.save(state_dict, cast(IO[bytes], file)))

    def _write(self, path: Path, fill: Callable[[HashingFile], None]) -> None:
        if self.problem is not None:
            return
        file = None
        try:
            file = HashingFile(path)
            fill(file)
            entry = file.finish()
        except Exception as error:  # of a disk, of memory that is not there, of what torch.save makes of either
            self._failed(path, (file and file.error) or error)
            if file is not None:
                _close_quietly(file)
            return
        self.files[str(path.relative_to(self.folder))] = entry

    def _failed(self, path: Path, cause: BaseException) -> None:
        reason = getattr(cause, "strerror", None) or (str(cause) or type(cause).__name__).splitlines()[0]
        self.problem = f"rank {dist.get_rank()}, {path.name}: {reason}"

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

    def close(self) -> None:
        """There are no more files."""

    @property
    def done(self) -> bool:
        """Whether every file is on the disk, or one could not be written."""
        return True

    def wait(self) -> None:
        """Until :attr:`done`."""


class BackgroundWriter(Writer):
    """The same from a thread: `save` copies the bytes of the file into host memory and returns.

    The copy is this rank's files, once; on CUDA one more tensor on its way there. It shrinks as the thread writes.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._queue: SimpleQueue[tuple[Path, Copy] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._drain, name="checkpoint writer", daemon=True)
        self._thread.start()

    def save(self, state_dict: Any, path: str | Path) -> None:
        if self.problem is not None:
            return
        copy = Copy()
        try:
            torch.save(state_dict, cast(IO[bytes], copy))
        except Exception as error:
            self._failed(Path(path), error)
            return
        self._queue.put((Path(path), copy))

    def close(self) -> None:
        self._queue.put(None)

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> None:
        self._thread.join()

    def _drain(self) -> None:
        while (item := self._queue.get()) is not None:
            path, copy = item
            del item

            def fill(file: HashingFile, copy: Copy = copy) -> None:
                while copy.pieces:
                    file.write(copy.pieces.popleft())

            self._write(path, fill)
            copy.pieces.clear()


def _close_quietly(file: HashingFile) -> None:
    try:
        file.file.close()
    except OSError:
        pass
