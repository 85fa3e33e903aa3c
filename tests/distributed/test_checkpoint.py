"""Checkpoints on two real ranks: bitwise resume, damage, refusals, and a disk that is full."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.launch import torchrun

WORKER = Path(__file__).with_name("checkpoint_worker.py")
ZERO = [f"zero{stage}" for stage in range(4)]
RESUMED = [
    *ZERO, "zero1 cpu", "zero2 cpu", "zero3 cpu", "zero3 cpu, parameters cpu", "zero3 parameters cpu",
    *(f"{zero} {half}" for zero in ZERO for half in ("bf16", "fp16")), "tp2 zero1", "tp2 zero3", "cp2 zero1", "cp2 zero3",
    "zero3 nvme", "zero3 nvme, parameters nvme", "zero3 cpu, parameters nvme", "zero3 nvme fp16",
]


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | None]:
    """A file system with room for two checkpoints; None where this user may not mount one."""
    folder = tmp_path_factory.mktemp("disk")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(folder)], capture_output=True, check=False,  # noqa: S607
    )
    if mounted.returncode != 0:
        yield None
        return
    yield folder
    subprocess.run(["umount", str(folder)], check=True)  # noqa: S607


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, async_io: bool, small_disk: Path | None) -> dict:
    directory = tmp_path_factory.mktemp("checkpoint")
    torchrun(WORKER, directory, "nvme" if async_io else "no-nvme", small_disk or "-", ranks=2, timeout=900)
    return json.loads((directory / "results.json").read_text())


@pytest.mark.parametrize("name", RESUMED)
def test_resume_is_bitwise(results: dict, name: str) -> None:
    """Losses, gradient norms, scales and an evaluation equal the uninterrupted run's, and so do random numbers."""
    if f"resume {name}" not in results:
        pytest.skip("async_io cannot be built here: libaio's header is missing")
    for rank in results[f"resume {name}"]:
        assert rank["unlike"]  # the engine it was loaded into had other weights
        assert rank["step"] == 4
        assert rank["resumed"] == rank["straight"]
        assert rank["draws"][0] == rank["draws"][1]
        assert rank["state"] == {"consumed_samples": 32, "note": "é"}


@pytest.mark.parametrize("stage", ZERO)
def test_the_loss_scale_has_a_state_to_resume(results: dict, stage: str) -> None:
    """Or the test above would say nothing about it: it changes before the save and after."""
    scales = results[f"resume {stage} fp16"][0]["scales"]
    assert len(set(scales[:4])) > 1
    assert len(set(scales[4:])) > 1


def test_the_newest_intact_checkpoint_is_found(results: dict) -> None:
    """Truncated, bit flipped in a file of rank 1, bit flipped in the manifest, manifest gone; then saved again."""
    for rank in results["damage"]:
        assert rank["kept"] == [f"step-0000000{step}" for step in (2, 3, 4, 5)]
        assert rank["found"] == [5, 4, 3, 2, None, 5]
        assert rank["left"] == ["step-00000005"]


def test_going_back_removes_the_later_checkpoints(results: dict) -> None:
    for rank in results["damage"]:
        assert rank["back"] == ["step-00000003"]


def test_what_is_wrong_with_a_passed_over_checkpoint_is_said_once_and_by_name(results: dict) -> None:
    first, second = results["damage"]
    assert second["log"] == []
    last_search = first["log"][-5:]
    for line, step, reason in zip(
        last_search[:4],
        (5, 4, 3, 2),
        ("(truncated?)", "rng-00001.pt has the wrong SHA-256", "manifest.json", "no readable manifest.json"),
        strict=True,
    ):
        assert f"step-0000000{step} is not intact" in line
        assert reason in line
    assert last_search[4].endswith("is intact.")


def test_a_damaged_checkpoint_is_refused_by_name(results: dict) -> None:
    for rank in results["damage"]:
        assert "step-00000004 is not intact: rng-00001.pt has the wrong SHA-256" in rank["refused"]
        assert rank["untouched"] == 5


@pytest.mark.parametrize("stage", ["zero0", "zero3"])
@pytest.mark.parametrize("failing", [0, 1])
def test_one_rank_that_cannot_write_stops_the_save_on_all(results: dict, stage: str, failing: int) -> None:
    """No rank hangs, the older checkpoint stays alone, nothing temporary is left, and the next save works."""
    for rank in results[f"refused {stage} {failing}"]:
        assert "step-00000002 could not be written" in rank["said"]
        assert f"(rank {failing}, " in rank["said"]
        assert "File too large" in rank["said"]
        assert "older checkpoints" in rank["said"]
        assert rank["left"] == ["step-00000001"]
        assert rank["newest"] == 1
        assert rank["again"] == ["step-00000002"]


def test_a_full_disk_leaves_the_older_checkpoint_intact(results: dict, small_disk: Path | None) -> None:
    if small_disk is None:
        pytest.skip("this user may not mount a small file system")
    for rank in results["full disk"]:
        assert "No space left on device" in rank["said"]
        assert rank["left"] == ["step-00000001"]
        assert rank["newest"] == 1
        assert rank["again"] == ["step-00000002"]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("precision", "training.precision fp32, but this run has bf16"),
        ("model", "routing.gate_hidden_size 16, but this run has 8"),
    ],
)
def test_another_precision_or_model_is_refused(results: dict, name: str, sentence: str) -> None:
    for rank in results["mismatches"]:
        assert sentence in rank[name]


def test_the_configuration_decides_hyperparameters_after_a_resume(results: dict) -> None:
    for rank in results["mismatches"]:
        assert rank["hyperparameters"] == [0.3, [0.9, 0.9]]


BACKGROUND = ["zero0", "zero1", "zero3"]


@pytest.mark.parametrize("stage", BACKGROUND)
def test_a_save_in_the_background_has_the_state_of_its_step(results: dict, stage: str) -> None:
    """Bit for bit the files of a save that training waited for, although three steps were taken before one was written."""
    for rank in results[f"background {stage}"]:
        assert rank["before"]["names"] == [".tmp-step-00000002"]
        assert rank["before"]["published"] == 0
        assert rank["same"]
        assert rank["state"] == {"consumed_samples": 16}
        assert rank["resumed"] == rank["straight"]


@pytest.mark.parametrize("stage", BACKGROUND)
def test_at_most_one_copy_is_in_host_memory(results: dict, stage: str) -> None:
    """All ranks' copies are what the files hold; the next save waits for the slower rank, then there is nothing left of it."""
    ranks = results[f"background {stage}"]
    for rank in ranks:
        assert rank["before"]["still"] == rank["before"]["copy"] > 0
        assert rank["took"] > max(each["delay"] for each in ranks) - 0.25
        assert rank["on_return"] == ["step-00000002"]
        assert rank["copies"] == [0, 0, 0, 0]
        assert rank["after"] == 0
        assert rank["threads"] == []
    assert sum(rank["before"]["copy"] for rank in ranks) == ranks[0]["size"]


@pytest.mark.parametrize("stage", BACKGROUND)
def test_a_background_write_that_fails_is_reported_on_all_ranks(results: dict, stage: str) -> None:
    """At a later boundary, in the same sentence; the checkpoints before it stay, and the next save works."""
    for rank in results[f"background {stage}"]:
        assert "step-00000008 could not be written (rank 1, " in rank["said"]
        assert "File too large" in rank["said"]
        assert rank["left"] == ["step-00000002", "step-00000005"]
        assert rank["newest"] == ["step-00000005", "step-00000008"]
