"""Our SwiGLU is PyTorch's silu(gate) * up, value and gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mka_megatron.config.schema import Config
from mka_megatron.model.build import transformer_config
from mka_megatron.model.swiglu import SwiGLU


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_pytorch(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 3, 10, generator=generator).to(dtype).requires_grad_()
    same = x.detach().clone().requires_grad_()
    seed = torch.randn(7, 3, 5, generator=generator).to(dtype)
    ours = SwiGLU(transformer_config(Config()))(x)
    gate, up = same.chunk(2, dim=-1)
    theirs = F.silu(gate) * up
    ours.backward(seed)
    theirs.backward(seed)
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(x.grad, same.grad)


def test_gradcheck():
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(SwiGLU(transformer_config(Config())), (x,))
