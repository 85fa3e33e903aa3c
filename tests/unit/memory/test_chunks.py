from __future__ import annotations

import pytest
import torch

from mka_megatron.memory.chunks import Chunks
from mka_megatron.memory.documents import Documents
from tests.helpers.layouts import chunked


def by_the_loop(documents: Documents, size: int) -> tuple[list, list, list, list]:
    lengths, ordinals, last, firsts = [], [], [], []
    padding = torch.zeros_like(documents.starts) if documents.padding is None else documents.padding
    for begun, empty in zip(documents.starts.tolist(), padding.tolist(), strict=True):
        document, seen = -1, 0
        lengths.append([])
        ordinals.append([])
        last.append([])
        firsts.append([])
        for begin in range(0, len(begun), size):
            if begun[begin]:
                document, seen = document + 1, 0
            tokens = sum(not blank for blank in empty[begin : begin + size])
            lengths[-1].append(tokens)
            ordinals[-1].append(document if tokens else -1)
            firsts[-1].append(seen if tokens else 0)
            seen += tokens
            last[-1].append(seen - 1 if tokens else 0)
    return lengths, ordinals, last, firsts


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("sequence", "size"), [(48, 8), (45, 8), (5, 8), (8, 8), (40, 1), (41, 4)])
def test_chunks_are_those_of_the_loop(sequence: int, size: int, padded: bool) -> None:
    documents = chunked(3, sequence, size, padded=padded)
    chunks = Chunks.of(documents, size)
    lengths, ordinals, last, firsts = by_the_loop(documents, size)
    assert chunks.lengths.tolist() == lengths
    assert chunks.documents.tolist() == ordinals
    assert chunks.last.tolist() == last
    assert chunks.first_positions.tolist() == firsts
    assert (chunks.first, chunks.count) == (0, -(-sequence // size))


def test_a_part_has_the_table_of_the_row_and_its_own_chunks() -> None:
    documents = chunked(2, 60, 8, padded=True)
    whole = Chunks.of(documents, 8)
    for begin, end, first, count in [(0, 60, 0, 8), (16, 40, 2, 3), (40, 60, 5, 3), (56, 60, 7, 1)]:
        part = Chunks.of(documents.part(begin, end), 8)
        for name in ("lengths", "documents", "last"):
            assert torch.equal(getattr(part, name), getattr(whole, name))
        assert (part.first, part.count) == (first, count)
        assert torch.equal(part.at_hand(part.lengths), whole.lengths[:, first : first + count])


def test_a_row_without_tokens_has_empty_chunks() -> None:
    starts = torch.zeros(2, 8, dtype=torch.bool)
    starts[:, 0] = True
    chunks = Chunks.of(Documents.from_starts(starts, torch.tensor([[False] * 8, [True] * 8])), 4)
    assert chunks.lengths.tolist() == [[4, 4], [0, 0]]
    assert chunks.documents.tolist() == [[0, 0], [-1, -1]]


@pytest.mark.parametrize(
    ("starts", "padding", "message"),
    [
        ([1, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0], "row 0: tokens start at slot 3"),
        ([1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0], "row 0: tokens start at slot 2"),
    ],
)
def test_tokens_that_do_not_begin_a_chunk_are_refused(starts, padding, message: str) -> None:
    documents = Documents.from_starts(*(torch.tensor([each], dtype=torch.bool) for each in (starts, padding)))
    with pytest.raises(ValueError, match=message):
        Chunks.of(documents, 4)


@pytest.mark.parametrize(("begin", "end"), [(2, 8), (0, 6)])
def test_a_part_that_cuts_a_chunk_is_refused(begin: int, end: int) -> None:
    with pytest.raises(ValueError, match="no multiples of the chunk size 4"):
        Chunks.of(Documents.unpacked(1, 10).part(begin, end), 4)
