"""The fusion's kernels on a GPU against the specification in fp64. The cases are those of kernels/verify.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mka_megatron.ops import library

KERNELS = Path(__file__).parents[2] / "kernels"
THERE, WHY = library.available()
pytestmark = pytest.mark.skipif(not THERE, reason=f"the kernels cannot run: {WHY}")


@pytest.mark.parametrize("slots", [1, 127, 128, 129, 4096, 32768])
def test_route_fuse(slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(KERNELS)
    import verify_route_fuse

    wrong = [check for check in verify_route_fuse.checks(torch.device("cuda"), (slots,)) if not check.passed]
    assert wrong == []


def test_two_runs_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(KERNELS)
    import verify_route_fuse

    for _, launch in verify_route_fuse.launches(torch.device("cuda")):
        assert all(torch.equal(one, other) for one, other in zip(launch(), launch(), strict=True))
