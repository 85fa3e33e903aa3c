"""The store returns what it was given, from whichever tier, or says in one sentence which page and file failed."""

from __future__ import annotations

import errno
import os
import resource
import stat
import threading
import time
from pathlib import Path

import pytest
import torch

from mka_megatron.config.schema import L3Config, MemoryConfig
from mka_megatron.memory.tiers import dram, ssd
from mka_megatron.memory.tiers.dram import Pool
from mka_megatron.memory.tiers.opening import open_store
from mka_megatron.memory.tiers.pages import PageKey, PageShape, TierError
from mka_megatron.memory.tiers.store import TierStore
from tests.helpers.tier_pages import CPU, RECORD, SMALL, bits, content, store


def test_pages_come_back_from_host_memory() -> None:
    given = content(50)
    with store(None, rows=None) as pages:
        assert given.put_into(pages) == []
        given.same(pages, given.keys[::-1])
        found = pages.statistics()
    assert (found.pages, found.dram_pages, found.ssd_pages, found.dram_hits, found.misses) == (50, 50, 0, 50, 0)
    assert (found.written_bytes, found.read_bytes, found.evictions) == (0, 0, 0)


def test_pages_come_back_from_the_disk(tmp_path: Path, backend: str) -> None:
    given = content(100)
    with store(tmp_path, rows=8, backend=backend) as pages:
        for begin in range(0, 100, 5):
            given.part(*range(begin, begin + 5)).put_into(pages)
        for begin in (0, 90, 40, 0):
            given.same(pages, given.keys[begin : begin + 10])
        # more than host memory holds, some of it twice
        given.same(pages, given.keys + given.keys[:30])
        found = pages.statistics()
        assert found.pages == 100 and found.dram_pages <= 8
        assert 92 * RECORD <= found.written_bytes <= 100 * RECORD
        assert found.dram_hits + found.misses == 140 and found.misses > 100
        assert found.read_bytes == found.misses * RECORD and found.stall_seconds > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("head_dim", "words"), [(5, 0), (128, 3)])
def test_every_shape_and_type(tmp_path: Path, dtype: torch.dtype, head_dim: int, words: int) -> None:
    shape = PageShape(4, head_dim, dtype, words, torch.float64)
    given = content(30, shape=shape)
    with store(tmp_path, rows=4, shape=shape) as pages:
        given.put_into(pages)
        given.same(pages, given.keys)


def test_host_memory_in_several_pieces(tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dram, "_SLAB_BYTES", 5 * RECORD)
    given = content(60)
    with store(tmp_path, rows=17, backend=backend) as pages:
        given.put_into(pages)
        given.same(pages, given.keys[::-1])
        given.same(pages, given.keys[-16:])


def test_everything_comes_back_for_a_checkpoint(tmp_path: Path, backend: str) -> None:
    given = content(40)
    with store(tmp_path, rows=6, backend=backend) as pages:
        given.put_into(pages)
        for begin in range(0, 40, 8):
            found = pages.read_all(given.keys[begin : begin + 8])
            for name in ("k", "v", "mean_k", "mean_v", "signature", "lengths"):
                assert bits(found[name]).equal(bits(getattr(given, name)[begin : begin + 8])), name
        other = content(0)
        assert pages.read_all(other.keys)["k"].shape == (0, 8, 6)


def test_gradients_and_strides_do_not_matter() -> None:
    given = content(6)
    with store(None, rows=None) as pages:
        k = torch.zeros(8, 6, 6).permute(2, 0, 1).requires_grad_()
        pages.put(given.keys, k, given.v, given.lengths, given.mean_k, given.mean_v, given.signature)
        found, _, _ = pages.get(given.keys)
    assert not found.requires_grad and found.equal(k.detach())


def test_no_pages_at_all(tmp_path: Path) -> None:
    with store(tmp_path, rows=4) as pages:
        pages.prefetch([PageKey(0, 0, 0, 0, 0)])
        k, v, lengths = pages.get([])
        pages.drop(3)
    assert k.shape == v.shape == (0, 8, 6) and lengths.shape == (0,)


def test_the_least_recently_used_page_leaves_memory(tmp_path: Path) -> None:
    given = content(12)
    with store(tmp_path, rows=8) as pages:
        given.part(0, 1, 2, 3).put_into(pages)
        given.part(4, 5, 6, 7).put_into(pages)
        settle(pages)
        pages.get([given.keys[0]])
        given.part(8).put_into(pages)
        settle(pages)
        pages.reset_statistics()
        pages.get([given.keys[0]])
        assert pages.statistics().dram_hits == 1
        pages.get([given.keys[1]])
        assert pages.statistics().misses == 1


def test_prefetched_pages_are_not_waited_for(tmp_path: Path, backend: str) -> None:
    given = content(40)
    with store(tmp_path, rows=16, backend=backend) as pages:
        given.put_into(pages)
        wanted = given.keys[:8]
        # writes hold rows; what cannot be read yet is read as they end
        pages.prefetch(wanted)
        settle(pages)
        settle(pages)
        pages.reset_statistics()
        given.same(pages, wanted)
        found = pages.statistics()
        assert (found.dram_hits, found.misses, found.stall_seconds) == (8, 0, 0.0)


def test_reads_run_while_the_caller_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow disk holds up `get`, not `prefetch`, and only for pages that it asks for."""
    given = content(40)
    go = threading.Event()
    with store(tmp_path, rows=16) as pages:
        given.put_into(pages)
        settle(pages)
        real = os.preadv
        monkeypatch.setattr(os, "preadv", lambda *args: (go.wait(10), real(*args))[1])
        begun = time.perf_counter()
        pages.prefetch(given.keys[:8])
        in_memory = given.keys[-1]
        pages.get([in_memory])
        assert time.perf_counter() - begun < 0.2
        threading.Timer(0.3, go.set).start()
        given.same(pages, given.keys[:8])
        assert 0.1 < pages.statistics().stall_seconds < 2


def test_prefetch_fills_half_of_memory_at_most(tmp_path: Path) -> None:
    given = content(40)
    with store(tmp_path, rows=8) as pages:
        given.put_into(pages)
        pages.prefetch(given.keys)
        settle(pages)
        pages.reset_statistics()
        given.same(pages, given.keys)
        assert 4 <= pages.statistics().dram_hits <= 8


def test_a_page_being_written_is_read_from_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = content(8)
    go = threading.Event()
    real = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda *args: (go.wait(10), real(*args))[1])
    with store(tmp_path, rows=8) as pages:
        given.put_into(pages)
        assert pages.statistics().ssd_pages > 0 and pages.statistics().written_bytes == 0
        given.same(pages, given.keys)
        assert pages.statistics().misses == 0
        go.set()


def test_a_page_dropped_while_it_is_written_or_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its row and slot are used again only when the disk is done with them."""
    first, second = content(24), content(24, seed=1, sequence=2)
    with store(tmp_path, rows=8) as pages:
        first.put_into(pages)
        pages.prefetch(first.keys)
        pages.drop(1)
        second.put_into(pages)
        second.same(pages, second.keys)
        settle(pages)
        pages.drop(2)
        settle(pages)
        found = pages.statistics()
    assert (found.pages, found.dram_pages, found.ssd_pages) == (0, 0, 0)


def test_dropped_pages_make_room(tmp_path: Path, backend: str) -> None:
    with store(tmp_path, rows=8, slots=20, backend=backend) as pages:
        for number in range(6):
            given = content(20, seed=number, sequence=number)
            given.put_into(pages)
            given.same(pages, given.keys)
            pages.drop(number)
        assert len(list(tmp_path.rglob("*.pages"))) == 1


def test_pages_never_change() -> None:
    given = content(3)
    with store(None, rows=None) as pages:
        given.put_into(pages)
        with pytest.raises(ValueError, match="chunk 1 is put twice"):
            given.part(1).put_into(pages)
        with pytest.raises(ValueError, match="is put twice"):
            content(3, sequence=2).part(0, 0).put_into(pages)
        with pytest.raises(KeyError, match="sequence 9, layer 0, head 0, chunk 0 is not held"):
            pages.get([PageKey(0, 9, 0, 0, 0)])


# -- hot pages


def test_hot_pages_stay_on_the_device() -> None:
    given = content(30)
    begin, end = SMALL.fields["k"][0], SMALL.fields["v"][1]
    rows = SMALL.record_bytes(64)
    pages = TierStore(
        SMALL, Pool(rows, None, CPU), None, Pool(end - begin, 5, CPU), CPU, "stop", ""
    )
    given.put_into(pages)
    order = [0, 1, 2, 3, 4, 1, 0, 5, 2]
    for place in order:
        given.same(pages, [given.keys[place]])
    found = pages.statistics()
    # 5 took the place of 2, used least recently
    assert (found.hbm_hits, found.dram_hits, found.hbm_pages) == (2, 7, 5)
    given.same(pages, [given.keys[place] for place in (5, 20, 0, 20, 21, 1)])
    given.same(pages, given.keys)
    assert pages.statistics().hbm_pages == 5
    pages.drop(1)
    assert pages.statistics().hbm_pages == 0


def test_a_cpu_has_no_hot_pages() -> None:
    memory = MemoryConfig(l3=L3Config(enabled=True, hbm_pool_gib=1.0))
    with open_store(memory, SMALL, "run", 0, CPU) as pages:
        given = content(3)
        given.put_into(pages)
        given.same(pages, given.keys)
        given.same(pages, given.keys)
        assert pages.statistics().hbm_hits == 0


# -- budgets


def test_host_memory_is_full() -> None:
    given = content(11)
    with store(None, rows=10) as pages:
        given.part(*range(8)).put_into(pages)
        with pytest.raises(TierError, match=r"l3\.dram_pool_gib is .*, raise it, set when_full to evict or placement to ssd"):
            given.part(8, 9, 10).put_into(pages)
        given.same(pages, given.keys[:8])
        assert not pages.holds(given.keys[8])
        given.part(8, 9).put_into(pages)
        given.same(pages, given.keys[:10])


def test_the_disk_budget_is_used_up(tmp_path: Path, backend: str) -> None:
    given = content(40)
    with store(tmp_path, rows=8, slots=30, backend=backend) as pages:
        given.part(*range(28)).put_into(pages)
        with pytest.raises(TierError, match=rf"l3\.ssd_pool_gib is .* the disk of {tmp_path} has the space"):
            given.part(*range(28, 31)).put_into(pages)
        given.same(pages, given.keys[:28])
        given.part(28, 29).put_into(pages)
        given.same(pages, given.keys[:30])
        assert sum(path.stat().st_size for path in tmp_path.rglob("*.pages")) <= 30 * RECORD


@pytest.mark.parametrize("on_disk", [False, True])
def test_the_oldest_pages_are_forgotten(tmp_path: Path, on_disk: bool) -> None:
    given = content(60)
    with store(tmp_path if on_disk else None, rows=8 if on_disk else 20, slots=20, when_full="evict") as pages:
        forgotten = []
        for begin in range(0, 60, 4):
            forgotten += given.part(*range(begin, begin + 4)).put_into(pages)
        assert forgotten == given.keys[:40] and pages.keys() == given.keys[40:]
        given.same(pages, given.keys[40:])
        assert pages.statistics().forgotten == 40
        with pytest.raises(TierError, match="no room"):
            content(21, sequence=2).put_into(pages)
        assert pages.keys() == given.keys[40:]


def test_a_full_disk_stops_the_run(small_disk: Path) -> None:
    given = content(80)
    with store(small_disk, rows=8) as pages:
        with pytest.raises(TierError, match=f"no room for another page: {small_disk} is full, free space on its disk"):
            for place in range(80):
                given.part(place).put_into(pages)
        held = pages.keys()
        assert 40 <= len(held) < 80
        given.same(pages, held)
    assert not list(small_disk.iterdir())


def test_a_full_disk_forgets_the_oldest(small_disk: Path) -> None:
    given = content(120)
    with store(small_disk, rows=8, when_full="evict") as pages:
        forgotten = []
        for begin in range(0, 120, 2):
            forgotten += given.part(begin, begin + 1).put_into(pages)
        held = pages.keys()
        assert forgotten + held == given.keys and 40 <= len(held) < 80
        given.same(pages, held)


def test_files_may_not_grow(tmp_path: Path) -> None:
    """RLIMIT_FSIZE: the system refuses what goes beyond two pages a file; more files hold the rest."""
    given = content(30)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with store(tmp_path, rows=8, slots=40) as pages:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * RECORD, hard))
        try:
            given.put_into(pages)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        given.same(pages, given.keys)


@pytest.mark.parametrize("rows", [0, 3])
def test_budgets_too_small_for_anything(tmp_path: Path, rows: int) -> None:
    with pytest.raises(TierError, match=r"l3\.dram_pool_gib is .* too small for 4 pages"):
        store(tmp_path, rows=rows)
    assert not list(tmp_path.iterdir())


def test_a_large_budget_costs_nothing_until_used() -> None:
    before = Path("/proc/self/statm").read_text().split()
    with store(None, rows=1 << 24) as pages:
        content(5).put_into(pages)
        after = Path("/proc/self/statm").read_text().split()
    assert (int(after[1]) - int(before[1])) * resource.getpagesize() < 64 << 20


# -- damage


def on_disk_alone(pages: TierStore, given_keys: list[PageKey]) -> tuple[PageKey, Path, int]:
    """A page that memory does not hold, with its file and offset."""
    settle(pages)
    for key in given_keys:
        page = pages._paging.pages[key]
        if page.row is None and page.slot is not None:
            return key, *pages._paging._disk.segments.place(page.slot)
    raise AssertionError("every page is in memory")


def settle(pages: TierStore) -> None:
    """Wait for the reads and writes under way."""
    for job in [*pages._paging._writes, *pages._paging._reads]:
        job.done.exception()
    pages._paging.settle()


DAMAGE = {
    "flipped bit": (lambda path, offset: patch(path, offset + 300, lambda byte: byte ^ 16), "is damaged there"),
    "cut short": (lambda path, offset: os.truncate(path, offset + RECORD - 1), "ends before it"),
    "cut to nothing": (lambda path, offset: os.truncate(path, 0), "ends before it"),
    "missing": (lambda path, offset: path.unlink(), "is missing"),
    "zeros": (lambda path, offset: patch(path, offset, lambda byte: 0, RECORD), "holds no page there"),
    "other page": (
        lambda path, offset: patch(path, offset, lambda _: None, RECORD, source=(offset + RECORD) % (4 * RECORD)),
        "holds the page of generation 0, sequence 1",
    ),
}


def patch(path: Path, offset: int, change, count: int = 1, source: int | None = None) -> None:
    with open(path, "r+b") as file:
        file.seek(offset if source is None else source)
        data = file.read(count)
        file.seek(offset)
        file.write(data if source is not None else bytes(change(byte) for byte in data))


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(tmp_path: Path, backend: str, kind: str) -> None:
    given = content(60)
    damage, reason = DAMAGE[kind]
    with store(tmp_path, rows=8, backend=backend) as pages:
        given.put_into(pages)
        key, path, offset = on_disk_alone(pages, given.keys)
        damage(path, offset)
        for _ in range(2):
            with pytest.raises(TierError) as error:
                pages.get([key])
            assert str(error.value).startswith(f"the {key} is lost: {path} {reason}"), error.value
        # what memory holds is still good, and more can be put where the file is whole
        held = [each for each in given.keys if pages._paging.pages[each].row is not None]
        assert held
        given.same(pages, held)


def test_damage_that_prefetch_meets_is_told_by_get(tmp_path: Path) -> None:
    given = content(60)
    with store(tmp_path, rows=8) as pages:
        given.put_into(pages)
        key, path, offset = on_disk_alone(pages, given.keys)
        patch(path, offset + 200, lambda byte: byte ^ 1)
        pages.prefetch([key])
        settle(pages)
        good = [each for each in given.keys[:10] if each != key]
        given.same(pages, good)
        with pytest.raises(TierError, match="is damaged there"):
            pages.get([good[0], key])


def test_a_failed_write_is_an_error_once_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = content(30)
    real = os.pwritev

    def failing(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with store(tmp_path, rows=8) as pages:
        given.part(0, 1, 2, 3).put_into(pages)
        monkeypatch.setattr(os, "pwritev", failing)
        with pytest.raises(TierError, match=r"a page cannot be written \(.*Input/output error"):
            for place in range(4, 30):
                given.part(place).put_into(pages)
        monkeypatch.setattr(os, "pwritev", real)
        held = pages.keys()
        try:
            settle(pages)
        except TierError:
            pass
        given.same(pages, held)
        given.part(*range(len(held), 30)).put_into(pages)
        given.same(pages, given.keys)


def test_a_file_removed_before_a_write(tmp_path: Path, backend: str) -> None:
    given = content(60)
    with store(tmp_path, rows=8, backend=backend) as pages:
        given.part(*range(20)).put_into(pages)
        settle(pages)
        for path in tmp_path.rglob("*.pages"):
            path.unlink()
        with pytest.raises(TierError, match="a page cannot be written"):
            for place in range(20, 60):
                given.part(place).put_into(pages)
        assert not list(tmp_path.rglob("*.pages"))


def test_a_read_that_brings_nothing_finds_no_earlier_page_of_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed drops the results of its reads, and what passed through the buffer before may still be there."""
    first, second = content(20, seed=1), content(20, seed=2)
    monkeypatch.setattr(ssd, "READERS", 1)
    with store(tmp_path, rows=4) as pages:
        first.put_into(pages)
        key, *_ = on_disk_alone(pages, first.keys)
        pages.get([key])
        pages.drop(1)
        second.put_into(pages)
        settle(pages)
        assert pages._paging.pages[key].row is None
        monkeypatch.setattr(os, "preadv", lambda file, parts, offset: len(parts[0]))
        with pytest.raises(TierError, match=f"the {key} is lost: .* holds no page there"):
            pages.get([key])


# -- files


def test_files_are_the_owners_alone(tmp_path: Path, backend: str) -> None:
    before = os.umask(0)
    try:
        with store(tmp_path, rows=4, backend=backend) as pages:
            content(30).put_into(pages)
            settle(pages)
            files = [path for path in tmp_path.rglob("*") if path.is_file()]
            assert len(files) == 3
            assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in files)
    finally:
        os.umask(before)


def test_several_segments(tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssd, "SEGMENT_BYTES", 5 * RECORD)
    given = content(60)
    with store(tmp_path, rows=8, backend=backend) as pages:
        given.put_into(pages)
        given.same(pages, given.keys)
        assert len(list(tmp_path.rglob("*.pages"))) >= 11


def test_two_stores_of_other_runs(tmp_path: Path) -> None:
    with store(tmp_path, rows=4, run="first"):
        with pytest.raises(TierError, match="run first"):
            store(tmp_path, rows=4, run="second")
    store(tmp_path, rows=4, run="second").close()


def test_no_directory() -> None:
    memory = MemoryConfig(l3=L3Config(enabled=True, placement="ssd"))
    with pytest.raises(TierError, match="ssd_spill_path is null"):
        open_store(memory, SMALL, "run", 0, CPU)


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TierError, match="the directory cannot be used"):
        store(tmp_path / "file", rows=4)


def test_close_twice(tmp_path: Path) -> None:
    pages = store(tmp_path, rows=4)
    content(20).put_into(pages)
    pages.close()
    pages.close()
    assert not list(tmp_path.iterdir())
