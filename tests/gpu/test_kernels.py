"""Every kernel on a GPU against its specification there. The cases are those of kernels/verify.py."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mka_megatron.ops import library
from tools.attention_cores import Setting, Work
from tools.attention_layers import LAYERS

KERNELS = Path(__file__).parents[2] / "kernels"
THERE, WHY = library.available()
pytestmark = pytest.mark.skipif(not THERE, reason=f"the kernels cannot run: {WHY}")


@pytest.fixture(params=["block_attention", "decode", "layer", "recall", "route_fuse"])
def section(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The op's part of verify.py."""
    monkeypatch.syspath_prepend(KERNELS)
    return importlib.import_module(f"verify_{request.param}")


@pytest.mark.parametrize("slots", [1, 127, 128, 129, 4096, 32768])
def test_it_is_what_the_reference_is(section: ModuleType, slots: int) -> None:
    wrong = [check for check in section.checks(torch.device("cuda"), (slots,)) if not check.passed]
    assert wrong == []


def test_two_runs_and_a_captured_one_give_the_same_bits(section: ModuleType) -> None:
    for _, launch in section.launches(torch.device("cuda")):
        expected = launch()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = launch()
        graph.replay()
        torch.cuda.synchronize()
        for found in (launch(), captured):
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_block_attention_of_a_row_whose_offsets_pass_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(KERNELS)
    section = importlib.import_module("verify_block_attention")
    assert [check for check in section._long(torch.device("cuda"), section.LONGEST) if not check.passed] == []


def layer() -> Work:
    """FastMKA over the block core, from the QKV projection to the output projection, with gates, fusion and recall."""
    setting = Setting("cuda", "bfloat16", 8, 2, 64, 128, 256, 2, 128, "cuda", False, 1)
    return LAYERS["fastmka"].make(setting, 3000)


def passes(work: Work) -> list[torch.Tensor]:
    """The output and every gradient."""
    out = work.forward()
    return [out.detach(), *torch.autograd.grad(out, work.leaves, torch.ones_like(out))]


def test_a_layer_in_a_graph_gives_the_same_bits() -> None:
    work = layer()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = passes(work)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = passes(work)
    for x in captured:
        x.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(captured, expected, rtol=0, atol=0)
