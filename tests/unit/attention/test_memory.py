"""Peak memory of a long sequence, forward and backward: no [S, S] tensor anywhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]

SCRIPT = """
import resource, sys
import torch
from mka_megatron.attention.grouped import causal_attention
from mka_megatron.attention.mka import score_mixture
from mka_megatron.memory.documents import Documents

torch.set_num_threads(1)

def step(name, sequence):
    def leaf(heads, channels=16):
        return torch.randn(1, sequence, heads, channels, requires_grad=True)
    where = Documents.unpacked(1, sequence)
    if name == "score":
        keys, values = [leaf(1), leaf(1)], [leaf(1), leaf(1)]
        out = score_mixture(leaf(2), keys, values, torch.zeros(1, sequence, 2, requires_grad=True), where, 0.25)
    else:
        out = causal_attention(leaf(2), leaf(1), leaf(1, 8 if name == "narrow" else 16), where, 0.25)
    out.sum().backward()

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

name, sequence = sys.argv[1], int(sys.argv[2])
step(name, 128)
before = peak()
step(name, sequence)
print(peak() - before)
"""


@pytest.mark.parametrize("core", ["equal", "narrow", "score"])
def test_the_peak_stays_below_one_head_of_scores(core: str) -> None:
    sequence = 8192
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, core, str(sequence)],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    # one bool per (query, key) would be sequence**2 bytes
    assert int(run.stdout) < sequence**2
