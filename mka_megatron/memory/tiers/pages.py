"""A page: one chunk's keys and values of one layer and KV head, as bytes that describe and prove themselves.

Record: checksum | header | signature | K | V | mean K | mean V | padding | checksum. The checksum (XXH3, 64 bits)
covers all between but the padding, and the header names the page, so that a flipped bit, a page cut short, another
page in its place and one of another run or generation all show. Its second copy makes a record's last sector its own.

Shapes: P pages, C chunk size, d head channels, W signature words.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mka_megatron.memory.tiers.checksum import checksum, digest

_MAGIC = b"MKA page"
_FORMAT = 1
# magic, format, tokens, run and rank, payload bytes, generation, sequence, chunk, layer, head
_FIELDS = "<8sII16sQqqqii"
_CHECKSUM = struct.Struct("<Q")
_HEAD_BYTES = 128
_HEADER = struct.Struct(f"{_FIELDS}{_HEAD_BYTES - _CHECKSUM.size - struct.calcsize(_FIELDS)}x")


class TierError(RuntimeError):
    """The store cannot keep or return a page. The message is one sentence: what, where, and the fix."""


class PageKey(NamedTuple):
    """What a page is called."""

    generation: int
    """Counts resumes, so that no page of a life that was given up is taken for one of this."""
    sequence: int
    """Uid of the row."""
    layer: int
    """Layer, from 0."""
    head: int
    """KV head, counted over all ranks."""
    chunk: int
    """Chunk of the row."""

    def __str__(self) -> str:
        return (
            f"page of generation {self.generation}, sequence {self.sequence}, layer {self.layer}, "
            f"head {self.head}, chunk {self.chunk}"
        )


@dataclass(frozen=True)
class PageShape:
    """What every page of a store holds."""

    chunk_size: int
    """C."""
    head_dim: int
    """d."""
    dtype: torch.dtype
    """Of keys, values and their means."""
    signature_words: int = 0
    """W; 0: pages carry no signature."""
    signature_dtype: torch.dtype = torch.int64
    """int64 codes, or fp64 centred means."""

    @property
    def fields(self) -> dict[str, tuple[int, int, tuple[int, ...], torch.dtype]]:
        """Name -> (first byte, byte behind it, shape, dtype) within a record."""
        chunk, channels = self.chunk_size, self.head_dim
        layout = {
            "signature": ((self.signature_words,), self.signature_dtype),
            "k": ((chunk, channels), self.dtype),
            "v": ((chunk, channels), self.dtype),
            "mean_k": ((channels,), self.dtype),
            "mean_v": ((channels,), self.dtype),
        }
        found, begin = {}, _HEAD_BYTES
        for name, (shape, dtype) in layout.items():
            end = begin + prod(shape) * dtype.itemsize
            found[name] = (begin, end, shape, dtype)
            begin = end
        return found

    @property
    def used_bytes(self) -> int:
        """Bytes of a record up to its padding."""
        return self.fields["mean_v"][1]

    def record_bytes(self, alignment: int) -> int:
        """Bytes of a record padded to a multiple of `alignment`, which is a multiple of 8."""
        return -(-(self.used_bytes + _CHECKSUM.size) // alignment) * alignment


class Seal:
    """Writes and checks the headers of one rank's pages.

    `run`: what this run is called, `rank`: whose pages; both enter every header.
    """

    def __init__(self, shape: PageShape, run: str, rank: int) -> None:
        self._used = shape.used_bytes
        self._owner = digest(f"{run}/{rank}/{shape}")

    def close(self, record: memoryview, key: PageKey, tokens: int) -> None:
        """Put header, padding and checksums around the payload in `record`, the bytes of one."""
        _HEADER.pack_into(
            record, _CHECKSUM.size, _MAGIC, _FORMAT, tokens, self._owner, self._used,
            key.generation, key.sequence, key.chunk, key.layer, key.head,
        )  # fmt: skip
        record[self._used : -_CHECKSUM.size] = bytes(len(record) - _CHECKSUM.size - self._used)
        proof = self._proof(record)
        _CHECKSUM.pack_into(record, 0, proof)
        _CHECKSUM.pack_into(record, len(record) - _CHECKSUM.size, proof)

    def problem(self, record: memoryview, key: PageKey) -> str | None:
        """Why `record` is not the page `key` as it was closed; None: it is."""
        magic, version, _, owner, used, generation, sequence, chunk, layer, head = _HEADER.unpack_from(
            record, _CHECKSUM.size
        )
        if magic != _MAGIC:
            return "holds no page there"
        if _CHECKSUM.unpack_from(record)[0] != self._proof(record):
            return "is damaged there: the checksum is another"
        if version != _FORMAT or owner != self._owner or used != self._used:
            return "holds a page of another run, rank or shape there"
        found = PageKey(generation, sequence, layer, head, chunk)
        return None if found == key else f"holds the {found} there"

    def _proof(self, record: memoryview) -> int:
        return checksum(record[_CHECKSUM.size : self._used])


def as_bytes(shape: PageShape, values: dict[str, Tensor]) -> list[tuple[int, int, np.ndarray]]:
    """Per field its first byte and the byte behind it in a record, and uint8 [P, bytes] in host memory, of the
    fields' values [P, *its shape] by name. Raises ValueError for another shape or type."""
    found = []
    for name, value in values.items():
        begin, end, dims, dtype = shape.fields[name]
        if value.shape[1:] != dims or value.dtype != dtype:
            raise ValueError(
                f"{name} is {value.dtype} of shape {list(value.shape)}: give {dtype}, [P, {', '.join(map(str, dims))}]."
            )
        if begin < end:
            # [P, *dims] -> [P, bytes]
            flat = value.detach().to("cpu").contiguous().flatten(1).view(torch.uint8)
            found.append((begin, end, flat.numpy()))
    return found


def unpack(shape: PageShape, records: Tensor) -> dict[str, Tensor]:
    """The fields of uint8 [P, record bytes], [P, *its shape] by name, as views."""
    # [P, bytes] -> [P, values] -> [P, *dims]
    return {
        name: records[:, begin:end].view(dtype).unflatten(1, dims)
        for name, (begin, end, dims, dtype) in shape.fields.items()
    }
