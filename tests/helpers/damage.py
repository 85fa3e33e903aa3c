"""Damaged copies of model directories, from a seed."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path

HUGE = (2**31, 2**40, 2**62, 2**63, 2**64, 10**30, -1)


def header_of(path: Path) -> tuple[bytearray, int]:
    """A file's bytes and the length of its header."""
    data = bytearray(path.read_bytes())
    return data, struct.unpack("<Q", data[:8])[0]


def with_header(path: Path, header: object) -> None:
    """Replace the header by the JSON of `header`, the data left as they are."""
    data, length = header_of(path)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data[8 + length :]))


def flip_header_bit(path: Path, draw: random.Random) -> None:
    data, length = header_of(path)
    data[draw.randrange(8 + length)] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def replace_header_byte(path: Path, draw: random.Random) -> None:
    data, length = header_of(path)
    data[8 + draw.randrange(length)] = draw.choice(b'0123456789{}[]",:-eE. \\\x00\xff')
    path.write_bytes(data)


def truncate(path: Path, draw: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: draw.choice((0, 1, 7, 8, 9, draw.randrange(len(data)), len(data) - 1))])


def extend(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.choice((1, 8, 4096))))


def claim_length(path: Path, draw: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(struct.pack("<Q", draw.choice((0, 1, 2**20, 2**32, 2**63, 2**64 - 1, len(data), len(data) - 8))) + data[8:])


def change_entry(path: Path, draw: random.Random) -> None:
    """One tensor's dtype, shape or offsets: huge, negative, of another type, or missing."""
    data, length = header_of(path)
    header = json.loads(data[8 : 8 + length])
    entry = header[draw.choice([name for name in header if name != "__metadata__"])]
    key = draw.choice(("dtype", "shape", "data_offsets"))
    values = {
        "dtype": ("F32", "BF16", "I8", "F4", "", 3, None, ["F32"]),
        "shape": ([draw.choice(HUGE)], [draw.choice(HUGE)] * 9, [], [0], "x", [1.5], [True], [[]], [2**62, 2**62, 4]),
        "data_offsets": ([0, draw.choice(HUGE)], [draw.choice(HUGE), 0], [0], [], [8, 0], ["0", "8"], None, [0.0, 8.0]),
    }[key]
    entry[key] = draw.choice(values)
    if draw.random() < 0.1:
        del entry[key]
    with_header(path, header)


def shift_offsets(path: Path, draw: random.Random) -> None:
    """Holes and overlaps."""
    data, length = header_of(path)
    header = json.loads(data[8 : 8 + length])
    entry = header[draw.choice([name for name in header if name != "__metadata__"])]
    by = draw.choice((-8, -4, 4, 8, 4096))
    entry["data_offsets"] = [offset + by for offset in entry["data_offsets"]]
    with_header(path, header)


def drop_or_add_tensor(path: Path, draw: random.Random) -> None:
    data, length = header_of(path)
    header = json.loads(data[8 : 8 + length])
    name = draw.choice([name for name in header if name != "__metadata__"])
    if draw.random() < 0.5:
        del header[name]
    else:
        header[f"{name}.again"] = header[name]
    with_header(path, header)


def mutate_json(path: Path, draw: random.Random) -> None:
    """One byte of a JSON file."""
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] = draw.choice(b'0123456789{}[]",:-eE. \\\x00\xffn')
    path.write_bytes(data)


def change_config(path: Path, draw: random.Random) -> None:
    """One field of config.json."""
    raw = json.loads(path.read_text())
    key = draw.choice(sorted(raw))
    raw[key] = draw.choice((None, 0, -1, 1, 2, 2**31, 10**30, 1.5, "x", "", [], {}, [1], True, {"rope_type": "x"}, "../../x"))
    if draw.random() < 0.2:
        del raw[key]
    path.write_text(json.dumps(raw))


WEIGHTS: tuple[Callable[[Path, random.Random], None], ...] = (
    flip_header_bit, replace_header_byte, truncate, extend, claim_length, change_entry, shift_offsets, drop_or_add_tensor)
"""Damage to a safetensors file that is not its payload's."""
