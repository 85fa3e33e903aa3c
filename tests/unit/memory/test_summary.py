from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mka_megatron.config.schema import L2Config
from mka_megatron.memory.documents import Documents
from mka_megatron.memory.summary import decay_logits, ema, prefix_mean
from tests.helpers import oracle
from tests.helpers.layouts import NAMES, layout
from tests.helpers.numerics import assert_as_accurate, assert_bitwise, assert_same

BATCH, CHANNELS = 3, (2, 3)


def inputs(sequence: int, carried: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    torch.manual_seed(sequence)
    x = torch.randn(BATCH, sequence, *CHANNELS, dtype=torch.float64, requires_grad=True)
    decay = torch.rand(CHANNELS, dtype=torch.float64).requires_grad_()
    carry = torch.randn(BATCH, *CHANNELS, dtype=torch.float64, requires_grad=True) if carried else None
    return x, decay, carry


def gradients(outputs: tuple[Tensor, ...], wanted: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    total = sum((o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).sum() for o in outputs)
    return list(torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("documents", NAMES)
@pytest.mark.parametrize("sequence", [1, 2, 127, 128, 129])
def test_ema_is_the_loop(sequence: int, documents: str, carried: bool) -> None:
    x, decay, carry = inputs(sequence, carried)
    where = layout(documents, BATCH, sequence)
    expected = oracle.ema(x, decay, where.starts, where.padding, carry)
    averages, last = ema(x, decay, where, carry)
    assert_same(averages, expected, terms=sequence)
    assert_bitwise(last, averages[:, -1])
    wanted = [each for each in (x, decay, carry) if each is not None]
    for found, exact in zip(
        gradients((averages, last), wanted), gradients((expected, expected[:, -1]), wanted), strict=True
    ):
        assert_same(found, exact, terms=BATCH * sequence)


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("documents", NAMES)
@pytest.mark.parametrize("sequence", [1, 2, 127, 128, 129])
def test_prefix_mean_is_the_loop(sequence: int, documents: str, carried: bool) -> None:
    x, _, total = inputs(sequence, carried)
    where = layout(documents, BATCH, sequence)
    carry = None if total is None else (total, torch.arange(1.0, BATCH + 1, dtype=torch.float64))
    expected = oracle.prefix_mean(x, where.starts, where.padding, carry)
    means, (last_sum, count) = prefix_mean(x, where, carry)
    assert_same(means, expected, terms=sequence)
    assert_same(last_sum / count.clamp_min(1)[:, None, None], expected[:, -1], terms=sequence)
    wanted = [each for each in (x, total) if each is not None]
    for found, exact in zip(gradients((means,), wanted), gradients((expected,), wanted), strict=True):
        assert_same(found, exact, terms=sequence)


@pytest.mark.parametrize("documents", NAMES)
def test_gradcheck(documents: str) -> None:
    where = layout(documents, BATCH, 7)
    x, decay, carry = inputs(7, True)
    assert torch.autograd.gradcheck(lambda *given: ema(*given, where), (x, decay))
    assert torch.autograd.gradcheck(lambda x, decay, carry: ema(x, decay, where, carry), (x, decay, carry))
    counts = torch.ones(BATCH, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, total: (lambda means, last: (means, last[0]))(*prefix_mean(x, where, (total, counts))),
        (x, carry),
    )


@pytest.mark.parametrize("shape", [(), (1,), (2, 1), (3,), (2, 3)])
def test_decay_broadcasts_over_the_channels(shape: tuple[int, ...]) -> None:
    x, _, _ = inputs(20, False)
    decay = torch.rand(shape, dtype=torch.float64).requires_grad_()
    where = layout("packed", BATCH, 20)
    found, exact = ema(x, decay, where)[0], oracle.ema(x, decay, where.starts)
    assert_same(found, exact, terms=20)
    (found,), (exact,) = gradients((found,), [decay]), gradients((exact,), [decay])
    assert_same(found, exact, terms=x.numel())


@pytest.mark.parametrize("cut", [1, 5, 16, 31, 36])
def test_segments_with_carries_are_the_whole(cut: int) -> None:
    x, decay, _ = inputs(37, False)
    starts = torch.zeros(BATCH, 37, dtype=torch.bool)
    starts[:, 0] = True
    starts[1, 20] = starts[2, 3] = True
    whole = Documents.from_starts(starts)
    pieces = [starts[:, :cut].clone(), starts[:, cut:].clone()]
    # rows whose document does begin at the cut would not continue; none does here
    assert not bool(pieces[1][:, 0].any())
    pieces[1][:, 0] = True
    first, second = (Documents.from_starts(piece) for piece in pieces)

    expected, expected_last = ema(x, decay, whole)
    head, state = ema(x[:, :cut], decay, first)
    tail, last = ema(x[:, cut:], decay, second, state)
    found = torch.cat((head, tail), dim=1)
    assert_same(found, expected, terms=37)
    assert_same(last, expected_last, terms=37)
    for one, other in zip(
        gradients((found, last), [x, decay]), gradients((expected, expected_last), [x, decay]), strict=True
    ):
        assert_same(one, other, terms=BATCH * 37)

    expected, (expected_sum, expected_count) = prefix_mean(x, whole)
    head, carry = prefix_mean(x[:, :cut], first)
    tail, (total, count) = prefix_mean(x[:, cut:], second, carry)
    assert_same(torch.cat((head, tail), dim=1), expected, terms=37)
    assert_same(total, expected_sum, terms=37)
    assert_bitwise(count, expected_count)


@pytest.mark.parametrize("documents", NAMES)
@pytest.mark.parametrize("cut", [1, 5, 16, 31, 36])
def test_parts_of_rows_with_carries_are_the_whole(cut: int, documents: str) -> None:
    x, decay, _ = inputs(37, False)
    whole = layout(documents, BATCH, 37)
    head, tail = whole.part(0, cut), whole.part(cut, 37)
    goes_on = tail.continues[:, None, None]

    expected, expected_last = ema(x, decay, whole)
    first, state = ema(x[:, :cut], decay, head)
    second, last = ema(x[:, cut:], decay, tail, torch.where(goes_on, state, x[:, cut]))
    found = torch.cat((first, second), dim=1)
    tokens = torch.ones_like(whole.starts) if whole.padding is None else ~whole.padding
    assert_same(found[tokens], expected[tokens], terms=37)
    kept = tokens[:, cut:].any(dim=1)
    assert_same(last[kept], expected_last[kept], terms=37)
    direction = tokens[..., None, None] * torch.randn(expected.shape, dtype=torch.float64)
    for one, other in zip(
        gradients((found * direction,), [x, decay]), gradients((expected * direction,), [x, decay]), strict=True
    ):
        assert_same(one, other, terms=BATCH * 37)

    expected, _ = prefix_mean(x, whole)
    first, (total, count) = prefix_mean(x[:, :cut], head)
    carry = (total * goes_on, count * tail.continues)
    found = torch.cat((first, prefix_mean(x[:, cut:], tail, carry)[0]), dim=1)
    assert_same(found[tokens], expected[tokens], terms=37)


SUMMARIES = {
    "ema": lambda x, where: ema(
        x, torch.linspace(0.1, 0.99, x.shape[2], dtype=torch.float64).to(x.dtype), where
    )[0],
    "mean": lambda x, where: prefix_mean(x, where)[0],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("summary", SUMMARIES)
def test_no_later_token_changes_a_bit(summary: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 133, 40, dtype=dtype)
    where = Documents.unpacked(2, 133)
    before = SUMMARIES[summary](x, where)
    for time in range(1, 133):
        changed = x.clone()
        changed[:, time:] = torch.randn_like(changed[:, time:])
        changed[:, time] = float("nan")
        assert_bitwise(SUMMARIES[summary](changed, where)[:, :time], before[:, :time])


@pytest.mark.parametrize("poison", [1e6, float("inf"), float("nan")])
@pytest.mark.parametrize("documents", ["packed", "padded", "gaps"])
@pytest.mark.parametrize("summary", SUMMARIES)
def test_no_other_document_changes_a_bit(summary: str, documents: str, poison: float) -> None:
    torch.manual_seed(0)
    where = layout(documents, 3, 100)
    x = torch.randn(3, 100, 8, requires_grad=True)
    before = SUMMARIES[summary](x, where)
    (before_grad,) = torch.autograd.grad(before.square().sum(), x)
    for row, begin, end in where.spans:
        changed = x.detach().clone().fill_(poison)
        changed[row, begin:end] = x.detach()[row, begin:end]
        changed.requires_grad_()
        after = SUMMARIES[summary](changed, where)
        assert_bitwise(after[row, begin:end], before[row, begin:end])
        (after_grad,) = torch.autograd.grad(after.square().sum(), changed)
        assert_bitwise(after_grad[row, begin:end], before_grad[row, begin:end])


@pytest.mark.parametrize("documents", ["padded", "gaps"])
def test_what_lies_on_padding_does_not_matter(documents: str) -> None:
    where = layout(documents, BATCH, 60)
    x, decay, carry = inputs(60, True)
    poisoned = x.detach().clone()
    poisoned[where.padding] = float("nan")
    poisoned.requires_grad_()
    found, exact = ema(poisoned, decay, where, carry), ema(x, decay, where, carry)
    for one, other in zip(found, exact, strict=True):
        assert_bitwise(one, other)
    grads = zip(gradients(found, [poisoned, decay, carry]), gradients(exact, [x, decay, carry]), strict=True)
    for one, other in grads:
        assert_bitwise(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_keeps_its_state_in_fp32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 500, 16).to(dtype)
    decay = torch.linspace(0.5, 0.999, 16)
    where = layout("packed", 2, 500)
    exact = oracle.ema(x.double(), decay.double(), where.starts)
    averages, last = ema(x, decay, where)
    assert averages.dtype == dtype and last.dtype == torch.float32
    # the peer sums in fp32 with torch's own operations and rounds once
    assert_as_accurate(averages, oracle.ema(x.float(), decay, where.starts).to(dtype), exact)
    means, (total, count) = prefix_mean(x, where)
    assert means.dtype == dtype and total.dtype == count.dtype == torch.float32
    assert_as_accurate(
        means,
        oracle.prefix_mean(x.float(), where.starts).to(dtype),
        oracle.prefix_mean(x.double(), where.starts),
    )


class CountOperations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(sequence: int) -> int:
    x = torch.randn(1, sequence, 2, requires_grad=True)
    where = Documents.unpacked(1, sequence)
    ema(x, torch.tensor(0.9, requires_grad=True), where)
    with CountOperations() as counter:
        ema(x, torch.tensor(0.9, requires_grad=True), where)[0].sum().backward()
    return counter.count


def test_operations_grow_with_the_root_of_the_sequence() -> None:
    small, large = operations(1024), operations(16384)
    assert large - small < 2 * (math.isqrt(16384) / math.isqrt(1024)) * small
    assert large < 16384 / 4


@pytest.mark.parametrize("summary", SUMMARIES)
def test_memory_is_linear_in_the_sequence(summary: str) -> None:
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for each in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(each, Tensor):
                    largest = max(largest, each.untyped_storage().nbytes())
            return out

    x = torch.randn(1, 4096, 2, requires_grad=True)
    with Largest():
        SUMMARIES[summary](x, Documents.unpacked(1, 4096)).sum().backward()
    # fp64 indices of the slots are as large as anything gets
    assert largest <= 2 * x.untyped_storage().nbytes()


def test_initial_decays_are_spread_over_spans() -> None:
    l2 = L2Config(decay="channel", min_span=2.0, max_span=100.0)
    logits = decay_logits(l2, kv_heads=3, head_dim=5)
    spans = 1 / (1 - logits.double().sigmoid())
    expected = 2.0 * (100.0 / 2.0) ** (torch.arange(5, dtype=torch.float64) / 4)
    assert logits.dtype == torch.float32 and logits.shape == (3, 5)
    for head in spans:
        assert_same(head.float(), expected, terms=100)
    assert_same(
        (1 / (1 - decay_logits(L2Config(decay="head"), 2, 5).double().sigmoid())).float(),
        torch.tensor([[2.0], [100.0]]), terms=100,
    )  # fmt: skip
    one = 1 / (1 - decay_logits(L2Config(decay="head", min_span=4.0, max_span=25.0), 1, 5).double().sigmoid())
    assert_same(one.float(), torch.tensor([[10.0]]), terms=100)


@pytest.mark.parametrize(("low", "high"), [(1.0, 10.0), (0.5, 10.0), (10.0, 2.0)])
def test_spans_that_make_no_decay_are_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="min_span"):
        decay_logits(L2Config(min_span=low, max_span=high), 2, 4)


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_slot_without_gradients_has_the_bits_of_one_with(dtype: torch.dtype, carried: bool) -> None:
    """Generation's way, which is no autograd function, padding in one row."""
    wide = torch.promote_types(dtype, torch.float32)
    x, decay = torch.randn(3, 1, 4, 5).to(dtype), torch.rand(4, 5, dtype=wide)
    carry = torch.randn(3, 4, 5, dtype=wide) if carried else None
    for padding in (None, torch.tensor([[False], [True], [False]])):
        rows = Documents.from_starts(torch.ones(3, 1, dtype=torch.bool), padding)
        with torch.no_grad():
            found = ema(x, decay, rows, carry)
        for mine, theirs in zip(found, ema(x, decay.requires_grad_(), rows, carry), strict=True):
            assert theirs.requires_grad
            assert_bitwise(mine, theirs)
        decay.requires_grad_(False)
        before = found[1].clone()
        x.fill_(7)
        assert_bitwise(found[1], before)  # the state is no part of what comes next
