"""A checkpoint verifies only if every byte of it is what was written."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from mka_megatron.training import manifest
from mka_megatron.training.manifest import CheckpointError

FILES = {"deepspeed/a.pt": b"tensors" * 1000, "rng-00000.pt": b"r"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    entries = {}
    for name, content in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        entries[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest.write(tmp_path, {"step": 7, "state": {"consumed_samples": 56}, "files": entries})
    return tmp_path


def test_what_was_written_verifies(folder: Path) -> None:
    checkpoint = manifest.verify(folder)
    assert (checkpoint.path, checkpoint.step) == (folder, 7)
    assert checkpoint.body["state"] == {"consumed_samples": 56}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", [0, -1])
def test_one_flipped_bit_is_found(folder: Path, name: str, where: int) -> None:
    data = bytearray((folder / name).read_bytes())
    data[where] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{name} has the wrong SHA-256"):
        manifest.verify(folder)


@pytest.mark.parametrize("change", [b"", b"more"])
def test_another_length_is_found(folder: Path, change: bytes) -> None:
    path = folder / "deepspeed/a.pt"
    path.write_bytes(path.read_bytes() + change if change else path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"a\.pt has the wrong size"):
        manifest.verify(folder)


def test_a_missing_file_is_found(folder: Path) -> None:
    (folder / "rng-00000.pt").unlink()
    with pytest.raises(CheckpointError, match=r"rng-00000\.pt is missing"):
        manifest.verify(folder)


def test_a_missing_manifest_is_found(folder: Path, tmp_path: Path) -> None:
    (folder / manifest.NAME).unlink()
    with pytest.raises(CheckpointError, match=r"no readable manifest\.json"):
        manifest.verify(folder)


def test_every_flipped_bit_of_the_manifest_is_found(folder: Path) -> None:
    """Also in what no file's checksum covers: the step, the caller's state."""
    path = folder / manifest.NAME
    intact = path.read_bytes()
    accepted = []
    for position in range(len(intact)):
        data = bytearray(intact)
        data[position] ^= 1
        path.write_bytes(data)
        try:
            manifest.verify(folder)
        except CheckpointError:
            continue
        accepted.append(position)
    # White space between JSON's tokens carries nothing; a flip there may go unseen.
    assert all(intact[position : position + 1].isspace() for position in accepted)


def test_a_manifest_of_another_format_is_refused(folder: Path) -> None:
    path = folder / manifest.NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    with pytest.raises(CheckpointError, match="manifest format 2, not 1"):
        manifest.verify(folder)


_RANK = """
import sys
from pathlib import Path
import torch.distributed as dist
from mka_megatron.training import checkpoint, manifest
rank, output = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{output}/store", rank=rank, world_size=2)
read_text = Path.read_text
def stale(path, **options):
    if rank == int(sys.argv[3]) and path.parent.name == "step-00000002":
        raise OSError("stale file handle")
    return read_text(path, **options)
Path.read_text = stale
print(checkpoint.newest_intact(output).path.name)
dist.destroy_process_group()
"""


@pytest.mark.parametrize(("blind", "found"), [(0, "step-00000001"), (1, "step-00000002")])
def test_all_ranks_go_on_from_the_same_checkpoint(tmp_path: Path, blind: int, found: str) -> None:
    """Also where one of them, on another machine, does not see a manifest: rank 0's counts."""
    for step in (1, 2):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        manifest.write(folder, {"step": step, "files": {}})
    ranks = [
        subprocess.Popen([sys.executable, "-c", _RANK, str(rank), str(tmp_path), str(blind)], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]  # fmt: skip
    assert [rank.communicate(timeout=120)[0].strip() for rank in ranks] == [found] * 2
