from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mka_megatron.attention.grouped import causal_attention
from mka_megatron.memory.documents import Documents
from tests.helpers import oracle
from tests.helpers.layouts import NAMES, layout
from tests.helpers.numerics import assert_as_accurate, assert_bitwise, assert_same, assert_same_gradients


def inputs(
    heads: int, groups: int, channels: int, values: int, sequence: int = 37, dtype=torch.float64
) -> list[Tensor]:
    torch.manual_seed(0)
    # sequence-major storage, as an adapter hands it over
    shapes = ((sequence, 3, heads, channels), (sequence, 3, groups, channels), (sequence, 3, groups, values))
    return [torch.randn(shape, dtype=dtype).transpose(0, 1).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("documents", NAMES)
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (4, 1), (6, 2)])
@pytest.mark.parametrize("values", [8, 5, 12])
def test_it_is_dense_attention_in_fp64(heads: int, groups: int, values: int, documents: str) -> None:
    where = layout(documents, 3, 37)
    given = inputs(heads, groups, 8, values)
    found = causal_attention(*given, where, 0.3)
    exact = oracle.attention(*given, oracle.visible(where.starts, where.padding), 0.3)
    assert_same(found, exact, terms=37)
    assert_same_gradients(found, exact, given, terms=37)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_documents_are_as_accurate_as_one_document(dtype: torch.dtype) -> None:
    where = layout("packed", 3, 37)
    given = [x.detach().to(dtype) for x in inputs(4, 2, 8, 8)]
    exact = oracle.attention(*(x.double() for x in given), oracle.visible(where.starts), 0.3)
    mask = oracle.visible(where.starts)[:, None]
    peer = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in given), attn_mask=mask, scale=0.3, enable_gqa=True
    )
    assert_as_accurate(causal_attention(*given, where, 0.3), peer.transpose(1, 2), exact)


@pytest.mark.parametrize("values", [8, 5])
def test_padding_comes_out_as_zero(values: int) -> None:
    where = layout("padded", 3, 37)
    out = causal_attention(*inputs(4, 2, 8, values), where, 0.3)
    assert not bool(out[where.padding].any())


def test_heads_that_do_not_group_are_refused() -> None:
    with pytest.raises(ValueError, match="3 query heads over 2 KV heads"):
        causal_attention(*inputs(3, 2, 8, 8), Documents.unpacked(3, 37), 0.3)


@pytest.mark.parametrize(
    ("dtype", "values"),
    [(torch.float32, 16), (torch.float32, 8), (torch.float32, 24), (torch.bfloat16, 16)],
)
def test_it_runs_in_the_flash_kernel_without_repeating_heads(dtype: torch.dtype, values: int) -> None:
    given = [x.detach().to(dtype).requires_grad_() for x in inputs(8, 1, 16, values)]
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        causal_attention(*given, layout("packed", 3, 37), 0.25).sum().backward()
    names = {event.name for event in trace.events()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in names
    assert "aten::_scaled_dot_product_flash_attention_for_cpu_backward" in names
    assert not names & {"aten::repeat_interleave", "aten::_scaled_dot_product_attention_math"}


def test_a_batch_of_whole_rows_is_one_call() -> None:
    given = inputs(4, 2, 8, 8)
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        causal_attention(*given, Documents.unpacked(3, 37), 0.3)
    calls = [event for event in trace.events() if event.name == "aten::scaled_dot_product_attention"]
    assert len(calls) == 1


def test_rows_do_not_depend_on_the_batch_they_come_in() -> None:
    where = layout("packed", 3, 37)
    given = [x.detach() for x in inputs(4, 2, 8, 8)]
    out = causal_attention(*given, where, 0.3)
    for row in range(3):
        alone = Documents.from_starts(where.starts[row : row + 1])
        assert_bitwise(causal_attention(*(x[row : row + 1] for x in given), alone, 0.3), out[row : row + 1])
