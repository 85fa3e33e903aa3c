"""A Hugging Face checkpoint gives the same logits at every tensor-parallel size, under ZeRO-3 and with shared rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.hf_checkpoints import TOKENS, random_model, save
from tests.helpers.launch import torchrun

WORKER = Path(__file__).with_name("hf_import_worker.py")
FAMILIES = ("qwen2", "qwen3", "llama-tied")
LAYOUTS = {
    "tp2": (2, ["parallel.tensor_parallel=2"]),
    "tp4-sp": (4, ["parallel.tensor_parallel=4", "parallel.sequence_parallel=true"]),
    "tp8-two-ranks-per-kv-head": (8, ["parallel.tensor_parallel=8"]),
    "zero3-dp2": (2, ["engine.zero_stage=3", "training.global_batch_size=16"]),
    "zero3-cp2": (2, ["engine.zero_stage=3", "parallel.context_parallel=2"]),
    "zero3-tp2-dp2": (4, ["engine.zero_stage=3", "training.global_batch_size=16", "parallel.tensor_parallel=2"]),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Per family: its directory and its logits in fp32 and fp64."""
    found = {}
    for family in FAMILIES:
        model = random_model(family)
        directory = save(model, tmp_path_factory.mktemp(family), sharded=True)
        with torch.no_grad():
            found[family] = (directory, model(TOKENS).logits, model.double()(TOKENS).logits)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_equal_hugging_face(layout, models, tmp_path):
    ranks, overrides = LAYOUTS[layout]
    directories = tmp_path / "directories.json"
    directories.write_text(json.dumps({family: str(directory) for family, (directory, *_) in models.items()}))
    out = tmp_path / "logits.safetensors"
    torchrun(WORKER, directories, out, *overrides, ranks=ranks, timeout=600)
    found = load_file(out)
    for family, (_, theirs, exact) in models.items():
        own_error = (theirs.double() - exact).abs().max()
        error = (found[family].double() - exact).abs().max()
        assert error <= 2 * own_error + torch.finfo(torch.float32).eps * exact.abs().max(), family
