from __future__ import annotations

import pytest
import torch

from mka_megatron.attention.rope import apply_rope
from tests.helpers import oracle
from tests.helpers.numerics import assert_bitwise, assert_same


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_hugging_faces_formula_bit_for_bit(dtype: torch.dtype) -> None:
    from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

    torch.manual_seed(0)
    q, k = torch.randn(2, 33, 4, 64, dtype=dtype), torch.randn(2, 33, 2, 64, dtype=dtype)
    cos, sin = oracle.tables(torch.arange(33).expand(2, 33), 64, 1e6)
    cos, sin = cos.float(), sin.float()
    grads = {}
    for name in ("ours", "theirs"):
        inputs = [x.clone().requires_grad_() for x in (q, k)]
        if name == "ours":
            outs = [apply_rope(x, cos, sin) for x in inputs]
        else:
            # their rotary embedding hands out tables in the activations' dtype
            outs = apply_rotary_pos_emb(*(x.transpose(1, 2) for x in inputs), cos.to(dtype), sin.to(dtype))
            outs = [x.transpose(1, 2) for x in outs]
        grads[name] = [*outs, *torch.autograd.grad([x.square().sum() for x in outs], inputs)]
    for ours, theirs in zip(grads["ours"][:2], grads["theirs"][:2], strict=True):
        assert_bitwise(ours, theirs)
    for ours, theirs in zip(grads["ours"][2:], grads["theirs"][2:], strict=True):
        assert_same(ours, theirs, terms=2)


def test_it_rotates_by_position() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 20, 3, 8, dtype=torch.float64)
    positions = torch.randint(0, 1000, (2, 20))
    cos, sin = oracle.tables(positions, 8, 1e4)
    assert_same(apply_rope(x, cos, sin), oracle.rotate(x, positions, 1e4), terms=1000)


def test_channels_beyond_the_tables_pass_unchanged() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 5, 2, 12)
    cos, sin = oracle.tables(torch.arange(5)[None], 8, 1e4)
    out = apply_rope(x, cos.float(), sin.float())
    assert_bitwise(out[..., 8:], x[..., 8:])
    assert_bitwise(out[..., :8], apply_rope(x[..., :8], cos.float(), sin.float()))


@pytest.mark.parametrize("channels", [7, 14])
def test_tables_that_do_not_fit_are_refused(channels: int) -> None:
    with pytest.raises(ValueError, match=f"rotary tables have {channels} channels, heads 12"):
        apply_rope(torch.zeros(1, 2, 1, 12), torch.zeros(1, 2, channels), torch.zeros(1, 2, channels))
