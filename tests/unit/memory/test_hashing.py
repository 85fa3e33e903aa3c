from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mka_megatron.memory import hashing
from mka_megatron.memory.chunks import Chunks
from mka_megatron.memory.documents import Documents
from mka_megatron.memory.hashing import Selector, chunk_means, last_queries, recall_at, recent
from tests.helpers.layouts import chunked
from tests.helpers.numerics import assert_bitwise, assert_same, assert_same_gradients

B, H, G, D, C = 2, 4, 2, 16, 8
SELECTORS = {
    "hash": Selector("hash", 3, hashing.planes(0, 1, 64, D)),
    "tables": Selector("hash", 3, hashing.planes(1, 2, 128, D), torch.linspace(-1, 1, G * D).view(G, D)),
    "exact": Selector("exact", 3, key_bias=torch.ones(G, D)),
}


def inputs(slots: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(B, slots, H, D), torch.randn(B, slots, G, D)


def select(selector: Selector, q: Tensor, k: Tensor, where: Documents, window: int = 1, size: int = C) -> Tensor:
    chunks = Chunks.of(where, size)
    fixed = selector.queries(q, k.shape[2])
    return selector.select(
        recent(fixed, None, where, chunks), selector.signature(k, chunks), chunks, window
    )


def test_planes_are_the_same_everywhere() -> None:
    drawn = hashing.planes(7, 2, 128, 33)
    assert drawn.shape == (2, 128, 33) and drawn.dtype == torch.int8
    assert set(drawn.unique().tolist()) == {-1, 1}
    assert abs(int(drawn.sum())) < 4 * drawn.numel() ** 0.5, "as many on either side, by four standard deviations"
    digest = hashlib.sha256(drawn.numpy().tobytes()).hexdigest()
    assert digest.startswith("e3288dc248efadc8"), "saved planes and codes of earlier runs would no longer match"
    assert not torch.equal(drawn, hashing.planes(8, 2, 128, 33))


@pytest.mark.parametrize(("bits", "tables"), [(0, 1), (63, 1), (100, 1), (64, 0)])
def test_planes_that_make_no_words_are_refused(bits: int, tables: int) -> None:
    with pytest.raises(ValueError, match=r"64|positive"):
        hashing.planes(0, tables, bits, 8)


def test_hash_selection_without_planes_is_refused() -> None:
    q, k = inputs(16)
    with pytest.raises(ValueError, match="planes"):
        select(Selector("hash", 1), q, k, Documents.unpacked(B, 16))


def test_queries_are_summed_over_the_heads_of_a_group() -> None:
    q, _ = inputs(5)
    found = SELECTORS["hash"].queries(q, G)
    for group in range(G):
        heads = (q[:, :, 2 * group : 2 * group + 2].double() * 2.0**16).round()
        assert_bitwise(found[:, :, group], heads.sum(dim=2))


def tokens_of(where: Documents, row: int) -> list[tuple[int, int]]:
    """(slot, document) of the row's tokens."""
    document, found = -1, []
    for slot in range(where.starts.shape[1]):
        document += int(where.starts[row, slot])
        if where.padding is None or not bool(where.padding[row, slot]):
            found.append((slot, document))
    return found


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("slots", "size"), [(60, 8), (61, 4), (40, 32), (7, 8), (30, 2)])
def test_a_chunk_selects_by_the_last_16_queries_of_its_document_before_it(
    slots: int, size: int, padded: bool
) -> None:
    """Over several chunks closed early, fewer where the document is shorter, none of another document."""
    where = chunked(B, slots, size, seed=slots, padded=padded)
    fixed = torch.randint(-(2**33), 2**33, (B, slots, G, D)).double()
    chunks = Chunks.of(where, size)
    found = recent(fixed, None, where, chunks)
    for row in range(B):
        tokens = tokens_of(where, row)
        for chunk in range(chunks.count):
            own = [document for slot, document in tokens if slot // size == chunk]
            before = [slot for slot, document in tokens if own and document == own[0] and slot < chunk * size]
            assert_bitwise(found[row, chunk], fixed[row, before[-16:]].sum(dim=0))
    last = last_queries(fixed, where)
    for row in range(B):
        slots_ = [slot for slot, _ in tokens_of(where, row)][-16:]
        assert_bitwise(last[row, 16 - len(slots_) :], fixed[row, slots_])
        assert not bool(last[row, : 16 - len(slots_)].any())


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("window", [1, 3])
def test_what_is_selected_lies_in_the_document_before_the_window(name: str, window: int) -> None:
    where = chunked(B, 160, C, padded=True)
    q, k = inputs(160)
    found = select(SELECTORS[name], q, k, where, window)
    chunks = Chunks.of(where, C)
    documents = chunks.documents.tolist()
    some = 0
    for row, chunk, group in torch.cartesian_prod(*map(torch.arange, (B, chunks.count, G))).tolist():
        candidates = [
            n for n in range(chunk - window + 1) if documents[row][n] == documents[row][chunk] != -1
        ]
        chosen = [n for n in found[row, chunk, group].tolist() if n >= 0]
        assert found[row, chunk, group].tolist() == sorted(chosen) + [-1] * (3 - len(chosen))
        assert set(chosen) <= set(candidates) and len(set(chosen)) == min(3, len(candidates))
        some += len(candidates) > 3
    assert some


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("window", [1, 2])
def test_no_token_from_a_chunk_on_changes_what_the_chunk_selects(name: str, window: int) -> None:
    where = Documents.unpacked(B, 100)
    q, k = inputs(100)
    before = select(SELECTORS[name], q, k, where, window)
    for time in (1, 7, 8, 9, 24, 40, 41, 47, 63, 88, 99):
        changed_q, changed_k = q.clone(), k.clone()
        changed_q[:, time:], changed_k[:, time:] = 5 * torch.randn(2, 1).view(2, 1, 1, 1), float("nan")
        after = select(SELECTORS[name], changed_q, changed_k, where, window)
        assert_bitwise(after[:, : time // C + 1], before[:, : time // C + 1])
        fewer = Documents.unpacked(B, time)
        assert_bitwise(
            select(SELECTORS[name], q[:, :time], k[:, :time], fewer, window), before[:, : -(-time // C)]
        )


@pytest.mark.parametrize("name", SELECTORS)
def test_no_other_document_changes_what_a_chunk_selects(name: str) -> None:
    where = chunked(B, 160, C, padded=True)
    q, k = inputs(160)
    before = select(SELECTORS[name], q, k, where)
    for row, begin, end in where.spans:
        changed_q, changed_k = torch.full_like(q, float("nan")), torch.full_like(k, -3.0)
        tokens = [s for s in range(begin, end) if where.padding is None or not where.padding[row, s]]
        changed_q[row, tokens], changed_k[row, tokens] = q[row, tokens], k[row, tokens]
        after = select(SELECTORS[name], changed_q, changed_k, where)
        assert_bitwise(after[row, begin // C : -(-end // C)], before[row, begin // C : -(-end // C)])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", SELECTORS)
def test_parts_of_the_rows_select_as_the_rows_do(name: str, padded: bool) -> None:
    where = chunked(B, 160, C, seed=3, padded=padded)
    selector = SELECTORS[name]
    q, k = inputs(160)
    expected = select(selector, q, k, where, window=2)
    found, signatures, before = [], [], None
    for begin, end in [(0, 48), (48, 88), (88, 160)]:
        part = where.part(begin, end)
        chunks = Chunks.of(part, C)
        fixed = selector.queries(q[:, begin:end], G)
        signatures.append(selector.signature(k[:, begin:end], chunks))
        found.append(
            selector.select(recent(fixed, before, part, chunks), torch.cat(signatures, dim=1), chunks, 2)
        )
        before = last_queries(fixed, part)
        assert bool(((~part.padding).sum(dim=1) if part.padding is not None else torch.tensor(end - begin)).min() > 16)
    assert_bitwise(torch.cat(found, dim=1), expected)


def test_heads_select_for_themselves() -> None:
    """So a tensor-parallel rank selects for its heads what one rank selects for all."""
    where = Documents.unpacked(B, 100)
    q, k = inputs(100)
    for selector in SELECTORS.values():
        both = select(selector, q, k, where)
        for group in range(G):
            bias = None if selector.key_bias is None else selector.key_bias[group : group + 1]
            alone = replace(selector, key_bias=bias)
            own_q, own_k = q[:, :, 2 * group : 2 * group + 2], k[:, :, group : group + 1]
            assert_bitwise(select(alone, own_q, own_k, where), both[:, :, group : group + 1])


def test_numbers_that_are_none_select_something_without_harm() -> None:
    where = Documents.unpacked(1, 80)
    q, k = torch.randn(1, 80, H, D), torch.randn(1, 80, G, D)
    q[0, 5], k[0, 9], k[0, 20] = float("nan"), float("inf"), -1e38
    for selector in SELECTORS.values():
        found = select(selector, q, k, where)
        assert bool(((found[:, 4:] >= 0) & (found[:, 4:] < torch.arange(4, 10)[:, None, None])).all())


def test_a_large_shared_bias_collapses_the_codes_unless_it_is_removed() -> None:
    torch.manual_seed(0)
    k, bias = torch.randn(1, 256 * C, 1, 64), 40 * torch.randn(1, 64)
    chunks = Chunks.of(Documents.unpacked(1, 256 * C), C)
    drawn = hashing.planes(0, 1, 64, 64)

    def distinct(keys: Tensor, key_bias: Tensor | None) -> int:
        return len(Selector("hash", 1, drawn, key_bias).signature(keys, chunks).flatten().unique())

    assert distinct(k, None) == 256
    assert distinct(k + bias, None) < 256 / 8
    assert distinct(k + bias, bias) == 256


def clustered(seed: int) -> tuple[Tensor, Tensor, Documents]:
    """Rows whose chunks have keys around one of many centres, and queries near the centre of some earlier chunk."""
    generator = torch.Generator().manual_seed(seed)
    chunks, size, channels = 96, 16, 32
    centres = torch.randn(1, chunks, 1, channels, generator=generator)
    noise = torch.randn(1, chunks * size, 1, channels, generator=generator)
    wanted = torch.randint(0, chunks, (chunks,), generator=generator) % torch.arange(1, chunks + 1)
    k = centres.repeat_interleave(size, dim=1) + noise
    q = centres[:, wanted].repeat_interleave(size, dim=1) + 0.5 * noise.flip(1)
    return q, k, Documents.unpacked(1, chunks * size)


def test_longer_codes_recall_more() -> None:
    shares = []
    for bits, tables in [(64, 1), (256, 1), (1024, 1)]:
        total = 0.0
        for seed in range(3):
            q, k, where = clustered(seed)
            exact = select(Selector("exact", 8), q, k, where, size=16)
            hashed = select(Selector("hash", 8, hashing.planes(seed, tables, bits, 32)), q, k, where, size=16)
            total += recall_at(hashed, exact) / 3
        shares.append(total)
    # eight of on average half of 96 chunks, drawn blindly
    assert 0.35 < shares[0] < shares[1] < shares[2]


def test_recall_counts_what_was_wanted() -> None:
    wanted = torch.tensor([[1, 2, 5], [4, -1, -1]])
    assert recall_at(wanted, wanted) == 1
    assert recall_at(torch.tensor([[5, 7, -1], [3, -1, -1]]), wanted) == 1 / 4
    assert recall_at(torch.tensor([[-1]]), torch.tensor([[-1]])) == 1


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("slots", "size"), [(60, 8), (59, 8), (21, 5), (9, 1), (3, 8)])
def test_chunk_means_are_means(slots: int, size: int, padded: bool) -> None:
    where = chunked(B, slots, size, padded=padded)
    chunks = Chunks.of(where, size)
    x = torch.randn(B, slots, G, D, dtype=torch.float64, requires_grad=True)
    rows = []
    for row in range(B):
        slots_of = [[s for s, _ in tokens_of(where, row) if s // size == n] for n in range(chunks.count)]
        rows.append(torch.stack([x[row, s].mean(dim=0) if s else 0 * x[row, 0] for s in slots_of]))
    exact = torch.stack(rows)
    found = chunk_means(x, chunks)
    assert_same(found, exact, terms=size)
    assert_same_gradients(found, exact, [x], terms=size)
    if where.padding is not None:
        poisoned = x.detach().masked_fill(where.padding[..., None, None], float("nan"))
        assert_bitwise(chunk_means(poisoned, chunks), found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_chunk_has_the_same_mean_wherever_it_lies(dtype: torch.dtype) -> None:
    x = torch.randn(B, 17 * C, G, D).to(dtype).requires_grad_()
    whole = chunk_means(x, Chunks.of(Documents.unpacked(B, 17 * C), C))
    assert whole.dtype == dtype
    for chunk in range(17):
        one = chunk_means(x[:, chunk * C : (chunk + 1) * C], Chunks.of(Documents.unpacked(B, C), C))
        assert_bitwise(one[:, 0], whole[:, chunk])
    (grad,) = torch.autograd.grad(whole.float().sum(), x)
    assert_bitwise(grad, torch.full_like(grad, 1 / C))
