"""The block core against a dense masked oracle, against SDPA where they must agree, and bit for bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask

from mka_megatron.config.errors import ConfigError
from mka_megatron.ops import library
from mka_megatron.ops.block_attention import blocks, choose, flex
from tests.helpers import block_oracle
from tests.helpers.block_cases import Case, make_case, recall
from tests.helpers.block_oracle import Table
from tests.helpers.numerics import assert_as_accurate, assert_bitwise, assert_same, assert_same_gradients

C = 8
INFINITY = float("inf")

# Every chunk of every row as (tokens, document).
ROWS = {
    "one document": [[(8, 0)] * 7] * 2,
    "ragged": [[(8, 0)] * 6 + [(3, 0)], [(8, 0)] * 3 + [(8, 1)] * 3 + [(1, 1)]],
    "less than a chunk": [[(5, 0)]],
    "a document per chunk": [[(8, n) for n in range(6)], [(n + 1, n) for n in range(6)]],
    "packed": [[(8, 0)] * 4 + [(2, 0), (8, 1), (8, 1), (7, 1), (8, 2)], [(8, 0), (1, 0), (6, 1)] + [(8, 2)] * 6],
    "closed early": [[(8, 0), (3, 0), (8, 0), (1, 0), (8, 0), (5, 0), (8, 0), (2, 0)], [(2, 0)] * 5 + [(7, 1)] * 3],
    "empty chunks": [
        [(8, 0), (8, 0), (0, 0), (4, 0), (0, 0), (0, 0), (8, 0), (8, 0), (8, 0)],
        [(0, 0), (8, 1), (8, 1), (8, 1), (8, 1), (8, 1), (2, 1), (0, 0), (0, 0)],
    ],
    "a row of nothing": [[(0, 0)] * 5, [(8, 0)] * 5],
    "nothing": [[(0, 0)] * 3],
}  # fmt: skip


def case(rows: str, **changes: Any) -> Case:
    """make_case's, in chunks of C."""
    return make_case(C, ROWS[rows], **changes)


CASES = {
    **{rows: {"rows": rows} for rows in ROWS},
    "ragged slots": {"rows": "one document", "missing": 5},
    "ragged slots of one chunk": {"rows": "less than a chunk", "missing": 3},
    "one query head per KV head": {"rows": "packed", "heads": (3, 3)},
    "seven query heads per KV head": {"rows": "packed", "heads": (7, 1), "channels": 128},
    "64 channels": {"rows": "closed early", "channels": 64},
    "one bias for all heads": {"rows": "packed", "bias": "shared"},
    "no bias": {"rows": "closed early", "bias": "none"},
    "no summaries": {"rows": "packed", "summaries": False},
    "nothing recalled": {"rows": "packed", "recalled": 0},
    "window alone": {"rows": "packed", "recalled": 0, "summaries": False},
    "window of one chunk": {"rows": "empty chunks", "window": 1},
    "window of four chunks": {"rows": "packed", "window": 4},
    "a part, its halo short": {"rows": "packed", "first": 1, "window": 3},
    "a part with pages": {"rows": "one document", "first": 4, "window": 2, "recalled": 3},
    "a part with pages, closed early": {"rows": "closed early", "first": 5, "window": 2, "recalled": 3},
    "a part with pages, no halo": {"rows": "empty chunks", "first": 6, "window": 1, "recalled": 3},
    "a part whose halo spans it": {"rows": "packed", "first": 7, "window": 5},
    "a ragged part": {"rows": "one document", "first": 5, "missing": 3, "recalled": 3},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("block", [1, blocks.BLOCK_SCORES], ids=["chunk by chunk", "large blocks"])
def test_is_the_dense_masked_attention(name: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_SCORES", block)
    given = case(**CASES[name])
    found, exact = given.run(), given.oracle()
    terms = 4 * given.q.shape[-1]
    assert_same(found, exact, terms, given.v)
    assert_same_gradients(found, exact, given.tensors, terms)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", CASES)
def test_flex_attention_is_the_reference(name: str) -> None:
    """Run eagerly on a CPU, where FlexAttention has no backward."""
    given = case(**CASES[name])
    with torch.no_grad():
        found, exact = given.run("flex"), given.run()
    assert_same(found, exact, 4 * given.q.shape[-1], given.v)


@pytest.mark.parametrize("name", [name for name in CASES if "nothing" not in name])
def test_flex_attention_visits_the_blocks_that_are_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lists of blocks, which eager FlexAttention does not read, against the rule for single pairs."""
    masks: list[BlockMask] = []

    def keep_mask(q: Tensor, *_: Tensor, block_mask: BlockMask, **__: object) -> Tensor:
        masks.append(block_mask)
        return q

    monkeypatch.setattr(flex, "_attention", lambda device: keep_mask)
    case(**CASES[name]).run("flex")
    (mask,) = masks
    rows, columns = mask.BLOCK_SIZE
    pairs = create_mask(mask.mask_mod, *mask.kv_num_blocks.shape[:2], *mask.seq_lengths, device="cpu")
    # [B, G, n*F*C, K*C] -> [B, G, n, F*C, K, C]
    pairs = pairs.unflatten(3, (-1, columns)).unflatten(2, (-1, rows))
    part, whole = (
        torch.zeros_like(order, dtype=torch.bool).scatter_(
            3, order.long(), torch.arange(order.shape[3]).expand_as(order) < number[..., None]
        )
        for number, order in (
            (mask.kv_num_blocks, mask.kv_indices),
            (mask.full_kv_num_blocks, mask.full_kv_indices),
        )
    )
    assert not bool((part & whole).any())
    assert torch.equal(part | whole, pairs.any(dim=5).any(dim=3))
    assert not bool((whole & ~pairs.all(dim=5).all(dim=3)).any())


def test_flex_attention_has_a_backward() -> None:
    if not torch.cuda.is_available():
        pytest.skip("FlexAttention has no backward on a CPU, and there is no GPU here")
    given = case("packed", recalled=3, channels=64).to(torch.float32)
    cuda = given.to(torch.float32, "cuda")
    wanted = torch.autograd.grad(given.run().square().sum(), given.tensors)
    found = torch.autograd.grad(cuda.run("flex").square().sum(), cuda.tensors)
    for one, other in zip(found, wanted, strict=True):
        assert_same(one.cpu(), other, 256, torch.stack([x.abs().max() for x in wanted]))


def test_a_bias_of_minus_infinity_hides_a_level() -> None:
    """Hidden summaries are no summaries, and likewise recalled chunks; nothing flows back through them."""
    given = case("packed")
    for level, without in ((1, {"summaries": None}), (2, {"pages": None})):
        bias = given.bias.detach().clone()
        bias[..., level] = -INFINITY
        hidden = replace(given, bias=bias.requires_grad_())
        kept = replace(given, bias=bias.detach().clone().requires_grad_(), **without)
        found, exact = hidden.run(), kept.oracle()
        terms = 4 * given.q.shape[-1]
        assert_same(found, exact, terms, given.v)
        assert_same_gradients(found, exact, [given.q, given.k, given.v], terms)
        grads = torch.autograd.grad(hidden.run().sum(), [hidden.bias, *given.summaries])
        assert not bool(grads[0][..., level].any())
        assert level == 2 or not any(bool(g.any()) for g in grads[1:])


def sdpa(given: Case) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (given.q, given.k, given.v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("missing", [0, 5])
def test_a_window_as_long_as_the_row_is_dense_attention(missing: int) -> None:
    given = case("one document", window=9, missing=missing, recalled=0)
    given = replace(given, bias=torch.zeros_like(given.bias))
    found, exact = given.run(), sdpa(given)
    assert_same(found, exact, 64, given.v)
    assert_same_gradients(found, exact, [given.q, given.k, given.v], 64)


def test_recalling_every_chunk_without_summaries_is_dense_attention() -> None:
    given = case("one document", window=2, recalled=7)
    bias = torch.zeros_like(given.bias)
    bias[..., 1] = -INFINITY
    given = replace(given, bias=bias)
    found, exact = given.run(), sdpa(given)
    assert_same(found, exact, 64, given.v)
    assert_same_gradients(found, exact, [given.q, given.k, given.v], 64)


def test_the_gradient_of_the_bias_sums_to_zero_over_the_levels() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        given = case("packed").to(dtype)
        (grad,) = torch.autograd.grad(given.run().float().square().sum(), [given.bias])
        assert bool(grad.any())
        assert_same(grad.sum(dim=-1), torch.zeros_like(grad[..., 0]), 64, grad)


def test_a_common_bias_changes_nothing() -> None:
    given = case("packed")
    shifted = replace(given, bias=given.bias + 3)
    assert_same(shifted.run(), given.run(), 64, given.v)


@pytest.mark.parametrize("name", ["packed", "closed early", "empty chunks", "a row of nothing"])
def test_no_later_token_changes_a_bit(name: str) -> None:
    given = case(name, recalled=3).to(torch.float32)
    with torch.no_grad():
        before = given.run()
        for slot in range(0, given.q.shape[1] - 1, 3):
            q, k, v = (x.detach().clone() for x in (given.q, given.k, given.v))
            for x in (q, k, v):
                x[:, slot + 1 :] = torch.randn_like(x[:, slot + 1 :]) * 1e3
            bias = given.bias.detach().clone()
            bias[:, slot + 1 :] -= 5
            # a summary holds its chunk's last token; recalled chunks are chosen by earlier ones
            summaries = tuple(x.detach().clone() for x in given.summaries)
            for x in summaries:
                x[:, (slot + 1) // C :] *= -1e3
            index = given.pages.index.clone()
            index[:, slot // C + 1 :] = index[:, slot // C + 1 :].masked_fill(
                torch.rand(index[:, slot // C + 1 :].shape) < 0.5, -1
            )
            pages = replace(given.pages, index=index)
            after = replace(given, q=q, k=k, v=v, bias=bias, summaries=summaries, pages=pages).run()
            assert_bitwise(after[:, : slot + 1], before[:, : slot + 1])


@pytest.mark.parametrize("name", ["packed", "closed early", "empty chunks", "a document per chunk"])
def test_no_other_document_and_no_padding_changes_a_bit(name: str) -> None:
    """Not even as NaN, neither outputs nor gradients."""
    given = case(name, recalled=3).to(torch.float32)
    table = given.table
    slots = given.q.shape[1]
    owner = table.documents.masked_fill(table.lengths == 0, -1)
    real = (torch.arange(C) < table.lengths[..., None]).flatten(1)[:, :slots]
    document = owner.repeat_interleave(C, dim=1)[:, :slots].masked_fill(~real, -1)
    direction = torch.randn(given.q.shape)

    def run(case: Case, kept: Tensor) -> list[Tensor]:
        """The outputs and the gradients of the tokens in `kept` [B, S]."""
        out = case.run()
        grads = torch.autograd.grad(
            out, [case.q, case.k, case.v, case.bias], direction * kept[..., None, None]
        )
        return [x[kept] for x in (out, *grads)]

    for number in range(int(document.max()) + 1):
        kept = document == number
        spoilt = case(name, recalled=3).to(torch.float32)
        with torch.no_grad():
            for x in (spoilt.q, spoilt.k, spoilt.v, spoilt.bias):
                x[~kept] = float("nan")
            for x in spoilt.summaries:
                x[owner != number] = float("nan")
        for found, expected in zip(run(spoilt, kept), run(given, kept), strict=True):
            assert_bitwise(found, expected)


def test_padding_is_zero_and_has_no_gradient() -> None:
    given = case("empty chunks")
    with torch.no_grad():
        real = (torch.arange(C) < given.table.lengths[..., None]).flatten(1)
        for x in given.tensors[:3]:
            x[~real] = float("nan")
        given.bias[~real] = float("nan")
    out = given.run()
    assert not bool(out[~real].any())
    # from a loss that looks at padding, too
    for grad in torch.autograd.grad(out, [given.q, given.k, given.v], torch.ones_like(out)):
        assert not bool(grad[~real].any()) and bool(torch.isfinite(grad).all())


def test_rows_of_nothing_are_zero() -> None:
    given = case("nothing")
    out = given.run()
    assert not bool(out.any())
    assert not any(bool(grad.any()) for grad in torch.autograd.grad(out.sum(), given.tensors))


def masked_sdpa(given: Case) -> Tensor:
    """PyTorch's own operation in the precision of `given`, over the same keys in the same row."""
    exact = given.to(torch.float64)
    columns = []
    slots, heads, groups = *given.q.shape[1:3], given.k.shape[2]
    for group in range(groups):
        level = block_oracle.levels(
            given.table, slots, given.window, 0, group, given.summaries[0].shape[1], given.pages
        )
        k = torch.cat([given.k[0, :, group], given.summaries[0][0, :, group]])
        v = torch.cat([given.v[0, :, group], given.summaries[1][0, :, group]])
        mask = (
            exact.bias[0, :, group if given.bias.shape[2] > 1 else 0].detach().gather(1, level.clamp_min(0))
        )
        mask = mask.masked_fill(level < 0, -INFINITY).to(given.q.dtype)
        for head in range(group * (heads // groups), (group + 1) * (heads // groups)):
            columns.append(
                F.scaled_dot_product_attention(given.q[:, :, head], k[None], v[None], mask[None])[0]
            )
    return torch.stack(columns, dim=1)[None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_as_accurate_as_pytorchs(dtype: torch.dtype) -> None:
    given = case("less than a chunk", channels=64)
    given = replace(given, table=Table.of(C, [[(8, 0)] * 12]))
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(1, 96, 4, 64, generator=generator)
    k, v = (torch.randn(1, 96, 2, 64, generator=generator) for _ in range(2))
    summaries = tuple(x.unflatten(1, (12, C)).mean(dim=2) for x in (k, v))
    bias = torch.randn(1, 96, 2, 3, generator=generator).to(dtype)
    pages = recall(given.table, 2, 2, 64, 3, generator)
    low = replace(given, q=q, k=k, v=v, summaries=summaries, pages=pages, bias=bias).to(dtype)
    peer, exact = low.to(dtype), low.to(torch.float64)
    found, other, right = low.run(), masked_sdpa(peer), exact.oracle()
    assert found.dtype == dtype
    assert_as_accurate(found, other, right)
    direction = torch.randn(q.shape, generator=generator).to(dtype)
    wanted = [
        torch.autograd.grad(out, [x.q, x.k, x.v, *x.summaries], direction.to(out.dtype))
        for out, x in ((found, low), (other, peer), (right, exact))
    ]
    for grad, other_grad, right_grad in zip(*wanted, strict=True):
        assert_as_accurate(grad, other_grad, right_grad)


def test_the_gradients_are_those_of_finite_differences() -> None:
    given = case("one document", first=4, missing=5, heads=(2, 1), channels=3, recalled=2)

    def run(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        pages = replace(given.pages, k=rest[2], v=rest[3])
        return replace(given, q=q, k=k, v=v, summaries=rest[:2], pages=pages, bias=rest[4]).run()

    assert torch.autograd.gradcheck(run, given.tensors, fast_mode=True)


def test_the_backward_runs_twice_to_the_same_bits() -> None:
    given = case("packed", recalled=3).to(torch.float32)
    first, second = (torch.autograd.grad(given.run().square().sum(), given.tensors) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert_bitwise(one, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 12}, "window is 12"),
        ({"v": torch.zeros(2, 56, 1, 16)}, "v has shape"),
        ({"bias": torch.zeros(2, 56, 2, 2)}, "bias has shape"),
        ({"table": Table.of(C, [[(8, 0)] * 6] * 2)}, "56 slots are 7 chunks of 8"),
        ({"summaries": (torch.zeros(2, 2, 2, 16),) * 2}, "2 summaries"),
        ({"q": torch.zeros(2, 56, 5, 16)}, "5 query heads over 2 KV heads"),
    ],
)
def test_contradicting_shapes_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(case("one document", recalled=0), **change).run()


def test_the_backend_is_chosen_by_device(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And told once."""
    library.tell.cache_clear()
    monkeypatch.setattr(library, "available", lambda: (False, "the GPU is sm_75."))
    with caplog.at_level("INFO"):
        assert choose("auto", "cpu") == choose("auto", "cpu") == "reference"
        assert choose("auto", "cuda") == "flex"
    told = ["block_attention: reference on cpu", "block_attention: flex on cuda (the GPU is sm_75)"]
    assert [record.getMessage() for record in caplog.records] == told
    assert choose("flex", "cuda") == "flex"
    assert choose("reference", "cuda") == "reference"
    with pytest.raises(ConfigError, match=r"attention\.block_backend is flex: .* no backward on cpu"):
        choose("flex", "cpu")
    with pytest.raises(ConfigError, match=r"attention\.block_backend is fast: choose auto, cuda, flex or reference"):
        choose("fast", "cpu")
    with pytest.raises(ConfigError, match=r"attention\.block_backend is cuda: .* the GPU is sm_75; use auto, flex"):
        choose("cuda", "cuda")
    monkeypatch.setattr(library, "available", lambda: (True, ""))
    assert choose("auto", "cuda") == choose("cuda", "cuda") == "cuda"
    assert choose("auto", "cuda", "its dtypes are others") == "flex"
    assert choose("auto", "cpu") == "reference"
