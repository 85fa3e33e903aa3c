from __future__ import annotations

import json
import struct
import tracemalloc

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mka_megatron.config.errors import ConfigError
from mka_megatron.files.header import LARGEST, encode_header, read_header

TENSORS = {
    "a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "empty": torch.zeros(0, 5),
    "scalar": torch.tensor(3.5, dtype=torch.float64), "bytes": torch.arange(5, dtype=torch.int8),
    "half": torch.full((1, 1, 2), 0.5, dtype=torch.float16), "flag": torch.tensor([True, False]),
}  # fmt: skip


def raw(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_reads_what_safetensors_wrote(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors", {"format": "pt", "note": "ü"})
    header = read_header(tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    assert header.metadata == {"format": "pt", "note": "ü"} and header.size == len(data)
    assert set(header.tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        found = header.tensors[name]
        assert found.shape == tuple(tensor.shape)
        assert data[found.begin : found.end] == bytes(tensor.reshape(-1).view(torch.uint8).numpy())
    ends = [header.data, *(tensor.end for tensor in header.tensors.values())]
    assert [tensor.begin for tensor in header.tensors.values()] == ends[:-1] and ends[-1] == header.size


def test_safetensors_reads_what_is_encoded(tmp_path):
    lead, size = encode_header({"x": ("F32", (2, 2)), "y": ("I8", (3,)), "z": ("BF16", ())}, {"format": "pt"})
    values = torch.tensor([1.0, -2.0, 3.0, 4.0]), torch.tensor([1, -1, 7], dtype=torch.int8), torch.tensor(2.0, dtype=torch.bfloat16)
    data = b"".join(bytes(value.reshape(-1).view(torch.uint8).numpy()) for value in values)
    assert len(lead) % 8 == 0 and len(lead) + len(data) == size
    (tmp_path / "x.safetensors").write_bytes(lead + data)
    loaded = load_file(tmp_path / "x.safetensors")
    assert torch.equal(loaded["x"], values[0].view(2, 2)) and torch.equal(loaded["y"], values[1]) and torch.equal(loaded["z"], values[2])


DAMAGED = {
    "empty": b"", "seven bytes": b"\0" * 7, "no header": b"\0" * 8, "header past the end": struct.pack("<Q", 9) + b"{}",
    "huge header": struct.pack("<Q", 2**64 - 1) + b"{}", "no JSON": raw(b"{"), "a list": raw(b"[]"), "a number": raw(b"1"),
    "not UTF-8": raw(b'{"\xff": 1}'), "deep": raw(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "NaN": raw(b'{"a": NaN}'), "a huge integer": raw(b'{"a": ' + b"9" * 5000 + b"}"),
    "a name twice": raw(b'{"a": ' + json.dumps(entry()).encode() + b', "a": ' + json.dumps(entry()).encode() + b"}", bytes(8)),
    "a key twice": raw(b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', bytes(8)),
    "an entry that is a list": raw(b'{"a": []}'), "no offsets": raw(b'{"a": {"dtype": "F32", "shape": [2]}}', bytes(8)),
    "metadata of numbers": raw(b'{"__metadata__": {"a": 1}}'), "metadata that is text": raw(b'{"__metadata__": "a"}'),
    "data and no tensors": raw(b"{}", bytes(8)),
}  # fmt: skip
ENTRIES = {
    "unknown dtype": entry("F5"), "dtype of another type": entry(["F32"]), "shape too large": entry(shape=(3,)),
    "shape too small": entry(shape=(1,)), "negative shape": entry(shape=(-2,)), "shape of floats": entry(shape=(2.0,)),
    "shape of booleans": entry(shape=(True, 2)), "shape that overflows": entry(shape=(2**62, 2**62, 2**5), offsets=(0, 0)),
    "shape past int64": entry(shape=(2**63, 0), offsets=(0, 0)), "many dimensions": entry(shape=(1,) * 8 + (2,)),
    "shape of null": {**entry(), "shape": None}, "offsets backwards": entry(offsets=(8, 0)),
    "negative offsets": entry(offsets=(-8, 0)), "three offsets": entry(offsets=(0, 8, 8)), "a hole in front": entry(offsets=(8, 16)),
    "past the end": entry(shape=(4,), offsets=(0, 16)), "bytes over": entry(shape=(1,), offsets=(0, 4)),
    "huge": entry("F64", (2**30, 2**20), (0, 2**53)), "a further key": {**entry(), "more": 1},
}  # fmt: skip


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_refuses_damaged_files(content, tmp_path):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ConfigError, match=r"x is (damaged|not usable)"):
        read_header(tmp_path / "x")


@pytest.mark.parametrize("tensor", ENTRIES.values(), ids=ENTRIES)
def test_refuses_impossible_entries(tensor, tmp_path):
    (tmp_path / "x").write_bytes(raw(json.dumps({"a": tensor}).encode(), bytes(8)))
    with pytest.raises(ConfigError, match="x is damaged"):
        read_header(tmp_path / "x")


@pytest.mark.parametrize(("second", "what"), [((4, 12), "overlaps"), ((12, 20), "hole"), ((0, 8), "overlaps"), ((8, 16), None)])
def test_refuses_overlaps_and_holes(second, what, tmp_path):
    header = {"a": entry(), "b": entry(offsets=second)}
    (tmp_path / "x").write_bytes(raw(json.dumps(header).encode(), bytes(second[1])))
    if what is None:
        assert list(read_header(tmp_path / "x").tensors) == ["a", "b"]
        return
    with pytest.raises(ConfigError, match=what):
        read_header(tmp_path / "x")


def test_a_claimed_header_is_not_allocated(tmp_path):
    path = tmp_path / "x"
    with open(path, "wb") as file:  # sparse
        file.write(struct.pack("<Q", 2**34))
        file.truncate(2**35)
    tracemalloc.start()
    with pytest.raises(ConfigError, match="larger than"):
        read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < LARGEST


NUMBERS = st.one_of(st.integers(), st.integers(0, 16), st.floats(), st.booleans(), st.none(), st.text(max_size=4))
ENTRY = st.fixed_dictionaries({}, optional={
    "dtype": st.one_of(st.sampled_from(["F32", "BF16", "I8", "F64", "x"]), NUMBERS),
    "shape": st.one_of(st.lists(NUMBERS, max_size=10), NUMBERS),
    "data_offsets": st.one_of(st.lists(NUMBERS, max_size=3), NUMBERS), "more": NUMBERS})


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.text(max_size=8), st.one_of(ENTRY, NUMBERS), max_size=4), st.integers(0, 64), st.integers(-3, 3))
def test_any_header_is_read_or_refused(tmp_path, header, data, off):
    text = json.dumps(header).encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", max(0, len(text) + off)) + text + bytes(data))
    try:
        found = read_header(tmp_path / "x")
    except ConfigError as error:
        assert "\n" not in str(error) and str(error).endswith(".")
    else:
        assert sum(tensor.end - tensor.begin for tensor in found.tensors.values()) == found.size - found.data


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    try:
        read_header(tmp_path / "x")
    except ConfigError as error:
        assert "\n" not in str(error)
