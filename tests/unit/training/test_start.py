"""Where a run may start, and that rank 0 goes first."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from mka_megatron.config.errors import ConfigError
from mka_megatron.config.schema import DataConfig, TrainingConfig
from mka_megatron.training import manifest, start
from mka_megatron.training.manifest import Checkpoint, CheckpointError
from mka_megatron.training.start import check_output


def test_a_fresh_start_keeps_its_hands_off_checkpoints(tmp_path) -> None:
    fresh = TrainingConfig(output_dir=str(tmp_path / "run"), resume="none")
    check_output(fresh)
    check_output(fresh)
    (tmp_path / "run" / "checkpoints" / "step-00000008").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"^training\.resume is none: .* holds later checkpoints, .*move step-00000008 .*\.$"):
        check_output(fresh)
    check_output(TrainingConfig(output_dir=str(tmp_path / "run"), resume="auto"))


def test_going_back_does_not_leave_later_checkpoints_behind(tmp_path) -> None:
    for step in (8, 16):
        (tmp_path / "run" / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)

    def start(step: int, output: str = "run") -> None:
        path = tmp_path / "run" / "checkpoints" / f"step-{step:08d}"
        check_output(TrainingConfig(output_dir=str(tmp_path / output), resume=str(path)))

    start(16)
    start(8, output="elsewhere")
    with pytest.raises(ConfigError, match=r"^training\.resume is .* move step-00000016 .*\.$"):
        start(8)


def test_another_runs_checkpoint_does_not_begin_over_later_ones(tmp_path) -> None:
    """The next save would remove them: those that this very command wrote before it was interrupted, too."""
    (tmp_path / "run" / "checkpoints" / "step-00000012").mkdir(parents=True)

    def start(path: str) -> None:
        check_output(TrainingConfig(output_dir=str(tmp_path / "run"), resume=str(tmp_path / path)))

    start("other/checkpoints/step-00000012")
    for path in ("other/checkpoints/step-00000008", "kept/best"):
        with pytest.raises(ConfigError, match=r"^training\.resume is .*: .* holds later checkpoints, .* move step-00000012 .*\.$"):
            start(path)


def test_a_run_that_began_at_a_path_is_not_another_future(tmp_path) -> None:
    path, other = tmp_path / "other/checkpoints/step-00000008", tmp_path / "third/step-00000008"
    for step, begun in ((12, path), (16, path)):
        folder = tmp_path / "run" / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        manifest.write(folder, {"step": step, "state": {"begun_at": str(begun)}, "files": {}})
    check_output(TrainingConfig(output_dir=str(tmp_path / "run"), resume=str(path)))
    (folder / manifest.NAME).write_text("damaged")
    check_output(TrainingConfig(output_dir=str(tmp_path / "run"), resume=str(path)))
    with pytest.raises(ConfigError, match=r"holds later checkpoints, .* move step-00000016"):
        check_output(TrainingConfig(output_dir=str(tmp_path / "run"), resume=str(other)))


def test_an_output_directory_that_cannot_be(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^training\.output_dir is .*file/run: it cannot be created .*\.$"):
        check_output(TrainingConfig(output_dir=str(tmp_path / "file" / "run")))


def test_a_tokenizer_that_changed_with_the_text_is_refused(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has as many entries as before, and other ids: the model would go on without a word, and begin anew."""
    found = Checkpoint(tmp_path / "step-00000004", {"state": {"tokenizer": "cache/a", "tokenizer_fingerprint": "before"}})
    monkeypatch.setattr(start.checkpoint, "newest_intact", lambda folder: found)
    monkeypatch.setattr(start.checkpoint, "load", lambda engine, checkpoint: checkpoint.body["state"])
    training = TrainingConfig(output_dir=str(tmp_path))

    def go_on(fingerprint: str, **data: str) -> None:
        engine = SimpleNamespace(config=SimpleNamespace(data=DataConfig(**data)))
        assert start.resume(engine, training, SimpleNamespace(fingerprint=fingerprint)) == (found.path, found.body["state"])

    go_on("before")
    go_on("after", tokenizer="chosen")
    with pytest.raises(CheckpointError, match=r"trained with the tokenizer cache/a, .*; set data\.tokenizer to the former, or"):
        go_on("after")
    found.body["state"].clear()  # of an older version
    go_on("after")


_RANK = """
import sys
from pathlib import Path
import torch.distributed as dist
from types import SimpleNamespace
from mka_megatron.data.batch import DataError
from mka_megatron.training.start import PeerFailedError, rank_0_first
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
topology = SimpleNamespace(rank=rank, world_size=2)
def works():
    if rank == 0:
        (folder / "prepared").write_text("")
    return (folder / "prepared").exists()
def fails():
    raise DataError("no data")
print(rank_0_first(works, topology))
try:
    rank_0_first(fails, topology)
except (DataError, PeerFailedError) as error:
    print(type(error).__name__)
dist.destroy_process_group()
"""


def test_rank_0_prepares_and_the_others_learn_how_it_went(tmp_path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _RANK, str(rank), str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    printed = [rank.communicate(timeout=120)[0].split() for rank in ranks]
    assert printed == [["True", "DataError"], ["True", "PeerFailedError"]]
