"""Cores per rank, by affinity, container quota and OMP_NUM_THREADS."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from mka_megatron.training import host


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(host, "_CGROUP_QUOTA", tmp_path / "cpu.max")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("quota", "cores"),
    [(None, 8), ("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1), ("1600000 100000", 8)],
)
def test_cores_are_what_affinity_and_the_container_leave(quota, cores, tmp_path) -> None:
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota + "\n")
    assert host.available_cores() == cores


@pytest.mark.parametrize(
    ("ranks", "omp", "threads"), [(1, None, 8), (2, None, 4), (2, "1", 4), (16, "1", 1), (1, "3", 3), (2, "3", 3)]
)
def test_threads_per_rank(ranks, omp, threads, monkeypatch) -> None:
    if omp is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
        torch.set_num_threads(int(omp))  # as PyTorch does when it starts
    assert host.use_cores(ranks) == threads == torch.get_num_threads()


def test_memory_is_of_this_process() -> None:
    assert 0.01 < host.memory_gib(torch.device("cpu"))["max_resident"] < 1024
