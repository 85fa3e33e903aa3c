"""Every kernel on a GPU against its specification there. The cases are those of kernels/verify.py."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mka_megatron.ops import library

KERNELS = Path(__file__).parents[2] / "kernels"
THERE, WHY = library.available()
pytestmark = pytest.mark.skipif(not THERE, reason=f"the kernels cannot run: {WHY}")


@pytest.fixture(params=["decode", "layer", "recall", "route_fuse"])
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
