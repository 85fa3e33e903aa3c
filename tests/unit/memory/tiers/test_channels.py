"""Channels move bytes or say that they did not, whatever DeepSpeed's handle claims."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
import torch

from mka_megatron.memory.tiers import channels
from mka_megatron.memory.tiers.channels import ALIGNMENT, AioChannel, PlainChannel, factory

PAGE = ALIGNMENT


class Handle:
    """DeepSpeed's interface; `lies` says how its write fails while it reports success, as it was seen to."""

    def __init__(self, lies: str) -> None:
        self.lies = lies

    def aio_handle(self, *_: object) -> Handle:
        return self

    def new_cpu_locked_tensor(self, count: int, like: torch.Tensor) -> torch.Tensor:
        return torch.zeros(count, dtype=like.dtype)

    def free_cpu_locked_tensor(self, tensor: torch.Tensor) -> bool:
        return True

    def sync_pwrite(self, buffer: torch.Tensor, path: str, offset: int) -> int:
        kept = {"": len(buffer), "nothing": 0, "half": len(buffer) // 2, "refused": 0}[self.lies]
        with open(path, "r+b") as file:
            file.seek(offset)
            file.write(buffer[:kept].numpy().tobytes())
        return -1 if self.lies == "refused" else 1

    def sync_pread(self, buffer: torch.Tensor, path: str, offset: int) -> int:
        data = bytearray(Path(path).read_bytes()[offset : offset + len(buffer)])
        if not data:
            return -1
        buffer[: len(data)] = torch.frombuffer(data, dtype=torch.uint8)
        return 1


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(bytes(16 * PAGE))
    return path


@pytest.mark.parametrize("lies", ["nothing", "half", "refused"])
@pytest.mark.parametrize("offset", [0, 12 * PAGE, 16 * PAGE])
def test_a_write_that_does_not_arrive_is_an_error(file: Path, lies: str, offset: int) -> None:
    channel = AioChannel(4 * PAGE, Handle(lies))
    channel.buffer.fill_(7)
    with pytest.raises(OSError, match=f"at {offset}"):
        channel.write(file, offset, 4 * PAGE)


def test_a_write_that_arrives_is_none(file: Path) -> None:
    channel = AioChannel(4 * PAGE, Handle(""))
    channel.buffer.fill_(7)
    channel.write(file, 8 * PAGE, 4 * PAGE)
    assert file.read_bytes() == bytes(8 * PAGE) + bytes([7]) * 4 * PAGE + bytes(4 * PAGE)


@pytest.mark.parametrize("direct", [True, False])
def test_plain_reads_and_writes(file: Path, direct: bool) -> None:
    channel = PlainChannel(4 * PAGE, direct)
    channel.buffer.copy_(torch.arange(4 * PAGE) % 251)
    wanted = channel.buffer.clone()
    channel.write(file, 8 * PAGE, 4 * PAGE)
    channel.buffer.zero_()
    channel.read(file, 8 * PAGE, 4 * PAGE)
    assert channel.buffer.equal(wanted) and file.stat().st_size == 16 * PAGE


def test_plain_goes_on_after_a_short_write(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda fd, parts, offset: real(fd, [parts[0][:PAGE]], offset))
    channel = PlainChannel(4 * PAGE, True)
    channel.buffer.fill_(9)
    channel.write(file, 0, 4 * PAGE)
    assert file.read_bytes()[: 4 * PAGE] == bytes([9]) * 4 * PAGE


def test_plain_says_that_a_file_has_ended(file: Path) -> None:
    with pytest.raises(OSError, match=f"only {PAGE} of {4 * PAGE} bytes"):
        PlainChannel(4 * PAGE, True).read(file, 15 * PAGE, 4 * PAGE)


def test_plain_where_libaio_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "_deepspeed", lambda: (None, "libaio's header is missing"))
    chosen, channel = factory("auto", tmp_path, PAGE)
    assert chosen == "preadv/pwritev with O_DIRECT: libaio's header is missing"
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
    chosen, channel = factory("auto", tmp_path, PAGE)
    assert chosen == "preadv/pwritev through the page cache: this file system has no O_DIRECT"
    path = tmp_path / "file"
    path.write_bytes(bytes(PAGE))
    channel(PAGE).write(path, 0, PAGE)
