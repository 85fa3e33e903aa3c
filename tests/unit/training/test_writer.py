"""A file that cannot be written is a problem to tell of, whatever went wrong, and never a file that is left out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mka_megatron.training.writer import BackgroundWriter, HashingFile, Writer


@pytest.mark.parametrize("kind", [Writer, BackgroundWriter])
def test_memory_that_is_not_there_is_a_problem_of_this_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Writer]) -> None:
    def write(self: HashingFile, data: object) -> int:
        raise MemoryError

    monkeypatch.setattr(HashingFile, "write", write)
    monkeypatch.setattr(dist, "get_rank", lambda: 3)
    writer = kind(tmp_path)
    writer.save({"a": torch.ones(3)}, tmp_path / "a.pt")
    writer.close()
    writer.wait()
    assert writer.done and writer.files == {}
    assert writer.problem is not None and writer.problem.startswith("rank 3, a.pt: ")


@pytest.mark.parametrize("kind", [Writer, BackgroundWriter])
def test_what_cannot_be_pickled_raises_on_no_rank_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Writer]) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    writer = kind(tmp_path)
    writer.save({"a": lambda: None}, tmp_path / "a.pt")
    writer.close()
    writer.wait()
    assert writer.files == {} and writer.problem is not None
