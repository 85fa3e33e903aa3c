"""Channels move bytes or say that they did not, whatever DeepSpeed's handle claims."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
import torch

from mka_megatron.memory.tiers import channels
from mka_megatron.memory.tiers.channels import ALIGNMENT, AioChannel, Channel, PlainChannel, Stretch, factory

PAGE = ALIGNMENT


class Handle:
    """DeepSpeed's interface; `lies` says how its write fails while it reports success, as it was seen to."""

    def __init__(self, lies: str) -> None:
        self.lies = lies
        self.written: list[str] = []

    def aio_handle(self, *_: object) -> Handle:
        return self

    def new_cpu_locked_tensor(self, count: int, like: torch.Tensor) -> torch.Tensor:
        return torch.zeros(count, dtype=like.dtype)

    def free_cpu_locked_tensor(self, tensor: torch.Tensor) -> bool:
        return True

    def sync_pwrite(self, buffer: torch.Tensor, path: str, offset: int) -> int:
        kept = {"": len(buffer), "nothing": 0, "half": len(buffer) // 2, "refused": 0}[self.lies]
        self.written.append(path)
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
        channel.write([Stretch(file, offset, 4 * PAGE)])


def test_a_write_that_arrives_is_none(file: Path) -> None:
    channel = AioChannel(4 * PAGE, Handle(""))
    channel.buffer.fill_(7)
    channel.write([Stretch(file, 8 * PAGE, 4 * PAGE)])
    assert file.read_bytes() == bytes(8 * PAGE) + bytes([7]) * 4 * PAGE + bytes(4 * PAGE)


@pytest.mark.parametrize("direct", [True, False])
def test_plain_reads_and_writes(file: Path, direct: bool) -> None:
    check_stretches(PlainChannel(4 * PAGE, direct), file)


def test_aio_reads_and_writes(file: Path, aio: str | None) -> None:
    if aio is not None:
        pytest.skip(aio)
    channel = factory("aio", file.parent, PAGE)[1](4 * PAGE)
    check_stretches(channel, file)
    channel.close()


def check_stretches(channel: Channel, file: Path) -> None:
    """They lie in the buffer one behind the other, and are told of one by one."""
    other = file.with_name("other")
    other.write_bytes(bytes(2 * PAGE))
    stretches = [Stretch(file, 8 * PAGE, 2 * PAGE), Stretch(other, PAGE, PAGE), Stretch(file, 0, PAGE)]
    wanted = torch.arange(4 * PAGE).mul(7).remainder(251).byte()
    channel.buffer.copy_(wanted)
    channel.write(stretches)
    first, second, third = wanted.split([2 * PAGE, PAGE, PAGE])
    assert file.read_bytes() == bytes(third) + bytes(7 * PAGE) + bytes(first) + bytes(6 * PAGE)
    assert other.read_bytes() == bytes(PAGE) + bytes(second)
    channel.buffer.zero_()
    assert channel.read(stretches) == [None, None, None] and channel.buffer.equal(wanted)
    channel.buffer.zero_()
    other.unlink()
    problems = channel.read(stretches)
    assert [isinstance(problem, OSError) for problem in problems] == [False, True, False]
    assert channel.buffer.equal(torch.cat((first, torch.zeros(PAGE, dtype=torch.uint8), third)))
    assert channel.read([]) == []


def test_plain_goes_on_after_a_short_write(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda fd, parts, offset: real(fd, [parts[0][:PAGE]], offset))
    channel = PlainChannel(4 * PAGE, True)
    channel.buffer.fill_(9)
    channel.write([Stretch(file, 0, 4 * PAGE)])
    assert file.read_bytes()[: 4 * PAGE] == bytes([9]) * 4 * PAGE


def test_plain_says_that_a_file_has_ended(file: Path) -> None:
    whole, cut = PlainChannel(5 * PAGE, True).read([Stretch(file, 0, PAGE), Stretch(file, 15 * PAGE, 4 * PAGE)])
    assert whole is None and f"only {PAGE} of {4 * PAGE} bytes" in str(cut)


def test_plain_where_libaio_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "_deepspeed", lambda: (None, "libaio's header is missing"))
    chosen, channel = factory("auto", tmp_path, PAGE)
    assert chosen == "preadv/pwritev with O_DIRECT: libaio's header is missing"
    assert isinstance(channel(PAGE), PlainChannel)
    with pytest.raises(OSError, match="libaio's header is missing"):
        factory("aio", tmp_path, PAGE)
    assert not list(tmp_path.iterdir())


def test_deepspeed_writes_first_where_no_other_thread_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two first writes at once never end."""
    handle = Handle("")
    monkeypatch.setattr(channels, "_deepspeed", lambda: (handle, ""))
    chosen, _ = factory("auto", tmp_path, PAGE)
    assert chosen == "DeepSpeed aio" and handle.written == [str(tmp_path / "probe")]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("lies", ["nothing", "refused"])
def test_plain_where_deepspeed_does_not_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lies: str) -> None:
    monkeypatch.setattr(channels, "_deepspeed", lambda: (Handle(lies), ""))
    assert "it does not write there" in factory("auto", tmp_path, PAGE)[0]
    with pytest.raises(OSError, match="it does not write there"):
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
    channel(PAGE).write([Stretch(path, 0, PAGE)])
