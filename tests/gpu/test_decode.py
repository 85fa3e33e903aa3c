"""The decode's kernels on a GPU against the reference there. The cases are those of kernels/verify.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mka_megatron.ops import library

KERNELS = Path(__file__).parents[2] / "kernels"
THERE, WHY = library.available()
pytestmark = pytest.mark.skipif(not THERE, reason=f"the kernels cannot run: {WHY}")


@pytest.mark.parametrize("slots", [1, 127, 128, 129, 4096, 32768])
def test_decode(slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(KERNELS)
    import verify_decode

    wrong = [check for check in verify_decode.checks(torch.device("cuda"), (slots,)) if not check.passed]
    assert wrong == []


def test_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels run in a CUDA graph, with the results of plain calls."""
    monkeypatch.syspath_prepend(KERNELS)
    import verify_decode

    for _, launch in verify_decode.launches(torch.device("cuda")):
        expected = launch()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = launch()
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(one.nan_to_num(), other.nan_to_num()) for one, other in zip(found, expected, strict=True))
