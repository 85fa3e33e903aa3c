"""The recall's parts against plain Python integers and loops: every result is exact, so they are compared bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mka_megatron.ops import recall
from tests.helpers.numerics import assert_bitwise

WORDS = st.integers(-(2**63), 2**63 - 1)


def choice(options: Sequence[int]) -> int:
    return options[int(torch.randint(len(options), ()))]


def exact_fixed(value: float) -> int:
    """round(value * 2^16) with halves to even, by fractions."""
    clamped = max(-Fraction(recall.RANGE), min(Fraction(recall.RANGE), Fraction(value)))
    return round(clamped * 2**recall.FRACTION_BITS)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=20))
def test_fixed_point_is_the_nearest_integer(values: list[float]) -> None:
    found = recall.fixed_point(torch.tensor(values, dtype=torch.float32))
    assert found.dtype == torch.float64
    assert found.tolist() == [exact_fixed(value) for value in values]


def test_what_is_no_number_or_out_of_range_becomes_one_in_range() -> None:
    inf, nan = float("inf"), float("nan")
    found = recall.fixed_point(torch.tensor([nan, inf, -inf, 1e30, -(2.0**15), 2.0**-17, 3 * 2.0**-17]))
    assert found.tolist() == [0, 2**31, -(2**31), 2**31, -(2**31), 0, 2]
    for dtype in (torch.float16, torch.bfloat16):
        assert recall.fixed_point(torch.tensor([1.5, nan], dtype=dtype)).tolist() == [1.5 * 2**16, 0]


def test_sums_do_not_depend_on_the_order_of_the_tokens() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 256, 2, 8) * 10.0 ** torch.randint(-4, 5, (1, 256, 2, 8))
    lengths = torch.tensor([[256]])
    expected = [[sum(exact_fixed(v) for v in x[0, :, g, c].tolist()) for c in range(8)] for g in range(2)]
    for _ in range(5):
        found = recall.chunk_sums(x[:, torch.randperm(256)], lengths, 256)
        assert found[0, 0].tolist() == expected


def test_the_largest_sums_are_exact() -> None:
    """2^22 numbers at the edge of the range, and one of the smallest."""
    edge = recall.fixed_point(torch.tensor([recall.RANGE]))
    total = edge * (2**22 - 1) + recall.fixed_point(torch.tensor([2.0**-recall.FRACTION_BITS]))
    assert int(total) == 2**31 * (2**22 - 1) + 1 < 2**53


@pytest.mark.parametrize("size", [1, 4, 5])
def test_chunk_sums_leave_padding_and_the_centre_out(size: int) -> None:
    torch.manual_seed(0)
    x, centre = torch.randn(2, 18, 2, 3), torch.randn(2, 3)
    chunks = -(-18 // size)
    lengths = torch.randint(0, size + 1, (2, chunks))
    lengths[:, -1] = lengths[:, -1].clamp_max(18 - (chunks - 1) * size)
    for row in range(2):
        for chunk in range(chunks):
            x[row, chunk * size + int(lengths[row, chunk]) : (chunk + 1) * size] = float("nan")
    found = recall.chunk_sums(x, lengths, size, centre)
    for row in range(2):
        for chunk in range(chunks):
            slots = range(chunk * size, chunk * size + int(lengths[row, chunk]))
            for group in range(2):
                for channel in range(3):
                    offset = exact_fixed(centre[group, channel].item())
                    exact = sum(exact_fixed(x[row, s, group, channel].item()) - offset for s in slots)
                    assert int(found[row, chunk, group, channel]) == exact


@pytest.mark.parametrize(("tables", "bits"), [(1, 64), (2, 64), (1, 128), (3, 192)])
def test_codes_are_those_of_plain_integers(tables: int, bits: int) -> None:
    torch.manual_seed(0)
    planes = 2 * torch.randint(0, 2, (tables, bits, 5), dtype=torch.int8) - 1
    sums = torch.randint(-(2**40), 2**40, (3, 2, 5)).double()
    sums[0, 0] = 0
    codes = recall.sign_codes(sums, planes)
    assert codes.shape == (3, 2, tables * bits // 64) and codes.dtype == torch.int64
    for vector, words in zip(sums.flatten(0, 1).tolist(), codes.flatten(0, 1).tolist(), strict=True):
        number = 0
        for place, plane in enumerate(planes.flatten(0, 1).tolist()):
            number |= int(sum(int(a) * b for a, b in zip(vector, plane, strict=True)) >= 0) << place
        assert [word % 2**64 for word in words] == [
            number >> 64 * place & (2**64 - 1) for place in range(len(words))
        ]


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=9))
def test_hamming_distance_counts_the_bits(pairs: list[tuple[int, int]]) -> None:
    one, other = torch.tensor(pairs).unbind(1)
    assert recall.hamming(one, other).tolist() == [bin((a ^ b) % 2**64).count("1") for a, b in pairs]


def distances(query: Tensor, code: Tensor, tables: int) -> int:
    bits = [bin((a ^ b) % 2**64).count("1") for a, b in zip(query.tolist(), code.tolist(), strict=True)]
    words = len(bits) // tables
    return min(sum(bits[table * words : (table + 1) * words]) for table in range(tables))


def allowed(among: recall.Candidates, row: int, chunk: int) -> list[int]:
    document = among.documents[row].tolist()
    own = among.first + chunk
    return [
        number for number in range(own - among.window + 1) if document[number] == document[own] != -1
    ]


def table(seed: int, batch: int, chunks: int) -> Tensor:
    """Documents of a few chunks, some of them empty."""
    generator = torch.Generator().manual_seed(seed)
    documents = (torch.rand(batch, chunks, generator=generator) < 0.15).long().cumsum(dim=1)
    return documents.masked_fill(torch.rand(batch, chunks, generator=generator) < 0.2, -1)


@pytest.mark.parametrize("seed", range(12))
def test_the_nearest_codes_are_those_of_the_loop(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(seed)
    chunks, tables, words = choice([1, 2, 13, 30]), choice([1, 2, 3]), choice([1, 2])
    first = choice(range(chunks))
    among = recall.Candidates(
        table(seed, 2, chunks), first, choice(range(1, chunks - first + 1)), choice([1, 1, 2, 5])
    )
    recalled = choice([1, 2, 4, 40])
    monkeypatch.setattr("mka_megatron.ops.recall.reference._BLOCK", choice([1, 300, 1 << 22]))
    # few distinct codes, so that there are ties
    pool = torch.randint(-(2**63), 2**63 - 1, (3, tables * words))
    codes = pool[torch.randint(3, (2, first + among.count, 2))]
    queries = pool[torch.randint(3, (2, among.count, 2))]
    found = recall.nearest_codes(queries, codes, among, tables, recalled)
    assert found.shape == (2, among.count, 2, recalled)
    for row, chunk, group in torch.cartesian_prod(*map(torch.arange, (2, among.count, 2))).tolist():
        order = sorted(
            allowed(among, row, chunk),
            key=lambda n: (distances(queries[row, chunk, group], codes[row, n, group], tables), n),
        )
        best = sorted(order[:recalled])
        assert found[row, chunk, group].tolist() == best + [-1] * (recalled - len(best))


@pytest.mark.parametrize("seed", range(8))
def test_the_largest_products_are_those_of_exact_fractions(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(seed)
    chunks, recalled = choice([1, 2, 13, 25]), choice([1, 3, 30])
    first = choice(range(chunks))
    among = recall.Candidates(
        table(seed, 1, chunks), first, choice(range(1, chunks - first + 1)), choice([1, 2])
    )
    monkeypatch.setattr("mka_megatron.ops.recall.reference._BLOCK", choice([1, 300, 1 << 22]))
    lengths = torch.randint(1, 128, (1, first + among.count))
    sums = torch.randint(-5, 6, (1, first + among.count, 2, 6)).double() * 2.0**30
    means = recall.centred_means(sums, lengths)
    queries = torch.randint(-3, 4, (1, among.count, 2, 6)).double() * 2.0**33
    found = recall.largest_products(queries, means, among, recalled)
    for chunk in range(among.count):
        for group in range(2):
            def product(number: int, chunk: int = chunk, group: int = group) -> Fraction:
                pairs = zip(queries[0, chunk, group].tolist(), means[0, number, group].tolist(), strict=True)
                return sum((Fraction(q) * Fraction(k) for q, k in pairs), Fraction())

            best = sorted(sorted(allowed(among, 0, chunk), key=lambda n: (-product(n), n))[:recalled])
            assert found[0, chunk, group].tolist() == best + [-1] * (recalled - len(best))


def test_centred_means_are_rounded_means_and_their_products_do_not_round() -> None:
    torch.manual_seed(0)
    sums = torch.randint(-(2**38), 2**38, (1, 40, 1, 256)).double()
    lengths = torch.randint(1, 129, (1, 40))
    means = recall.centred_means(sums, lengths)
    largest = (sums / lengths[..., None, None]).abs().amax(dim=-1, keepdim=True)
    assert bool(((means - sums / lengths[..., None, None]).abs() <= largest * 2.0**-22).all())
    assert not bool(recall.centred_means(sums, torch.zeros_like(lengths)).isnan().any())
    query = means[0, 0, 0]
    for other in means[0, :, 0]:
        exact = sum((Fraction(a) * Fraction(b) for a, b in zip(query.tolist(), other.tolist(), strict=True)), Fraction())
        assert Fraction((query * other).sum().item()) == exact


@pytest.mark.parametrize("with_before", [False, True])
@pytest.mark.parametrize(("size", "slots"), [(4, 40), (4, 38), (32, 70), (1, 30), (8, 8)])
def test_recent_sums_are_those_of_the_loop(size: int, slots: int, with_before: bool) -> None:
    torch.manual_seed(size + slots)
    chunks, queries = -(-slots // size), 16
    fixed = torch.randint(-(2**33), 2**33, (3, slots, 2, 3)).double()
    lengths = torch.randint(0, size + 1, (3, chunks))
    lengths[0] = size
    lengths[:, -1] = lengths[:, -1].clamp_max(slots - (chunks - 1) * size)
    before = torch.randint(-(2**33), 2**33, (3, queries, 2, 3)).double() if with_before else None
    earlier = list(range(-queries, 0)) if with_before else []
    counts = torch.zeros_like(lengths)
    expected = torch.zeros(3, chunks, 2, 3, dtype=torch.float64)
    for row in range(3):
        tokens = list(earlier)
        for chunk in range(chunks):
            counts[row, chunk] = torch.randint(0, len(tokens) + 1, ())
            for token in tokens[len(tokens) - min(queries, int(counts[row, chunk])) :]:
                expected[row, chunk] += fixed[row, token] if token >= 0 else before[row, queries + token]
            tokens += range(chunk * size, chunk * size + int(lengths[row, chunk]))
    found = recall.recent_sums(fixed, before, lengths, counts, size, queries)
    assert_bitwise(found, expected)
