"""Chosen steps leave a trace; the others leave nothing."""

from __future__ import annotations

import json

import pytest
import torch

from mka_megatron.config.errors import ConfigError
from mka_megatron.training.profile import check, step_profile


def test_only_the_chosen_step_is_traced(tmp_path) -> None:
    matrix = torch.ones(8, 8)
    for step in range(1, 4):
        with step_profile(step, (2,), (), tmp_path / "profile", rank=1):
            matrix @ matrix
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["step_0000002_rank1.json"]
    events = json.loads((tmp_path / "profile" / "step_0000002_rank1.json").read_text())["traceEvents"]
    assert any(event.get("name") == "aten::mm" for event in events)


def test_nothing_is_created_without_a_chosen_step(tmp_path) -> None:
    with step_profile(1, (), (), tmp_path / "profile", rank=0):
        pass
    assert not (tmp_path / "profile").exists()


def test_memory_snapshots_without_cuda_are_refused() -> None:
    check((), torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"logging\.memory_snapshot_steps.*leave the key empty"):
        check((3,), torch.device("cpu"))
