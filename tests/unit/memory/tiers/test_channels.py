"""Reads and writes move bytes or say that they did not, whatever the system claims."""

from __future__ import annotations

import mmap
import os
import resource
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from mka_megatron.memory.tiers import channels
from mka_megatron.memory.tiers.builds import wait_for_build
from mka_megatron.memory.tiers.channels import Channel, PlainChannel, Stretch, factory
from mka_megatron.memory.tiers.writing import ALIGNMENT, write

PAGE = ALIGNMENT


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(bytes(16 * PAGE))
    return path


def lying(kept: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that writes a part of what it says."""
    real = os.pwritev

    def pwritev(file: int, parts: list[memoryview], offset: int) -> int:
        whole = sum(map(len, parts))
        if kept:
            real(file, [parts[0][: int(kept * len(parts[0]))]], offset)
        return whole

    monkeypatch.setattr(os, "pwritev", pwritev)


def record(pages: int, value: int) -> np.ndarray:
    """uint8 [pages * PAGE] on a memory page."""
    memory = np.frombuffer(mmap.mmap(-1, pages * PAGE), dtype=np.uint8)
    memory[:] = value
    return memory


@pytest.mark.parametrize("kept", [0, 0.5])
@pytest.mark.parametrize("offset", [0, 12 * PAGE])
def test_a_write_that_does_not_arrive_is_an_error(
    file: Path, kept: float, offset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lying(kept, monkeypatch)
    with pytest.raises(OSError, match=f"written at {offset} are not there when read back"):
        write(file, offset, [record(4, 7)], True)


@pytest.mark.parametrize("offset", [13 * PAGE, 16 * PAGE])
def test_a_write_does_not_lengthen_a_file(file: Path, offset: int) -> None:
    with pytest.raises(OSError, match="has been cut short"):
        write(file, offset, [record(4, 7)], True)
    assert file.read_bytes() == bytes(16 * PAGE)


def test_a_write_makes_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "missing", 0, [record(1, 7)], True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("direct", [True, False])
def test_records_are_written_one_behind_the_other(file: Path, direct: bool) -> None:
    write(file, 8 * PAGE, [record(2, 7), record(1, 8), record(1, 9)], direct)
    wanted = bytes([7]) * 2 * PAGE + bytes([8]) * PAGE + bytes([9]) * PAGE
    assert file.read_bytes() == bytes(8 * PAGE) + wanted + bytes(4 * PAGE)


@pytest.mark.parametrize("most", [1, 2, 3])
def test_a_short_write_goes_on(file: Path, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwritev

    def pwritev(file: int, parts: list[memoryview], offset: int) -> int:
        """At most so many pages, in the middle of a record too."""
        cut, left = [], most * PAGE
        for part in parts:
            cut.append(part[:left])
            left -= len(cut[-1])
        return real(file, [part for part in cut if len(part)], offset)

    monkeypatch.setattr(os, "pwritev", pwritev)
    write(file, 0, [record(2, 7), record(3, 8), record(1, 9)], True)
    wanted = bytes([7]) * 2 * PAGE + bytes([8]) * 3 * PAGE + bytes([9]) * PAGE
    assert file.read_bytes() == wanted + bytes(10 * PAGE)


@pytest.mark.parametrize("moved", [0, 100])
def test_a_write_that_stops_is_an_error(file: Path, moved: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwritev", lambda *_: moved)
    with pytest.raises(OSError, match=f"only {moved} of {4 * PAGE} bytes written at {PAGE}"):
        write(file, PAGE, [record(4, 7)], True)


@pytest.mark.parametrize("direct", [True, False])
def test_plain_reads(file: Path, direct: bool) -> None:
    check_stretches(PlainChannel(4 * PAGE, direct), file)


def test_aio_reads(file: Path, aio: str | None) -> None:
    if aio is not None:
        pytest.skip(aio)
    channel = factory("aio", file.parent, PAGE)[2](4 * PAGE)
    check_stretches(channel, file)
    channel.close()


def check_stretches(channel: Channel, file: Path) -> None:
    """They arrive one behind the other, and are told of one by one."""
    other = file.with_name("other")
    stretches = [Stretch(file, 8 * PAGE, 2 * PAGE), Stretch(other, PAGE, PAGE), Stretch(file, 0, PAGE)]
    wanted = torch.arange(4 * PAGE).mul(7).remainder(251).byte()
    first, second, third = wanted.split([2 * PAGE, PAGE, PAGE])
    file.write_bytes(bytes(third) + bytes(7 * PAGE) + bytes(first) + bytes(6 * PAGE))
    other.write_bytes(bytes(PAGE) + bytes(second))
    channel.buffer.zero_()
    assert channel.read(stretches) == [None, None, None] and channel.buffer.equal(wanted)
    channel.buffer.zero_()
    other.unlink()
    problems = channel.read(stretches)
    assert [isinstance(problem, OSError) for problem in problems] == [False, True, False]
    assert channel.buffer.equal(torch.cat((first, torch.zeros(PAGE, dtype=torch.uint8), third)))
    assert channel.read([]) == []


def test_plain_says_that_a_file_has_ended(file: Path) -> None:
    whole, cut = PlainChannel(5 * PAGE, True).read([Stretch(file, 0, PAGE), Stretch(file, 15 * PAGE, 4 * PAGE)])
    assert whole is None and f"only {PAGE} of {4 * PAGE} bytes" in str(cut)


def test_plain_where_libaio_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "_deepspeed", lambda: (None, "libaio's header is missing"))
    chosen, _, channel = factory("auto", tmp_path, PAGE)
    assert chosen == "preadv with O_DIRECT: libaio's header is missing"
    assert isinstance(channel(PAGE), PlainChannel)
    with pytest.raises(OSError, match="libaio's header is missing"):
        factory("aio", tmp_path, PAGE)
    assert not list(tmp_path.iterdir())


def test_plain_where_memory_cannot_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed aborts the process there."""
    monkeypatch.setattr(channels, "_lockable", lambda count: False)
    assert "ulimit -l" in factory("auto", tmp_path, 5 << 20)[0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may lock any amount")
def test_locked_memory_has_a_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (PAGE, hard))
    try:
        assert not channels._lockable(1 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, hard))


def test_a_file_system_without_direct_io(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def without(path: object, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(path, flags, mode)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", without)
    chosen, direct, channel = factory("auto", tmp_path, PAGE)
    assert chosen == "preadv through the page cache: this file system has no O_DIRECT"
    path = tmp_path / "file"
    path.write_bytes(bytes(PAGE))
    write(path, 0, [record(1, 7)], direct)
    assert channel(PAGE).read([Stretch(path, 0, PAGE)]) == [None] and not direct


def test_a_lock_that_a_killed_build_left_does_not_hold_the_tier_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "async_io" / "lock"
    lock.parent.mkdir()
    lock.touch()
    left = f"async_io was killed and left {lock}; remove that file"
    for age, built in ((3600, False), (100, True)):
        os.utime(lock, (time.time() - age, time.time() - age))
        if built:
            lock.with_name("async_io.so").touch()
        with pytest.raises(OSError, match=left):
            wait_for_build("async_io")
    threading.Timer(0.5, lock.unlink).start()
    os.utime(lock)
    began = time.monotonic()
    wait_for_build("async_io")
    assert not lock.exists()
    assert time.monotonic() - began < 60
