"""A record proves that it is the page asked for: every bit of it counts, and so does whose it is."""

from __future__ import annotations

import pytest
import torch

from mka_megatron.memory.tiers.pages import PageKey, PageShape, Seal, as_bytes, unpack

SHAPE = PageShape(chunk_size=3, head_dim=5, dtype=torch.bfloat16, signature_words=1)
KEY = PageKey(generation=4, sequence=2**40, layer=31, head=7, chunk=2**33)
SEAL = Seal(SHAPE, "run", 3)


def pack(shape: PageShape, record_bytes: int, **values: torch.Tensor) -> torch.Tensor:
    records = torch.zeros(len(values["k"]), record_bytes, dtype=torch.uint8)
    for begin, end, value in as_bytes(shape, values):
        records[:, begin:end] = torch.from_numpy(value)
    return records


def sealed(seal: Seal = SEAL, key: PageKey = KEY) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, 3, 5, generator=generator).bfloat16() for _ in range(2))
    record = pack(SHAPE, 4096, k=k, v=v, mean_k=k.mean(1), mean_v=v.mean(1), signature=torch.tensor([[-(2**63)]]))
    seal.close(record[0].numpy().data, key, 2)
    return record


def problem(record: torch.Tensor, key: PageKey = KEY) -> str | None:
    return SEAL.problem(record[0].numpy().data, key)


def test_every_flipped_bit_shows() -> None:
    record = sealed()
    assert problem(record) is None
    for place in range(SHAPE.used_bytes):
        for bit in range(8):
            record[0, place] ^= 1 << bit
            assert problem(record) is not None, f"bit {bit} of byte {place}"
            record[0, place] ^= 1 << bit
    assert problem(record) is None


def test_a_bit_of_the_padding_does_not_count() -> None:
    record = sealed()
    record[0, SHAPE.used_bytes] ^= 1
    assert problem(record) is None


@pytest.mark.parametrize("kept", [0, 7, 8, 100, 128, 140, SHAPE.used_bytes - 1])
def test_a_record_cut_short_shows(kept: int) -> None:
    record = sealed()
    record[0, kept:] = 0
    assert problem(record) is not None


@pytest.mark.parametrize("name", PageKey._fields)
def test_another_page_in_its_place_shows(name: str) -> None:
    other = KEY._replace(**{name: getattr(KEY, name) + 1})
    assert problem(sealed(key=other)) == f"holds the {other} there"


@pytest.mark.parametrize(
    "seal", [Seal(SHAPE, "other", 3), Seal(SHAPE, "run", 2), Seal(PageShape(3, 5, torch.float16, 1), "run", 3)]
)
def test_a_page_of_another_run_rank_or_shape_shows(seal: Seal) -> None:
    assert problem(sealed(seal)) == "holds a page of another run, rank or shape there"


def test_records_end_with_what_is_theirs() -> None:
    """The last sector of two pages differs even where their last numbers are the same: a write is proved by it."""
    zeros = {"k": torch.zeros(1, 3, 5).bfloat16(), "mean_v": torch.zeros(1, 5).bfloat16()}
    records = [pack(SHAPE, 4096, v=torch.full((1, 3, 5), value).bfloat16(), **zeros) for value in (1.0, 2.0)]
    for record in records:
        SEAL.close(record[0].numpy().data, KEY, 3)
    assert not records[0][0, -512:].equal(records[1][0, -512:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [1, 5, 80, 128])
@pytest.mark.parametrize("signature", [(0, torch.int64), (2, torch.int64), (7, torch.float64)])
def test_fields_come_back(dtype: torch.dtype, head_dim: int, signature: tuple[int, torch.dtype]) -> None:
    shape = PageShape(4, head_dim, dtype, *signature)
    generator = torch.Generator().manual_seed(1)
    given = {
        "k": torch.randn(3, 4, head_dim, generator=generator).to(dtype),
        "v": torch.randn(3, 4, head_dim, generator=generator).to(dtype),
        "mean_k": torch.randn(3, head_dim, generator=generator).to(dtype),
        "mean_v": torch.randn(3, head_dim, generator=generator).to(dtype),
        "signature": torch.randn(3, signature[0], generator=generator).mul(1e9).to(signature[1]),
    }
    found = unpack(shape, pack(shape, shape.record_bytes(64), **given))
    for name, value in given.items():
        assert found[name].equal(value), name


@pytest.mark.parametrize(("size", "head_dim", "dtype"), [(128, 128, torch.bfloat16), (64, 128, torch.bfloat16)])
def test_padding_is_a_small_part(size: int, head_dim: int, dtype: torch.dtype) -> None:
    shape = PageShape(size, head_dim, dtype, 1)
    payload = 2 * size * head_dim * dtype.itemsize
    assert shape.record_bytes(4096) == payload + 4096


@pytest.mark.parametrize("wrong", [torch.zeros(2, 3, 4).bfloat16(), torch.zeros(2, 3, 5)])
def test_another_shape_or_type_is_refused(wrong: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"k is .* give torch.bfloat16, \[P, 3, 5\]"):
        as_bytes(SHAPE, {"k": wrong})
