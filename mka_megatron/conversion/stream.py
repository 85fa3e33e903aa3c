"""Weights from file to file through a few buffers: hashed, looked at and written in one pass.

One thread reads ahead, one hashes and looks for values that are not finite, and the caller's writes.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from mka_megatron.config.errors import ConfigError, show
from mka_megatron.files.header import Header, encode_header
from mka_megatron.files.manifest import Digest

CHUNK = 2 << 20
"""Bytes moved at a time."""
_BUFFERS = 8
Report = Callable[[int], object]
"""Is told of bytes that were moved."""
Progress = Callable[[int], AbstractContextManager[Report]]
"""Shows the way to a number of bytes, while it is entered."""
DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64", torch.int8: "I8"}
"""torch's dtypes as safetensors names them, of the tensors that this project writes."""
# The exponent of a value that is not finite is all ones: its bits, shifted left past the sign, are at least this.
_NOT_FINITE = {"BF16": ("<u2", 0xFF00), "F16": ("<u2", 0xF800), "F32": ("<u4", 0xFF000000),
               "F64": ("<u8", 0xFFE0000000000000)}


def quiet(total: int) -> AbstractContextManager[Report]:
    """Progress that shows nothing."""
    return nullcontext(lambda moved: None)


class Mover:
    """Copies files in chunks; a context manager that owns the buffers and the threads."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._buffers = [bytearray(CHUNK) for _ in range(_BUFFERS)]
        self._scratch = bytearray(CHUNK)
        self._reader, self._looker = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    def __enter__(self) -> Mover:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for pool in (self._reader, self._looker):
            pool.shutdown(cancel_futures=True)

    def copy(self, source: Path, target: Path) -> Digest:
        """Copy a file as it is; raises ConfigError where it cannot be read, OSError where it cannot be written."""
        size = source.stat().st_size
        return self._move(source, target, b"", [(0, size, None, True)])[0]

    def weights(self, header: Header, target: Path, keep: Callable[[str], bool] = lambda name: True) -> tuple[Digest, Digest]:
        """Copy the tensors of a checked file that `keep` names, all values finite, into `target`.

        Where all are kept the file is copied byte by byte.

        Returns:
            The digests of the source, all of which is read, and of the target.

        Raises:
            ConfigError: a value is not finite, or the file is shorter than it was.
            OSError: the target cannot be written.
        """
        kept = {name: (tensor.dtype, tensor.shape) for name, tensor in header.tensors.items() if keep(name)}
        whole = len(kept) == len(header.tensors)
        lead = b"" if whole else encode_header(kept, header.metadata)[0]
        pieces: list[_Piece] = [(0, header.data, None, whole)]
        pieces += [(tensor.begin, tensor.end, (name, tensor.dtype), name in kept) for name, tensor in header.tensors.items()]
        return self._move(header.path, target, lead, pieces)

    def _move(self, source: Path, target: Path, lead: bytes, pieces: Iterable[_Piece]) -> tuple[Digest, Digest]:
        """Read the consecutive `pieces`; write `lead` and those that are kept."""
        read = hashlib.sha256()
        written = hashlib.sha256(lead) if lead else None
        sizes = [0, len(lead)]

        def look(chunk: memoryview, tensor: tuple[str, str] | None, kept: bool) -> None:
            read.update(chunk)
            if written is not None and kept:
                written.update(chunk)
            if tensor is not None and not _finite(chunk, tensor[1], self._scratch):
                raise ConfigError(f"tensor {show(tensor[0])} in {source} has a value that is not finite; copy or train the "
                                  "model again.")

        with _reading(source) as stream, open(target, "xb", buffering=0) as out:
            _write(out, lead)
            chunks = _chunks(pieces)
            free = deque(self._buffers)
            filling: deque[tuple[Future[None], bytearray, memoryview, _Piece]] = deque()
            looking: deque[tuple[Future[None], bytearray]] = deque()
            while True:
                while free and (piece := next(chunks, None)) is not None:
                    chunk = memoryview(buffer := free.popleft())[: piece[1]]
                    filling.append((self._reader.submit(_fill, stream, chunk, source, piece[0]), buffer, chunk, piece))
                if not filling:
                    break
                filled, buffer, chunk, (_, length, tensor, kept) = filling.popleft()
                filled.result()
                looking.append((self._looker.submit(look, chunk, tensor, kept), buffer))
                sizes[0] += length
                if kept:
                    _write(out, chunk)
                    sizes[1] += length
                self._report(length)
                while looking and (not filling or looking[0][0].done()):
                    looked, buffer = looking.popleft()
                    looked.result()
                    free.append(buffer)
            os.fsync(out.fileno())
        found = Digest(sizes[0], read.hexdigest())
        return found, found if written is None else Digest(sizes[1], written.hexdigest())


_Piece = tuple[int, int, tuple[str, str] | None, bool]
"""First byte, one past the last, (name, dtype) of the tensor that it is, whether it is written."""


def write_tensors(target: Path, shapes: Mapping[str, tuple[str, tuple[int, ...]]],
                  tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str], report: Report = lambda moved: None
                  ) -> Digest:
    """Write a safetensors file, holding one tensor at a time.

    Args:
        target: a path that does not exist yet.
        shapes: name -> safetensors' dtype and shape, in the order of `tensors`.
        tensors: on the CPU, with these names, dtypes and shapes.
        metadata: text of the header.
        report: is told of bytes that were written.

    Returns:
        The file's digest.

    Raises:
        ConfigError: a value is not finite.
        ValueError: `tensors` are not what `shapes` says. OSError: the file cannot be written.
    """
    lead, size = encode_header(shapes, metadata)
    digest = hashlib.sha256(lead)
    scratch = bytearray(CHUNK)
    expected = iter(shapes.items())
    with open(target, "xb", buffering=0) as out:
        _write(out, lead)
        for name, tensor in tensors:
            wanted = next(expected, None)
            if wanted != (name, (DTYPES[tensor.dtype], tuple(tensor.shape))):
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, announced as {wanted}")
            view = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data
            for begin in range(0, len(view), CHUNK):
                chunk = view[begin : begin + CHUNK]
                if not _finite(chunk, wanted[1][0], scratch):
                    raise ConfigError(f"tensor {show(name)} has a value that is not finite; go on from an earlier checkpoint.")
                digest.update(chunk)
                _write(out, chunk)
                report(len(chunk))
        if (missing := next(expected, None)) is not None:
            raise ValueError(f"{missing[0]} was announced and did not come")
        os.fsync(out.fileno())
    return Digest(size, digest.hexdigest())


def _chunks(pieces: Iterable[_Piece]) -> Iterator[_Piece]:
    """Pieces of at most CHUNK bytes, a whole number of elements each: (first byte, length, tensor, kept)."""
    for begin, end, tensor, kept in pieces:
        for at in range(begin, end, CHUNK):
            yield at, min(CHUNK, end - at), tensor, kept


def _finite(chunk: memoryview, dtype: str, scratch: bytearray) -> bool:
    if dtype not in _NOT_FINITE or not len(chunk):
        return True
    word, least = _NOT_FINITE[dtype]
    bits = np.frombuffer(chunk, word)
    shifted = np.frombuffer(scratch, word, count=len(bits))
    return bool(np.left_shift(bits, 1, out=shifted).max() < least)


def _reading(path: Path) -> BinaryIO:
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; copy the model again.") from None


def _fill(stream: Any, chunk: memoryview, path: Path, begin: int) -> None:
    done = 0
    while done < len(chunk):
        try:
            count = stream.readinto(chunk[done:])
        except OSError as error:
            raise ConfigError(f"{path} cannot be read at byte {begin + done}: {error.strerror}; copy the model again.") from None
        if not count:
            raise ConfigError(f"{path} ends at byte {begin + done}, before its last tensor does; copy the model again.")
        done += count


def _write(out: Any, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while len(view):
        view = view[out.write(view) :]
