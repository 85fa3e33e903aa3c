"""Published once, whole, whoever starts or dies."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from mka_megatron.data.batch import DataError
from mka_megatron.data.cache import publish

SPAWN = multiprocessing.get_context("spawn")


def build_slowly(directory: Path) -> None:
    (directory / "a").write_text("half")
    with open(directory.parent / "built", "a") as log:
        log.write("x")
    time.sleep(0.5)
    (directory / "a").write_text("whole")


def build_until_killed(directory: Path) -> None:
    (directory / "a").write_text("half")
    (directory.parent / "started").touch()
    time.sleep(60)


def publish_and_check(final: Path, failed: Path, all_ready: Barrier) -> None:
    all_ready.wait(120)
    publish(final, build_slowly)
    if (final / "a").read_text() != "whole":
        failed.touch()


def test_one_of_many_builds_and_all_see_it_whole(tmp_path: Path) -> None:
    arguments = (tmp_path / "x", tmp_path / "failed", SPAWN.Barrier(3))
    processes = [SPAWN.Process(target=publish_and_check, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    publish_and_check(*arguments)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert (tmp_path / "built").read_text() == "x"
    assert not (tmp_path / "failed").exists()


def test_who_waits_for_another_process_tells_of_it(tmp_path: Path) -> None:
    """Or a watchdog would take hours of another job's tokenising for a hang of this one."""
    told = []
    with open(tmp_path / ".x.lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)

        def waiting() -> None:
            told.append(time.monotonic())
            if len(told) == 3:
                fcntl.flock(other, fcntl.LOCK_UN)

        publish(tmp_path / "x", lambda directory: None, waiting)
    assert len(told) == 3


def test_a_killed_build_leaves_nothing_that_is_taken_for_complete(tmp_path: Path) -> None:
    process = SPAWN.Process(target=publish, args=(tmp_path / "x", build_until_killed))
    process.start()
    while not (tmp_path / "started").exists():
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (tmp_path / "x").exists()
    assert len(list(tmp_path.glob(".x.tmp-*"))) == 1
    publish(tmp_path / "x", build_slowly)
    assert (tmp_path / "x/a").read_text() == "whole"
    assert not list(tmp_path.glob(".x.tmp-*")), "the remains are cleared away"


def test_a_failed_build_leaves_nothing_and_can_be_repeated(tmp_path: Path) -> None:
    def fail(directory: Path) -> None:
        (directory / "a").write_text("half")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        publish(tmp_path / "x", fail)
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob(".x.tmp-*"))
    publish(tmp_path / "x", lambda directory: (directory / "a").touch())
    assert (tmp_path / "x/a").exists()


def test_what_is_there_is_not_built_again_nor_locked(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()

    def never(directory: Path) -> None:
        raise AssertionError

    publish(tmp_path / "x", never)
    assert [path.name for path in tmp_path.iterdir()] == ["x"], "a read-only cache is enough"


def test_disk_and_directory_errors_are_sentences(tmp_path: Path) -> None:
    def full(directory: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(DataError, match=r"data\.cache_dir: .*the disk is full"):
        publish(tmp_path / "x", full)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"data\.cache_dir: .*file: cannot be written"):
        publish(tmp_path / "file/x", full)
