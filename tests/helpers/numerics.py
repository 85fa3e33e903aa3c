"""The one tolerance rule of the tests: no other file holds a tolerance.

Low precision (FlashAttention's rule): the error against fp64 is at most twice the error that PyTorch's own
operation makes in the same precision, plus roundoff of the result. Two computations of one formula in one
precision: they differ by no more than the roundoff of their longest sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def error(actual: Tensor, exact: Tensor) -> float:
    """Largest absolute difference, in fp64; raises AssertionError for other shapes or values that are not finite."""
    assert actual.shape == exact.shape, f"shape {list(actual.shape)}, expected {list(exact.shape)}"
    assert bool(torch.isfinite(actual).all()), "not finite"
    return (actual.detach().double() - exact.detach().double()).abs().max().item() if exact.numel() else 0.0


def roundoff(exact: Tensor, dtype: torch.dtype, terms: int = 1) -> float:
    """What `terms` additions in `dtype` may lose of a result as large as `exact`."""
    largest = exact.detach().abs().max().item() if exact.numel() else 0.0
    return terms * torch.finfo(dtype).eps * largest


def assert_same(actual: Tensor, exact: Tensor, terms: int, scale: Tensor | None = None) -> None:
    """`actual` is `exact` up to the roundoff of sums of `terms` terms in actual's dtype.

    `scale`: terms as large as these were summed, where the sum itself may cancel to something smaller.
    """
    bound = roundoff(exact if scale is None else scale, actual.dtype, terms)
    found = error(actual, exact)
    assert found <= bound, f"error {found:.3e} above {bound:.3e}"


def assert_same_gradients(actual: Tensor, exact: Tensor, wanted: Sequence[Tensor], terms: int) -> None:
    """The gradients in `wanted` of a random functional of two equal outputs, as :func:`assert_same`.

    Their sums may cancel to anything, so they are measured by the largest gradient or output weight.
    """
    direction = torch.randn(exact.shape, dtype=exact.dtype, generator=torch.Generator().manual_seed(1))
    found, expected = (
        torch.autograd.grad(out, wanted, direction, allow_unused=True, materialize_grads=True)
        for out in (actual, exact)
    )
    scale = torch.stack([direction.abs().max(), *(each.abs().max() for each in expected)])
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other, terms, scale)


def assert_as_accurate(actual: Tensor, peer: Tensor, exact: Tensor) -> None:
    """`actual` is as near to the fp64 `exact` as twice the error of `peer`, PyTorch's own in the same precision."""
    assert actual.dtype == peer.dtype, f"{actual.dtype} against a peer in {peer.dtype}"
    bound = 2 * error(peer, exact) + roundoff(exact, actual.dtype)
    found = error(actual, exact)
    assert found <= bound, f"error {found:.3e} above {bound:.3e}"


def assert_bitwise(actual: Tensor, expected: Tensor) -> None:
    """Every bit equal (so NaN equals NaN and 0 differs from -0)."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    different = actual.detach().contiguous().view(integer) != expected.detach().contiguous().view(integer)
    assert not bool(different.any()), f"{int(different.sum())} of {different.numel()} elements differ"
