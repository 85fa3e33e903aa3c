"""Weights from file to file in one pass: the kernel copies a block while another thread hashes the one before and looks
at its values.

A block is read from the disk once: the second time it is in the page cache. Nothing here waits for the disk: `publish` does, at the end.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from mka_megatron.config.errors import ConfigError, show
from mka_megatron.files.header import Header, encode_header
from mka_megatron.files.manifest import Digest

CHUNK = 1 << 20
"""Bytes looked at at a time."""
BLOCK = 32 << 20
"""Bytes that are copied while as many are looked at."""
_BEHIND = 4
"""Blocks that may be copied and not yet looked at."""
_NOT_BY_KERNEL = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
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
    """Copies files; a context manager that owns a buffer and the thread that looks at what is copied."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._buffer, self._scratch = memoryview(bytearray(CHUNK)), bytearray(CHUNK)
        self._pool = ThreadPoolExecutor(1)

    def __enter__(self) -> Mover:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)

    def copy(self, source: Path, target: Path) -> Digest:
        """Copy a file as it is; raises ConfigError where it cannot be read, OSError where it cannot be written."""
        return self._move(source, target, b"", [_Piece(0, source.stat().st_size, True)])

    def weights(self, header: Header, target: Path, keep: Callable[[str], bool] = lambda name: True) -> Digest:
        """Copy the tensors of a checked file that `keep` names, all values finite, into `target`.

        Where all are kept the file is copied byte by byte.

        Returns:
            The digest of the source, all of which is read.

        Raises:
            ConfigError: a value is not finite, or the file is shorter than it was.
            OSError: the target cannot be written.
        """
        kept = {name: (tensor.dtype, tensor.shape) for name, tensor in header.tensors.items() if keep(name)}
        whole = len(kept) == len(header.tensors)
        lead = b"" if whole else encode_header(kept, header.metadata)[0]
        pieces = [_Piece(0, header.data, whole)]
        pieces += [_Piece(tensor.begin, tensor.end, name in kept, name, tensor.dtype) for name, tensor in header.tensors.items()]
        return self._move(header.path, target, lead, pieces)

    def _move(self, source: Path, target: Path, lead: bytes, pieces: Iterable[_Piece]) -> Digest:
        """Read the consecutive `pieces`; write `lead` and those that are kept."""
        digest, size = hashlib.sha256(), 0
        with _reading(source) as stream, open(target, "xb", buffering=0) as out:
            _write(out, lead)
            looked: deque[Future[None]] = deque()
            try:
                for block in _blocks(pieces):
                    for piece in block:
                        if piece.kept:
                            _copy(stream.fileno(), out.fileno(), piece.begin, piece.end, source)
                    looked.append(self._pool.submit(self._look, digest, stream.fileno(), source, block))
                    size += block[-1].end - block[0].begin
                    self._report(block[-1].end - block[0].begin)
                    if len(looked) > _BEHIND:
                        looked.popleft().result()
                while looked:
                    looked.popleft().result()
            finally:
                wait(looked)  # before the file is closed
        return Digest(size, digest.hexdigest())

    def _look(self, digest: Any, descriptor: int, source: Path, block: Sequence[_Piece]) -> None:
        for piece in block:
            for begin in range(piece.begin, piece.end, CHUNK):
                chunk = self._buffer[: min(CHUNK, piece.end - begin)]
                _read(descriptor, chunk, begin, source)
                digest.update(chunk)
                if not _finite(chunk, piece.dtype, self._scratch):
                    raise ConfigError(f"tensor {show(piece.tensor)} in {source} has a value that is not finite; copy or train "
                                      "the model again.")
        # it is not needed in the page cache any more, where what is written needs room
        os.posix_fadvise(descriptor, block[0].begin, block[-1].end - block[0].begin, os.POSIX_FADV_DONTNEED)


@dataclass(frozen=True)
class _Piece:
    """Consecutive bytes of a file: of one tensor, or of none."""

    begin: int
    end: int
    kept: bool
    """They are written."""
    tensor: str = ""
    dtype: str = ""


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
    return Digest(size, digest.hexdigest())


def _blocks(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Consecutive pieces, about BLOCK bytes together; larger ones are cut at multiples of CHUNK, so between elements."""
    block: list[_Piece] = []
    for piece in pieces:
        for begin in range(piece.begin, piece.end, BLOCK):
            block.append(replace(piece, begin=begin, end=min(begin + BLOCK, piece.end)))
            if block[-1].end - block[0].begin >= BLOCK:
                yield block
                block = []
    if block:
        yield block


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


def _read(descriptor: int, chunk: memoryview, begin: int, path: Path) -> None:
    done = 0
    while done < len(chunk):
        try:
            count = os.preadv(descriptor, [chunk[done:]], begin + done)
        except OSError as error:
            raise ConfigError(f"{path} cannot be read at byte {begin + done}: {error.strerror}; copy the model again.") from None
        if not count:
            raise ConfigError(f"{path} ends at byte {begin + done}, before its last tensor does; copy the model again.")
        done += count


def _copy(source: int, target: int, begin: int, end: int, path: Path) -> None:
    """Append the bytes [begin, end) of `source` to `target`, within the kernel where it can."""
    while begin < end:
        try:
            count = os.copy_file_range(source, target, end - begin, begin)
        except OSError as error:
            if error.errno not in _NOT_BY_KERNEL:
                raise
            buffer = memoryview(bytearray(min(CHUNK, end - begin)))
            _read(source, buffer, begin, path)
            count = os.write(target, buffer)
        if not count:
            raise ConfigError(f"{path} ends at byte {begin}, before its last tensor does; copy the model again.")
        begin += count


def _write(out: Any, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while len(view):
        view = view[out.write(view) :]
