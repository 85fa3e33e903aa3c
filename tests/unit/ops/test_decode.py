"""The decode, token by token, against the block core over whole rows, and dense against PyTorch's attention."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mka_megatron.attention.blockmka import block_core
from mka_megatron.attention.fastmka import l2_summary
from mka_megatron.attention.inputs import Finish
from mka_megatron.config.schema import Config, L1Config, L2Config, L3Config, MemoryConfig
from mka_megatron.memory.hashing import SELECTING_QUERIES, Selector, planes
from mka_megatron.memory.view import NO_MEMORY, Memory
from mka_megatron.ops import decode
from mka_megatron.ops.decode import Cache, Hashing
from mka_megatron.ops.route_fuse.reference import fuse as fuse_levels
from tests.helpers.decode_rows import F64, ROWS, SCALE, Rows, generate, new_cache, norm
from tests.helpers.numerics import assert_bitwise, assert_same


def whole(rows: Rows, config: Config, hashing: Hashing | None, bias: bool) -> tuple[Tensor, Tensor | None]:
    selector = None
    if hashing is not None:
        selector = Selector("hash", config.memory_hierarchy.l3.recalled_chunks, hashing.planes, hashing.key_bias)
    levels = [0] + [1] * config.memory_hierarchy.l2.enabled + [2] * config.memory_hierarchy.l3.enabled
    logits = rows.logits[..., levels] if bias and len(levels) > 1 else None
    out, _, update = block_core(
        rows.q, rows.k, rows.v, Finish(norm, norm, rows.rotate), logits, rows.documents, SCALE, config,
        Memory(chunks=rows.chunks, selector=selector),
    )  # fmt: skip
    return out, update.recalled


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("l2, l3", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("window", [1, 2, 3, 20])
@pytest.mark.parametrize("heads, groups, channels", [(2, 2, 8), (8, 2, 64), (7, 1, 128)])
def test_token_by_token_is_the_block_core_over_the_row(
    heads: int, groups: int, channels: int, window: int, l2: bool, l3: bool, bias: bool
) -> None:
    rows = Rows(ROWS, 4, heads, groups, channels)
    hashing = None
    if l3:
        hashing = Hashing(planes(1, 2, 64, channels), torch.randn(groups, channels, dtype=F64))
    memory = MemoryConfig(
        l1=L1Config(window=window * 4, chunk_size=4), l2=L2Config(enabled=l2),
        l3=L3Config(enabled=l3, recalled_chunks=2, hash_tables=2),
    )  # fmt: skip
    exact, chosen = whole(rows, Config(memory_hierarchy=memory), hashing, bias)
    found, recalled = generate(rows, new_cache(rows, l2, hashing, 2), hashing, window * 4, bias and (l2 or l3))
    assert_same(found, exact, terms=64 * channels)
    if chosen is not None:
        full = (rows.chunks.lengths > 0)[..., None, None]
        assert_bitwise(recalled, chosen.masked_fill(~full, -1))
        assert window == 20 or bool((recalled >= 0).any())


def test_chunks_of_128_without_recall_of_everything() -> None:
    """The shape of the kernels: C = 128, a group of 7."""
    rows = Rows([[128, 128, 60, 128, 128, 5], [128] * 3], 128, 7, 1, 64)
    hashing = Hashing(planes(1, 1, 64, 64), None)
    memory = MemoryConfig(
        l1=L1Config(window=128, chunk_size=128), l2=L2Config(enabled=True), l3=L3Config(enabled=True, recalled_chunks=1)
    )
    exact, chosen = whole(rows, Config(memory_hierarchy=memory), hashing, True)
    found, recalled = generate(rows, new_cache(rows, True, hashing, 1), hashing, 128, True)
    assert_same(found, exact, terms=640 * 64)
    assert chosen is not None
    assert_bitwise(recalled, chosen.masked_fill(~(rows.chunks.lengths > 0)[..., None, None], -1))


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_a_window_over_everything_is_dense_causal_attention(dtype: torch.dtype) -> None:
    rows = Rows([[4] * 6 + [3]], 4, 8, 2, 16)
    cache = new_cache(rows, False, None, 0, dtype)
    rows.q, rows.k, rows.v = (x.to(dtype) for x in (rows.q, rows.k, rows.v))
    rows.cos, rows.sin = rows.cos.to(dtype), rows.sin.to(dtype)
    found, _ = generate(rows, cache, None, 64, False)
    q, k, v = (x[:, :27].double().transpose(1, 2) for x in (
        rows.rotate(norm(rows.q), None), rows.rotate(norm(rows.k), None), rows.v))  # fmt: skip
    exact = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=SCALE, enable_gqa=True
    ).transpose(1, 2)
    assert_same(found[:, :27], exact, terms=32 * 16)


def test_minus_infinity_hides_summaries_and_recalled_chunks() -> None:
    rows = Rows([[4] * 6], 4, 4, 2, 8)
    hashing = Hashing(planes(1, 1, 64, 8), None)
    rows.logits[..., 1:] = float("-inf")
    rows.logits[..., 0] = 0
    hidden, _ = generate(rows, new_cache(rows, True, hashing, 2), hashing, 8, True)
    alone, _ = generate(rows, new_cache(rows, False, None, 0), None, 8, False)
    assert_same(hidden, alone, terms=64)


def test_a_chunk_without_a_page_is_not_recalled_and_keeps_its_summary() -> None:
    rows = Rows([[4] * 6], 4, 2, 1, 8)
    hashing = Hashing(planes(1, 1, 64, 8), None)
    cache = new_cache(rows, True, hashing, 5)
    generate(rows, cache, hashing, 4, True)
    cache.chunk.fill_(5)
    cache.lengths[0, 5] = 4
    assert cache.recalled is not None
    cache.recalled[0, 0] = torch.tensor([0, 1, 2, 3, 4])
    q = torch.randn(1, 2, 8, dtype=F64)
    kept = cache.table.clone()
    some = replace(cache, recalled=torch.tensor([[[0, 2, 4, -1, -1]]], dtype=torch.int32))
    exact = decode.attend(some, q, None, window=4, scale=SCALE)
    cache.table[0, 0, [1, 3]] = -1
    assert_same(decode.attend(cache, q, None, window=4, scale=SCALE), exact, terms=64)
    cache.table.copy_(kept)
    different = decode.attend(cache, q, None, window=4, scale=SCALE)
    assert not torch.allclose(different, exact)


def test_close_does_nothing_between_and_once_on_empty_chunks() -> None:
    rows = Rows([[3]], 4, 2, 1, 8)
    cache = new_cache(rows, True, None, 0)
    generate(rows, cache, None, 8, False)
    assert int(cache.chunk) == 1
    force = torch.tensor([True])
    decode.close(cache, rows.cos[:, 0], rows.sin[:, 0], None, window=8, force=force)
    decode.close(cache, rows.cos[:, 0], rows.sin[:, 0], None, window=8)
    assert int(cache.chunk) == 1 and int(cache.position) == 3


def test_a_full_chunk_takes_no_token() -> None:
    rows = Rows([[4]], 4, 2, 1, 8)
    cache = new_cache(rows, True, None, 0)
    x, token = torch.randn(1, 2, 8, dtype=F64), torch.randn(1, 1, 8, dtype=F64)
    for _ in range(6):
        decode.append(cache, x, token, token, token)
    assert int(cache.position) == 4 and int(cache.lengths[0, 0]) == 4
    assert cache.sum_v is not None
    assert_same(cache.sum_v, 4 * token, terms=4)


@pytest.mark.parametrize("which", ["kv", "k", "v"])
@pytest.mark.parametrize("l3", [False, True])
def test_fusing_token_by_token_is_fusing_the_row(which: str, l3: bool) -> None:
    rows = Rows(ROWS, 4, 4, 2, 8)
    decays = {name: torch.rand(2, 8, dtype=F64) if name in which else None for name in "kv"}
    shares = torch.rand(*rows.k.shape[:2], 2, 1 + l3, dtype=F64)
    memory = {name: torch.randn_like(rows.k) if l3 else None for name in "kv"}
    cache = Cache.empty(3, 2, 8, chunks=12, size=4, pages=72, dtype=F64, ema=True)
    cache.table.copy_(torch.arange(72).view(3, 2, 12))
    found = {name: torch.zeros_like(rows.k) for name in "kv"}
    tokens = rows.tokens()
    batch = torch.arange(3)
    for step in range(max(map(len, tokens))):
        here = torch.tensor([step < len(row) for row in tokens])
        cache.chunk[~here] = -1
        at, last = (torch.tensor(x) for x in zip(*(row[min(step, len(row) - 1)] for row in tokens), strict=True))
        now = (batch, at)
        l3_now = tuple(None if memory[n] is None or decays[n] is None else memory[n][now] for n in "kv")
        given = shares[now] if any(x is not None for x in l3_now) else shares[now][..., :1]
        pair = decode.fuse(cache, rows.k[now], rows.v[now], given, decays["k"], decays["v"], l3_now)
        for name, x in zip("kv", pair, strict=True):
            found[name][batch[here], at[here]] = x[here]
        decode.append(cache, rows.q[now], rows.k[now], rows.k[now], rows.v[now])
        decode.close(cache, rows.cos[now], rows.sin[now], None, window=4, force=last)
    assert rows.documents.padding is not None
    tokens_only = (~rows.documents.padding)[..., None, None]
    for name, x, state in (("k", rows.k, cache.ema_k), ("v", rows.v, cache.ema_v)):
        exact = x
        if decays[name] is not None:
            levels, carry = l2_summary(x, decays[name], rows.documents, NO_MEMORY.view, name)
            both = [levels] if memory[name] is None else [levels, memory[name]]
            # level 1's own share is what the others leave
            weights = torch.cat((torch.zeros_like(shares[..., :1]), shares), dim=-1)
            exact = fuse_levels(x, weights, torch.ones(1, dtype=F64), *both)
            assert state is not None and carry is not None
            assert_same(state, carry, terms=64)
        assert_same(found[name] * tokens_only, exact * tokens_only, terms=64)


def test_the_tail_is_as_long_as_the_memory_says() -> None:
    assert decode.cache.SELECTING_QUERIES == SELECTING_QUERIES


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"window": 6}, "window is 6: give a multiple of the chunk size 4."),
        ({"q": torch.zeros(1, 3, 8)}, "q has shape .* over 2 KV heads"),
        ({"bias": torch.zeros(1, 3, 3)}, "bias has shape"),
    ],
)
def test_what_contradicts_is_refused(change: dict, sentence: str) -> None:
    cache = Cache.empty(1, 2, 8, chunks=2, size=4, pages=4, dtype=torch.float32)
    arguments = {"q": torch.zeros(1, 4, 8), "bias": None, "window": 4} | change
    with pytest.raises(ValueError, match=sentence):
        decode.attend(cache, arguments["q"], arguments["bias"], window=arguments["window"], scale=1.0)
