"""One run per directory, a folder per rank, nothing left behind, nothing for other users' eyes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import stat
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from mka_megatron.memory.tiers.ownership import Ownership
from mka_megatron.memory.tiers.pages import TierError

FORK = multiprocessing.get_context("fork")


def hold(directory: Path, run: str, rank: int, pipe: Connection) -> None:
    try:
        owned = Ownership(directory, run, rank)
    except TierError as error:
        pipe.send(str(error))
        return
    (owned.folder / "segment-00000.pages").write_bytes(bytes(100))
    pipe.send(None)
    pipe.recv()
    owned.close()


class Other:
    """Another process that owns a rank's folder."""

    def __init__(self, directory: Path, run: str, rank: int = 0) -> None:
        self.pipe, theirs = FORK.Pipe()
        self.process = FORK.Process(target=hold, args=(directory, run, rank, theirs))
        self.process.start()
        self.refusal = self.pipe.recv()

    def end(self) -> None:
        self.pipe.send("close")
        self.process.join()

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()


@pytest.fixture
def others() -> Iterator[list[Other]]:
    started: list[Other] = []
    yield started
    for other in started:
        if other.process.is_alive():
            other.kill()


def test_a_second_run_is_refused_and_told_of_the_first(tmp_path: Path, others: list[Other]) -> None:
    others.append(Other(tmp_path, "first"))
    with pytest.raises(TierError) as refusal:
        Ownership(tmp_path, "second", 0)
    assert str(refusal.value) == (
        f"memory_hierarchy.ssd_spill_path is {tmp_path}: run first (pid {others[0].process.pid} on "
        f"{socket.gethostname()}) uses it, give every run a directory of its own."
    )
    assert (tmp_path / "mka-pages-first-00000/segment-00000.pages").exists()
    others[0].end()
    Ownership(tmp_path, "second", 0).close()
    assert not list(tmp_path.iterdir())


def test_ranks_of_a_run_share_a_directory(tmp_path: Path, others: list[Other]) -> None:
    mine = Ownership(tmp_path, "run", 0)
    others += [Other(tmp_path, "run", rank) for rank in (1, 2)]
    assert [other.refusal for other in others] == [None, None]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "mka-pages-run-00000", "mka-pages-run-00001", "mka-pages-run-00002", "mka-pages.lock"]  # fmt: skip
    mine.close()
    # the directory is still theirs
    assert "run run" in Other(tmp_path, "second").refusal
    for other in others:
        other.end()
    assert not list(tmp_path.iterdir())


def test_a_rank_twice_is_refused(tmp_path: Path, others: list[Other]) -> None:
    others.append(Other(tmp_path, "run", 1))
    with pytest.raises(TierError, match="rank 1 of run run already uses it"):
        Ownership(tmp_path, "run", 1)
    Ownership(tmp_path, "run", 0).close()
    assert (tmp_path / "mka-pages-run-00001/segment-00000.pages").exists()


@pytest.mark.parametrize("run", ["killed", "next"])
def test_what_a_killed_run_left_is_removed(tmp_path: Path, others: list[Other], run: str) -> None:
    others += [Other(tmp_path, "killed", rank) for rank in (0, 1)]
    for other in others:
        other.kill()
    assert (tmp_path / "mka-pages-killed-00001/segment-00000.pages").exists()
    owned = Ownership(tmp_path, run, 0)
    assert sorted(path.name for path in owned.removed) == ["mka-pages-killed-00000", "mka-pages-killed-00001"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"mka-pages-{run}-00000", "mka-pages.lock"]
    assert [path.name for path in owned.folder.iterdir()] == ["lock"]
    owned.close()


def test_a_rank_that_died_alone_can_come_back(tmp_path: Path, others: list[Other]) -> None:
    others += [Other(tmp_path, "run", rank) for rank in (0, 1)]
    others[1].kill()
    Ownership(tmp_path, "run", 1).close()
    assert (tmp_path / "mka-pages-run-00000/segment-00000.pages").exists()


def test_files_of_others_stay(tmp_path: Path) -> None:
    (tmp_path / "mka-pages-old-00000").mkdir()
    (tmp_path / "mka-pages-old-00000/notes.txt").write_text("keep")
    (tmp_path / "thesis.tex").write_text("keep")
    target = tmp_path / "elsewhere"
    target.mkdir()
    (target / "segment-00000.pages").write_text("keep")
    (tmp_path / "mka-pages-link-00000").symlink_to(target)
    Ownership(tmp_path, "run", 0).close()
    kept = ("mka-pages-old-00000/notes.txt", "thesis.tex", "elsewhere/segment-00000.pages")
    assert all((tmp_path / name).read_text() == "keep" for name in kept)


def test_nobody_else_can_read(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        owned = Ownership(tmp_path / "new" / "spill", "run", 0)
    finally:
        os.umask(before)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (owned.folder.parent, owned.folder)] == [0o700, 0o700]
    files = [path for path in owned.folder.parent.rglob("*") if path.is_file()]
    assert len(files) == 2 and all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in files)
    owned.close()


def test_many_ranks_start_at_once(tmp_path: Path) -> None:
    """Each through its own opened lock, as processes would."""
    owned: list[Ownership] = []
    threads = [threading.Thread(target=lambda rank=rank: owned.append(Ownership(tmp_path, "run", rank))) for rank in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({each.folder for each in owned}) == 12 and all(each.folder.is_dir() for each in owned)
    for each in owned:
        each.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("run", ["", "a/b", "../up", "a b"])
def test_run_ids_are_names(tmp_path: Path, run: str) -> None:
    with pytest.raises(ValueError, match="run id"):
        Ownership(tmp_path, run, 0)
    assert not list(tmp_path.iterdir())
