"""verify.py's section on the block core: it compares with the specification, and finds what is wrong."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from mka_megatron.memory.view import Pages
from mka_megatron.ops.block_attention import block_attention
from tests.helpers.numerics import assert_same
from tests.unit.kernels.conftest import REPOSITORY

KERNELS = REPOSITORY / "kernels"
CPU = torch.device("cpu")
FORMS = ("one document", "closed", "a document a chunk", "shard", "bare", "nothing recalled", "hidden", "dense")


@pytest.fixture
def section(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The section as a module; the names it imports from its folder are gone afterwards."""
    monkeypatch.syspath_prepend(KERNELS)
    before = set(sys.modules)
    yield importlib.import_module("verify_block_attention")
    for name in {path.stem for path in KERNELS.glob("*.py")} & (set(sys.modules) - before):
        del sys.modules[name]


def draw(section: ModuleType, form: str, slots: int = 300, dtype: torch.dtype = torch.bfloat16) -> Any:
    return section.Inputs.draw(
        CPU, slots, form=form, batch=2, heads=4, groups=2, channels=64, size=64, window=2, recalled=2, dtype=dtype, seed=3
    )


def everything(inputs: Any) -> Tensor:
    return torch.arange(inputs.chunks.count)


@pytest.mark.parametrize("form", FORMS)
def test_it_compares_with_the_specification(section: ModuleType, form: str) -> None:
    assert form in section.FORMS
    inputs = draw(section, form)
    at = everything(inputs)

    def wide(x: Tensor) -> Tensor:
        return x.double()

    pages = None if inputs.pages is None else replace(inputs.pages, k=wide(inputs.pages.k), v=wide(inputs.pages.v))
    doubled = replace(
        inputs, q=wide(inputs.q), k=wide(inputs.k), v=wide(inputs.v), upstream=wide(inputs.upstream), pages=pages,
        summaries=None if inputs.summaries is None else tuple(map(wide, inputs.summaries)),
        bias=None if inputs.bias is None else wide(inputs.bias),
    )  # fmt: skip
    expected = doubled.run(partial(block_attention, backend="reference"))
    found = inputs.solved(at, rounded=False)
    assert set(found) == set(expected)
    # a gradient may cancel to nothing: measured by the largest
    scale = torch.stack([x.abs().max() for x in expected.values()])
    for name, exact in expected.items():
        exact = inputs.chunked(exact, at) if name in ("out", "d q", "d bias") else exact
        assert_same(found[name], exact, 300, scale)


def test_every_form_is_what_it_says(section: ModuleType) -> None:
    made = {form: draw(section, form) for form in FORMS}
    assert set(made) == set(section.FORMS)
    closed = made["closed"].chunks
    assert (closed.lengths == 0).any() and (closed.lengths % 64 > 0).sum() > 1 and closed.documents.max() > 0
    assert made["closed"].q.isnan().any() and made["closed"].summaries[0].isnan().any()
    assert (made["a document a chunk"].chunks.documents == torch.arange(5)).all()
    shard = made["shard"]
    assert shard.halo == 1 and shard.k.shape[1] == 64 + 300 and shard.chunks.lengths.shape[1] == 3 + 5 + 1
    assert (shard.pages.index >= 1 + 5).any() and ((shard.pages.index >= 0) & (shard.pages.index < 6)).any()
    assert made["bare"].summaries is None and made["bare"].pages is None and made["bare"].bias is None
    assert (made["nothing recalled"].pages.index == -1).all()
    assert made["hidden"].bias.isneginf().any() and not made["hidden"].bias[..., 0].isneginf().any()
    assert made["dense"].window == 5 and made["dense"].pairs == 2 * 4 * 300 * 301 // 2
    for inputs in made.values():
        if inputs.pages is not None:
            ordered = inputs.pages.index.sort(dim=3).values
            assert ((ordered[..., 1:] > ordered[..., :-1]) | (ordered[..., 1:] == -1)).all(), "listed twice"


def reference(section: ModuleType, monkeypatch: pytest.MonkeyPatch, change: Any = lambda *given: given) -> None:
    """The specification instead of a kernel, behind a mistake, with one query head of a KV head: a case of every form."""
    monkeypatch.setattr(section, "FANS", (1,))

    def attend(*given: Any, **sizes: Any) -> Tensor:
        return block_attention(*change(*given), **sizes, backend="reference")

    monkeypatch.setattr(section, "kernels", lambda inputs: {"host": attend})


def test_the_specification_passes(section: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    reference(section, monkeypatch)
    made = list(section.checks(CPU, (1, 129)))
    assert len(made) == 2 * 2 * 8 and [check for check in made if not check.passed] == []
    assert {form for form in FORMS if any(form in check.case for check in made)} == set(FORMS)


def forget(q: Tensor, k: Tensor, v: Tensor, summaries: Any, pages: Any, bias: Any) -> tuple[Any, ...]:
    """The last recalled chunk of the last chunk."""
    if pages is not None:
        index = pages.index.clone()
        index[:, -1, :, -1] = -1
        pages = Pages(pages.k, pages.v, pages.lengths, index)
    return q, k, v, summaries, pages, bias


def other_bias(q: Tensor, k: Tensor, v: Tensor, summaries: Any, pages: Any, bias: Any) -> tuple[Any, ...]:
    """The levels' biases in another order."""
    return q, k, v, summaries, pages, None if bias is None else bias.roll(1, dims=3)


def scaled(q: Tensor, k: Tensor, v: Tensor, summaries: Any, pages: Any, bias: Any) -> tuple[Any, ...]:
    """The gradient of the values, not the output."""
    return q, k, v + (v - v.detach()) * 0.05, summaries, pages, bias


@pytest.mark.parametrize("change", [forget, other_bias, scaled])
def test_a_mistake_fails(section: ModuleType, monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    reference(section, monkeypatch, change)
    wrong = [check for check in section.checks(CPU, (129,)) if not check.passed]
    assert wrong and all("host: " in check.case for check in wrong)


def test_what_is_written_on_padding_fails(section: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(section, "FANS", (1,))

    def attend(*given: Any, **sizes: Any) -> Tensor:
        return block_attention(*given, **sizes, backend="reference") + given[0].isnan() * 1e-6

    monkeypatch.setattr(section, "kernels", lambda inputs: {"host": attend})
    wrong = [check.case for check in section.checks(CPU, (129,)) if not check.passed]
    assert wrong and any(case.endswith("padding") for case in wrong)


def test_a_long_row_is_compared_on_a_sample(section: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = section.Inputs.draw

    def small(device: torch.device, slots: int, *, heads: int, **others: Any) -> Any:
        assert slots == 4097 and heads == 28
        return drawn(device, 1300, heads=4, groups=2, channels=64, window=2, recalled=2, **{**others, "sampled": SAMPLE})

    monkeypatch.setattr(section.Inputs, "draw", small)
    monkeypatch.setattr(section, "_sample", lambda slots, device: SAMPLE)
    for change, passes in ((lambda *given: given, True), (forget, False), (scaled, False)):
        reference(section, monkeypatch, change)
        made = list(section.checks(CPU, (4097,)))
        assert len(made) == 2 and all(check.passed for check in made) == passes, made


SAMPLE = torch.tensor([0, 5, 10])


def test_flops_are_of_the_pairs_that_see_each_other(section: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of window 2, 2 recalled and a chunk's summaries; and the dense ones."""
    drawn = section.Inputs.draw
    monkeypatch.setattr(
        section.Inputs, "draw", lambda device, slots: drawn(device, slots, heads=4, groups=2, channels=64, window=2, recalled=0)
    )
    reference(section, monkeypatch)
    monkeypatch.setattr(section, "_recall", lambda clock, slots: 1.0)
    clock = sys.modules["verify_common"].Clock(CPU, repetitions=3)
    forward, backward, recall = section.benchmarks(clock, (512,))
    near = 4 * 128 * 129 // 2 + 3 * 128 * 128
    assert forward.flops == 2 * 2 * 64 * 4 * (near + 128 * (1 + 2)) and backward.flops == 5 * forward.flops // 2
    assert set(forward.peers) == {"SDPA"} and forward.ms > 0 and backward.ms > 0 and recall.case.startswith("recall")


def test_which_kernels_run_where(section: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    at = {size: section.Inputs.draw(CPU, 128, heads=2, groups=1, channels=128, size=size) for size in (64, 128)}
    for capability, expected in {(8, 0): ["mma"], (8, 6): [], (9, 0): ["mma", "wgmma"]}.items():
        monkeypatch.setattr(section.library, "capability", lambda device, found=capability: found)
        assert list(section.kernels(at[128])) == expected
        assert list(section.kernels(at[64])) == expected[:1], "wgmma has chunks of 128 only"


def test_goals_are_told(section: ModuleType) -> None:
    peers = {"cuDNN": {"forward": 10.0}, "flex": {"forward": 1.4}}
    told = section._goal("forward", 131072, 7.4, 10.0, 1.0, peers)
    assert told == "goal 0.75 of cuDNN's TFLOP/s: 0.74, missed, 10x cuDNN met, 1.5x flex missed"
    assert section._goal("forward", 4096, 1.0, 10.0, 1.0, peers) == ""
