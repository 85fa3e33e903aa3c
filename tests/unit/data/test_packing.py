"""Rows checked token by token: ids say which document and place they come from."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mka_megatron.data.batch import IGNORE, DataError
from mka_megatron.data.corpus import open_corpus
from mka_megatron.data.loader import collate
from mka_megatron.data.packing import Packing, Row
from mka_megatron.memory.chunks import Chunks
from tests.helpers import corpora
from tests.helpers.corpora import STRIDE

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any)
PROPERTY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def pack(path: Path, lengths: list[int], **options: object) -> Packing:
    prefix = corpora.write(path / "x", corpora.numbered(lengths))
    return Packing(open_corpus(prefix, 10**9), **options)  # type: ignore[arg-type]


def epoch(packing: Packing, number: int = 0) -> list[Row]:
    return [packing.row(number * len(packing) + i) for i in range(len(packing))]


def check_row(row: Row, lengths: list[int], chunk: int) -> None:
    """What makes a row right whatever the order: labels, starts and padding follow from the ids."""
    previous = None
    for slot, (token, label, start, padding) in enumerate(
        zip(row.tokens, row.labels, row.starts, row.padding, strict=True)
    ):
        if padding:
            assert (token, label) == (0, IGNORE) and not start
            previous = None
            continue
        document, place = divmod(int(token), STRIDE)
        last = place == lengths[document - 1] - 1
        assert label == (IGNORE if last else token + 1)
        assert start == (slot == 0 or place == 0)
        assert start or previous == token - 1
        assert not start or slot % chunk == 0
        previous = int(token)


@PROPERTY
@given(LENGTHS, st.sampled_from([(4, None), (7, None), (16, None), (64, None), (8, 4), (16, 16), (48, 16)]), st.integers(0, 3))
def test_every_token_once_and_every_label_its_successor(
    tmp_path: Path, lengths: list[int], shape: tuple[int, int | None], seed: int
) -> None:
    sequence, chunk = shape
    packing = pack(tmp_path, lengths, sequence_length=sequence, chunk_size=chunk, seed=seed)
    for number in (0, 1, 5):
        rows = epoch(packing, number)
        for row in rows:
            assert row.tokens.shape == row.labels.shape == row.starts.shape == row.padding.shape == (sequence,)
            check_row(row, lengths, chunk or 1)
        seen = Counter(int(token) for row in rows for token in row.tokens[~row.padding])
        assert seen == Counter(token for document in corpora.numbered(lengths) for token in document)
    padded = sum(-(-length // (chunk or 1)) * (chunk or 1) for length in lengths)
    assert len(packing) == -(-padded // sequence), "no more rows than the slots need"


@PROPERTY
@given(LENGTHS, st.sampled_from([4, 7, 64]))
def test_without_resets_the_row_is_one_document_of_the_stream(tmp_path: Path, lengths: list[int], sequence: int) -> None:
    packing = pack(tmp_path, lengths, sequence_length=sequence, reset_at_documents=False, seed=None)
    stream = [token for document in corpora.numbered(lengths) for token in document]
    for i, row in enumerate(epoch(packing)):
        held = stream[i * sequence : (i + 1) * sequence]
        following = stream[i * sequence + 1 : (i + 1) * sequence + 1]
        assert row.tokens[: len(held)].tolist() == held
        assert row.labels.tolist() == following + [IGNORE] * (sequence - len(following))
        assert row.starts.tolist() == [True] + [False] * (sequence - 1)
        assert row.padding.tolist() == [False] * len(held) + [True] * (sequence - len(held))


@PROPERTY
@given(LENGTHS, st.sampled_from([(8, None), (24, None), (8, 4), (48, 16)]))
def test_whole_documents_are_never_continued(tmp_path: Path, lengths: list[int], shape: tuple[int, int | None]) -> None:
    sequence, chunk = shape
    packing = pack(tmp_path, lengths, sequence_length=sequence, chunk_size=chunk, split_documents=False, seed=1)
    rows = epoch(packing, 2)
    cut = [min(length, sequence) for length in lengths]
    seen = []
    for row in rows:
        check_row(row, cut, chunk or 1)
        assert all(token % STRIDE == 0 for token in row.tokens[row.starts & ~row.padding])
        seen += row.tokens[~row.padding].tolist()
    assert sorted(seen) == sorted(token for document in corpora.numbered(cut) for token in document)


def test_orders_change_with_seed_and_epoch_and_wrap(tmp_path: Path) -> None:
    lengths = [30] * 40
    one, again, other = (
        pack(tmp_path, lengths, sequence_length=16, seed=seed) for seed in (1, 1, 2)
    )
    def tokens(packing: Packing, number: int) -> list[list[int]]:
        return [row.tokens.tolist() for row in epoch(packing, number)]

    assert tokens(one, 0) == tokens(again, 0)
    assert tokens(one, 0) != tokens(other, 0) and tokens(one, 0) != tokens(one, 1)
    assert tokens(one, 0) == tokens(again, 0), "coming back to an epoch gives it again"


def test_documents_and_rows_are_both_shuffled(tmp_path: Path) -> None:
    def content(lengths: list[int], seed: int, number: int) -> list[tuple[int, ...]]:
        packing = pack(tmp_path, lengths, sequence_length=16, seed=seed)
        return [tuple(row.tokens.tolist()) for row in epoch(packing, number)]

    alone = [content([1600], *order) for order in ((1, 0), (1, 1), (2, 0))]
    assert sorted(alone[0]) == sorted(alone[1]) == sorted(alone[2]), "one document: the same rows"
    assert alone[0] != alone[1] and alone[0] != alone[2] and alone[1] != alone[2], "in another order"
    many = [set(content([9] * 60, *order)) for order in ((1, 0), (1, 1), (2, 0))]
    assert many[0] != many[1] and many[0] != many[2] and many[1] != many[2], "other neighbours in a row"


def test_rows_of_a_long_document_are_not_neighbours(tmp_path: Path) -> None:
    rows = epoch(pack(tmp_path, [4000, 4000], sequence_length=16, seed=3))
    follows = [b.tokens[0] == a.tokens[-1] + 1 for a, b in pairwise(rows)]
    assert sum(follows) < 0.05 * len(rows)


def test_loss_mask_reaches_the_labels(tmp_path: Path) -> None:
    documents = corpora.numbered([4, 5])
    prefix = corpora.write(tmp_path / "x", documents)
    corpora.write(tmp_path / "x.loss", [[0, 0, 1, 1], [0, 1, 0, 1, 1]], np.uint8)
    packing = Packing(open_corpus(prefix, 10**9, loss=True), sequence_length=10, split_documents=False, seed=None)
    one, two = STRIDE, 2 * STRIDE
    assert packing.row(0).labels.tolist() == [
        IGNORE, one + 2, one + 3, IGNORE, two + 1, IGNORE, two + 3, two + 4, IGNORE, IGNORE,
    ]


def slots_by_the_loop(mask: list[int], sequence: int, chunk: int) -> list[tuple[int, int]]:
    """(token, its slot behind the document's first) of every token that fits: the chunk is closed where the loss begins."""
    found, slot = [], 0
    for token, counts in enumerate(mask):
        if token and counts and not mask[token - 1]:
            slot = -(-slot // chunk) * chunk
        if slot >= sequence:
            break
        found.append((token, slot))
        slot += 1
    return found


MASKS = st.lists(st.lists(st.integers(0, 1), max_size=30), min_size=1, max_size=10).filter(any)


@PROPERTY
@given(MASKS, st.sampled_from([(8, 4), (16, 4), (48, 16), (12, 1)]), st.sampled_from([None, 1]))
def test_responses_begin_on_chunks(
    tmp_path: Path, masks: list[list[int]], shape: tuple[int, int], seed: int | None
) -> None:
    sequence, chunk = shape
    documents = corpora.numbered([len(mask) for mask in masks])
    prefix = corpora.write(tmp_path / "x", documents)
    corpora.write(tmp_path / "x.loss", masks, np.uint8)
    packing = Packing(
        open_corpus(prefix, 10**9, loss=True), sequence_length=sequence, chunk_size=chunk, split_documents=False,
        seed=seed,
    )  # fmt: skip
    expected, slots, rows = {}, [], 0
    for number, mask in enumerate(masks):
        places = slots_by_the_loop(mask, sequence, chunk)
        expected |= {documents[number][token]: slot for token, slot in places}
        slots.append(-(-(places[-1][1] + 1) // chunk) * chunk if places else 0)
    seen = []
    for row in epoch(packing, 1):
        first, token_before = 0, None
        for slot in np.flatnonzero(~row.padding).tolist():
            token = int(row.tokens[slot])
            number, place = divmod(token, STRIDE)
            if place == 0:
                first = slot
                assert row.starts[slot] and slot % chunk == 0
            else:
                assert token_before == token - 1 and not row.starts[slot]
            assert slot - first == expected[token]
            goes_on = token + 1 in expected and masks[number - 1][place + 1]
            assert row.labels[slot] == (token + 1 if goes_on else IGNORE)
            token_before = token
        assert (row.labels[row.padding] == IGNORE).all() and not row.tokens[row.padding].any()
        batch = collate([row])
        chunks = Chunks.of(batch.documents, chunk)
        assert int(chunks.lengths.sum()) == int((~row.padding).sum())
        seen += row.tokens[~row.padding].tolist()
        rows += 1
    assert sorted(seen) == sorted(expected), "every token that fits, once"
    assert rows <= sum(size > 0 for size in slots) and rows >= -(-sum(slots) // sequence)


def test_a_prompt_that_ends_with_its_chunk_is_not_padded(tmp_path: Path) -> None:
    documents = corpora.numbered([6, 6, 9])
    prefix = corpora.write(tmp_path / "x", documents)
    masks = [[0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0, 1, 1, 1]]
    corpora.write(tmp_path / "x.loss", masks, np.uint8)
    packing = Packing(
        open_corpus(prefix, 10**9, loss=True), sequence_length=16, chunk_size=4, split_documents=False, seed=None
    )
    one, two, three = ((number + 1) * STRIDE for number in range(3))
    first, second = epoch(packing)
    assert first.tokens.tolist() == [
        *range(one, one + 6), 0, 0, two, two + 1, 0, 0, two + 2, two + 3, two + 4, two + 5,
    ]  # fmt: skip
    assert first.labels[:6].tolist() == [IGNORE, IGNORE, IGNORE, one + 4, one + 5, IGNORE]
    assert first.labels[8:10].tolist() == [IGNORE, two + 2], "the prompt's last token predicts the response"
    # a later turn closes the chunk too: tokens 0 | 1..5 | 6..8
    assert second.tokens.tolist() == [
        three, 0, 0, 0, *range(three + 1, three + 6), 0, 0, 0, three + 6, three + 7, three + 8, 0,
    ]  # fmt: skip
    assert second.starts.tolist() == [True] + [False] * 15


def test_prompts_count_without_moving_a_token(tmp_path: Path) -> None:
    documents = corpora.numbered([6, 6])
    prefix = corpora.write(tmp_path / "x", documents)
    corpora.write(tmp_path / "x.loss", [[0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1]], np.uint8)
    corpus = open_corpus(prefix, 10**9, loss=True)
    one, two = STRIDE, 2 * STRIDE
    rows = [
        Packing(corpus, sequence_length=16, chunk_size=4, split_documents=False, count_prompts=count, seed=None).row(0)
        for count in (True, False)
    ]
    assert rows[0].labels.tolist() == [
        *range(one + 1, one + 6), IGNORE, IGNORE, IGNORE, two + 1, two + 2, IGNORE, IGNORE, *range(two + 3, two + 6), IGNORE,
    ]  # fmt: skip
    for name in ("tokens", "starts", "padding"):
        assert np.array_equal(getattr(rows[0], name), getattr(rows[1], name))


def test_without_chunks_nothing_lies_between_prompt_and_response(tmp_path: Path) -> None:
    documents = corpora.numbered([6])
    prefix = corpora.write(tmp_path / "x", documents)
    corpora.write(tmp_path / "x.loss", [[0, 0, 1, 1, 1, 1]], np.uint8)
    corpus = open_corpus(prefix, 10**9, loss=True)
    row = Packing(corpus, sequence_length=8, split_documents=False, seed=None).row(0)
    assert row.tokens.tolist() == [*documents[0], 0, 0]


def test_a_row_reads_only_what_it_holds(tmp_path: Path) -> None:
    """Random access: a row in the middle of a large document does not read the document."""
    packing = pack(tmp_path, [9000], sequence_length=8, seed=None)
    read = []
    corpus = packing._corpus
    inner = type(corpus).read
    def spy(self: object, document: int, begin: int, end: int) -> np.ndarray:
        read.append(end - begin)
        return inner(corpus, document, begin, end)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(corpus), "read", spy)
        packing.row(500)
    assert sum(read) == 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": 0}, "data.sequence_length: 0"),
        ({"sequence_length": 100, "chunk_size": 16}, "round it to 96"),
        ({"sequence_length": 32, "chunk_size": 16, "reset_at_documents": False}, "reset_at_documents"),
    ],
)
def test_impossible_options_are_refused(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        pack(tmp_path, [5], **options)


def test_no_tokens_are_refused(tmp_path: Path) -> None:
    corpus = open_corpus(corpora.write(tmp_path / "x", [[1], []]), 10)
    with pytest.raises(DataError, match="no tokens"):
        Packing(corpus.select(np.array([False, True])), sequence_length=4)
