"""Tensor-parallel regions sum what they should, also for transposed gradients (which megatron-core 0.16.1 does not)."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.helpers.launch import torchrun


def test_gradients_are_summed_whatever_their_layout(tmp_path):
    torchrun(Path(__file__).with_name("regions_worker.py"), tmp_path, ranks=2, timeout=300)
    ranks = [load_file(tmp_path / f"rank{rank}.safetensors") for rank in range(2)]
    total = (ranks[0]["weight"] + ranks[1]["weight"]).t()
    for rank, found in enumerate(ranks):
        assert torch.equal(found["entered"], total)
        assert torch.equal(found["reduced"], torch.full((5, 3), 3.0))
        assert torch.equal(found["left"], torch.full((3, 5), 2.0 * (rank + 1)))
        assert torch.equal(found["partial"], total)
        assert torch.equal(found["whole"], found["weight"].t())
