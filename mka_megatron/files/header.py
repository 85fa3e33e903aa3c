"""The header of a safetensors file, checked before anything relies on it.

The format: 8 bytes n (little-endian), n bytes of JSON {name: {dtype, shape, data_offsets}}, then the tensors' bytes.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mka_megatron.config.errors import ConfigError, show
from mka_megatron.files.jsonfile import parse_object

BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2,
    "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}
"""Bytes per element of each dtype."""
LARGEST = 8 << 20
"""Bytes of the longest header that is read; one of 10,000 tensors takes about 1 MiB."""
_MOST_DIMENSIONS = 8
_METADATA = "__metadata__"


@dataclass(frozen=True)
class Stored:
    """One tensor of a file."""

    dtype: str
    """A key of `BYTES`."""
    shape: tuple[int, ...]
    begin: int
    """First byte, counted from the file's first."""
    end: int
    """One past the last byte."""


@dataclass(frozen=True)
class Header:
    """What a file holds: tensors in the order of their bytes, from `data` to its end without holes."""

    path: Path
    tensors: dict[str, Stored]
    metadata: dict[str, str]
    data: int
    """First byte of the tensors."""
    size: int
    """Bytes of the file."""


def read_header(path: Path) -> Header:
    """The checked header of `path`; nothing of the size that it claims is allocated.

    Raises:
        ConfigError: the file cannot be read, or its header contradicts itself or the file's length.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))[0]
            if size < 8 or length > size - 8:
                raise _damaged(path, f"its header would be {length} bytes long and the file has {size}")
            if length > LARGEST:
                raise _damaged(path, f"its header of {length} bytes is larger than {LARGEST >> 20} MiB")
            text = file.read(length)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; copy the model again.") from None
    if len(text) != length:
        raise _damaged(path, "it ends within its header")
    raw = parse_object(text, f"The header of {path}")
    metadata = raw.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, f"{_METADATA} is {show(metadata)}, not text by name")
    data = 8 + length
    found = sorted(((name, _stored(path, name, entry, data)) for name, entry in raw.items()),
                   key=lambda pair: (pair[1].begin, pair[1].end))
    position = data
    for name, tensor in found:
        if tensor.begin != position:
            what = "overlaps the one before it" if tensor.begin < position else "leaves a hole before it"
            raise _damaged(path, f"tensor {show(name)} {what}")
        position = tensor.end
    if position != size:
        raise _damaged(path, f"its tensors end at byte {position} and the file has {size}")
    return Header(path, dict(found), metadata, data, size)


def encode_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> tuple[bytes, int]:
    """The leading bytes of a file of `tensors` (name -> dtype, shape), laid out in this order, and the file's size."""
    entries: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    position = 0
    for name, (dtype, shape) in tensors.items():
        end = position + math.prod(shape) * BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, 8 + len(text) + position


def _stored(path: Path, name: str, entry: Any, data: int) -> Stored:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"tensor {show(name)} has no dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BYTES:
        raise _damaged(path, f"tensor {show(name)} has the unknown dtype {show(dtype)}")
    if not _sizes(shape) or len(shape) > _MOST_DIMENSIONS:
        raise _damaged(path, f"tensor {show(name)} has the shape {show(shape)}")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
        raise _damaged(path, f"tensor {show(name)} has the data_offsets {show(offsets)}")
    if math.prod(shape) * BYTES[dtype] != offsets[1] - offsets[0]:
        raise _damaged(path, f"tensor {show(name)} of shape {show(shape)} in {dtype} has {offsets[1] - offsets[0]} bytes")
    return Stored(dtype, tuple(shape), data + offsets[0], data + offsets[1])


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _damaged(path: Path, reason: str) -> ConfigError:
    return ConfigError(f"{path} is damaged: {reason}; copy the model again.")
