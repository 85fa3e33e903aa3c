"""Before a run starts: what cannot fit into this host is refused, from the host's own figures."""

from __future__ import annotations

import fnmatch
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mka_megatron.config.errors import ConfigError
from mka_megatron.config.load import load_config
from mka_megatron.memory.tiers import ownership
from mka_megatron.training import __main__ as command
from mka_megatron.training import capacity, deepspeed_config

TINY = "configs/run/tiny.yaml"
HUGE = ["model.num_layers=1000", "model.hidden_size=8192", "model.ffn_hidden_size=65536"]  # 1.6e12 weights of MLPs
GIB = 1 << 30


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_WAIT_FOR_RANK_0", 0.0)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Ranks whose training was started."""
    ranks: list[int] = []

    def run(config: object, rank: int) -> int:
        ranks.append(rank)
        return 0

    monkeypatch.setattr(command, "run", run)
    return ranks


def test_what_cannot_fit_is_refused_before_anything_is_loaded(capsys, monkeypatch, started: list[int]) -> None:
    monkeypatch.setitem(sys.modules, "mka_megatron.training.loop", None)  # importing it would raise
    assert command.main([TINY, *HUGE]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and said.err.endswith(".\n")
    assert said.err.startswith("The run does not fit: a node's DRAM would need ")
    assert "--no-plan" in said.err
    assert started == []


def test_no_plan_starts_it(started: list[int]) -> None:
    assert command.main([TINY, *HUGE, "--no-plan"]) == 0
    assert started == [0]


def test_what_fits_starts(started: list[int]) -> None:
    assert command.main([TINY]) == 0
    assert started == [0]


def test_help_has_the_option(capsys) -> None:
    assert command.main(["--help"]) == 0
    assert "--no-plan" in capsys.readouterr().out


def test_a_rank_on_a_smaller_host_says_so_itself(capsys, monkeypatch, started: list[int]) -> None:
    monkeypatch.setenv("RANK", "3")
    assert command.main([TINY, *HUGE]) == 2
    assert capsys.readouterr().err.startswith("rank 3: The run does not fit: ")


def test_the_ranks_of_a_node_share_its_memory(monkeypatch) -> None:
    """One rank fits into twice its need, three do not; the same three on three nodes do."""
    config = load_config(TINY)
    need = sum(part.bytes for part in capacity.host_plan(config, 1, 1).device)
    monkeypatch.setattr(capacity, "memory_bytes", lambda: 2 * need)
    config = load_config(TINY, ["training.global_batch_size=12", "engine.zero_stage=0"])
    capacity.check_capacity(config, {})
    with pytest.raises(ConfigError, match="a node's DRAM"):
        capacity.check_capacity(config, {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"})
    capacity.check_capacity(config, {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "1"})


def test_a_gpu_has_what_it_reports(monkeypatch) -> None:
    config = load_config("configs/run/qwen2.5-7b.yaml", ["training.global_batch_size=32"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    ranks = {"WORLD_SIZE": "32", "LOCAL_WORLD_SIZE": "8"}

    def gpu(name: str, size: int) -> None:
        reported = SimpleNamespace(name=name, total_memory=size)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: reported)

    gpu("NVIDIA H100 80GB HBM3", 80 * GIB)
    capacity.check_capacity(config, ranks)
    gpu("Some Unknown GPU", 80 * GIB)
    capacity.check_capacity(config, ranks)
    gpu("NVIDIA H100 80GB HBM3", 8 * GIB)
    with pytest.raises(ConfigError, match=r"a GPU's memory would need .* and has 8\.00 GiB; "):
        capacity.check_capacity(config, ranks)


def test_a_disk_is_free_where_an_earlier_run_left_its_files(tmp_path: Path, monkeypatch) -> None:
    """Of a disk that several folders share the free space counts once, and what each has left; other files do not."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    nvme, spill = tmp_path / "nvme", tmp_path / "spill"
    for file, size in ((nvme / "run-0" / "swap" / "a", 200), (spill / "mka-pages-x-00000" / "segment-00000.pages", 30), (nvme / "other", 7)):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x" * size)
    assert capacity.disk_bytes([(nvme, "run-*")]) == 1200
    assert capacity.disk_bytes([(nvme, "run-*"), (spill, "mka-pages-*")]) == 1230
    assert capacity.disk_bytes([(tmp_path / "not" / "there", "run-*")]) == 1000


def test_a_disk_that_cannot_be_read_is_not_checked(tmp_path: Path, monkeypatch) -> None:
    def closed(path: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shutil, "disk_usage", closed)
    config = load_config(TINY, ["engine.zero_stage=3", "engine.offload_optimizer=nvme", f"engine.nvme_path={tmp_path}"])
    capacity.check_capacity(config, {})


def test_files_of_pages_and_of_swapping_have_the_names_that_are_looked_for() -> None:
    offloaded = ["engine.zero_stage=3", "engine.offload_optimizer=nvme", "engine.nvme_path=/nvme"]
    ours = deepspeed_config.build(load_config(TINY, offloaded), 1, False)
    assert Path(ours["zero_optimization"]["offload_optimizer"]["nvme_path"]).match(f"/nvme/{capacity.SWAPPED}")
    assert fnmatch.fnmatch("mka-pages-run-00000", capacity.SPILLED) and ownership._FOLDER.fullmatch("mka-pages-run-00000")


@pytest.mark.parametrize("problem", [ValueError("unrecognized configuration name"), OSError(22, "Invalid argument")])
def test_a_host_that_does_not_say_how_much_memory_it_has_is_not_checked(monkeypatch, problem: Exception, tmp_path: Path) -> None:
    def silent(name: str) -> int:
        raise problem

    monkeypatch.setattr(capacity, "_CGROUP_LIMIT", tmp_path / "memory.max")
    monkeypatch.setattr(os, "sysconf", silent)
    assert capacity.memory_bytes() is None
    capacity.check_capacity(load_config(TINY, HUGE), {})
    monkeypatch.setattr(os, "sysconf", lambda name: -1 if name == "SC_PHYS_PAGES" else 4096)
    assert capacity.memory_bytes() is None


def test_a_full_disk_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    config = load_config(TINY, ["engine.zero_stage=3", "engine.offload_optimizer=nvme", f"engine.nvme_path={tmp_path}"])
    with pytest.raises(ConfigError, match="a node's SSD would need"):
        capacity.check_capacity(config, {})


def test_a_container_with_less_memory_counts(tmp_path: Path, monkeypatch) -> None:
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(capacity, "_CGROUP_LIMIT", limit)
    assert capacity.memory_bytes() == whole
    limit.write_text("max\n")
    assert capacity.memory_bytes() == whole
    limit.write_text("1048576\n")
    assert capacity.memory_bytes() == 1 << 20
