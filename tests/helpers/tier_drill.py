"""A fault drill of the page store: `python -m tests.helpers.tier_drill --faults 10000 --seed 7`.

Random faults strike a store in use: damaged, swapped, stale and missing pages and files, failing and lying reads and
writes, full budgets and disks, processes killed. After each one, pages are asked for: every answer must be bit for
bit what was put, or a TierError; after a kill, the next run must find a clean directory. Reports: faults by
kind, how many of each were told of (the others struck what was still in memory, or nothing), and what went wrong.
"""

from __future__ import annotations

import argparse
import errno
import json
import mmap
import multiprocessing
import os
import random
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from mka_megatron.memory.tiers import channels, ssd, writing
from mka_megatron.memory.tiers.channels import Channel, Stretch
from mka_megatron.memory.tiers.pages import PageKey, Seal, TierError
from mka_megatron.memory.tiers.store import TierStore
from tests.helpers.tier_pages import RECORD, SMALL, Content, bits, content, store

ROWS = 12
SLOTS = 90
FAULTS_PER_STORE = 50
KILLS = 0.01
"""Share of the faults."""


class Faulty:
    """A channel that does the next read wrong when it is told to; shared: what to do, by all channels and writes."""

    def __init__(self, channel: Channel, shared: dict[str, str], dice: random.Random) -> None:
        self.buffer = channel.buffer
        self._channel, self._shared, self._dice = channel, shared, dice

    def read(self, stretches: Sequence[Stretch]) -> list[OSError | None]:
        """Or one of them not, or with a bit flipped."""
        fault = self._shared.pop("read", None) if stretches else None
        if fault is None:
            return self._channel.read(stretches)
        struck = self._dice.randrange(len(stretches))
        begin = sum(stretch.size for stretch in stretches[:struck])
        count = stretches[struck].size
        before = self.buffer[begin : begin + count].clone()
        problems = self._channel.read(stretches)
        if fault == "fails":
            problems[struck] = OSError(errno.EIO, "Input/output error")
        if fault == "flips a bit":
            self.buffer[begin + self._dice.randrange(count)] ^= 1 << self._dice.randrange(8)
        if fault == "does nothing":
            self.buffer[begin : begin + count] = before
        return problems

    def close(self) -> None:
        """As the channel's."""
        self._channel.close()


def faulty_write(real: Callable[..., None], shared: dict[str, str], dice: random.Random) -> Callable[..., None]:
    """`writing.write`, which does the next one wrong when `shared` says how."""

    def write(path: Path, offset: int, records: Sequence[np.ndarray], direct: bool) -> None:
        fault = shared.pop("write", None)
        if fault == "fails":
            raise OSError(errno.EIO, "Input/output error")
        if fault == "flips a bit":
            # a copy, which begins on a memory page: others read the records
            copy = np.frombuffer(mmap.mmap(-1, sum(map(len, records))), dtype=np.uint8)
            np.concatenate(records, out=copy)
            copy[dice.randrange(len(copy))] ^= 1 << dice.randrange(8)
            records = [copy]
        if fault != "does nothing":
            real(path, offset, records, direct)

    return write


class Drill:
    """One store under fire, and what it was given."""

    def __init__(self, directory: Path, backend: str, when_full: str, dice: random.Random) -> None:
        self.dice = dice
        self.shared: dict[str, str] = {}
        real = channels.factory

        def factory(*arguments: object) -> tuple[str, bool, Callable[[int], Channel]]:
            chosen, direct, make = real(*arguments)  # type: ignore[arg-type]
            return chosen, direct, lambda size: Faulty(make(size), self.shared, random.Random(dice.random()))  # noqa: S311

        write = faulty_write(writing.write, self.shared, random.Random(dice.random()))  # noqa: S311
        with mock.patch.object(channels, "factory", factory), mock.patch.object(writing, "write", write):
            self.pages: TierStore = store(directory, ROWS, SLOTS, when_full=when_full, backend=backend)
        self.given: dict[PageKey, tuple[torch.Tensor, torch.Tensor, int]] = {}
        self.sequence = 0

    def put(self, count: int) -> bool:
        """Put pages of a new sequence; whether the store refused with a TierError."""
        self.sequence += 1
        new: Content = content(count, seed=self.dice.getrandbits(40), sequence=self.sequence)
        try:
            forgotten = new.put_into(self.pages)
        except TierError:
            assert not any(self.pages.holds(key) for key in new.keys), "pages of a refused put are held"
            self._note_forgotten()
            return True
        for place, key in enumerate(new.keys):
            self.given[key] = (new.k[place], new.v[place], int(new.lengths[place]))
        for key in forgotten:
            self.given.pop(key)
        return False

    def check(self, keys: list[PageKey]) -> int:
        """Ask for pages; how often the store refused. Raises AssertionError for an answer that is wrong."""
        refusals = 0
        if self.dice.random() < 0.5:
            try:
                self.pages.prefetch(keys)
            except TierError:
                refusals += 1
        try:
            self._compare(keys)
            return refusals
        except TierError:
            refusals += 1
        for key in keys:  # one that is lost must not take the others along
            try:
                self._compare([key])
            except TierError:
                refusals += 1
        return refusals

    def some(self, count: int) -> list[PageKey]:
        """Pages that should be held."""
        held = list(self.given)
        return self.dice.sample(held, min(count, len(held)))

    def settle(self) -> bool:
        """Wait for what is under way; whether a write had failed."""
        try:
            for job in [*self.pages._paging._writes, *self.pages._paging._reads]:
                job.done.exception()
            self.pages._paging.settle()
        except TierError:
            return True
        return False

    def stored(self) -> tuple[PageKey, Path, int] | None:
        """A page on the disk, if possible one that memory does not hold, with its file and offset."""
        pages = [self.pages._paging.pages[key] for key in self.given]
        there = [page for page in pages if page.slot is not None]
        alone = [page for page in there if page.row is None]
        if not there:
            return None
        page = self.dice.choice(alone or there)
        disk = self.pages._paging._disk
        assert page.slot is not None and disk is not None
        return page.key, *disk.segments.place(page.slot)

    def _compare(self, keys: list[PageKey]) -> None:
        k, v, lengths = self.pages.get(keys)
        for place, key in enumerate(keys):
            wanted_k, wanted_v, tokens = self.given[key]
            right = bits(k[place]).equal(bits(wanted_k)) and bits(v[place]).equal(bits(wanted_v))
            assert right and int(lengths[place]) == tokens, f"wrong numbers for the {key}"

    def _note_forgotten(self) -> None:
        for key in [key for key in self.given if not self.pages.holds(key)]:
            del self.given[key]


def flip_bit(drill: Drill, key: PageKey, path: Path, offset: int) -> None:
    """Anywhere in the page's content."""
    place = offset + drill.dice.randrange(SMALL.used_bytes)
    edit(path, place, lambda old: bytes([old[0] ^ 1 << drill.dice.randrange(8)]), 1)


def break_header(drill: Drill, key: PageKey, path: Path, offset: int) -> None:
    """Some bytes of it at random."""
    edit(path, offset + drill.dice.randrange(120), lambda old: bytes(255 - byte for byte in old), 8)


def lose_sector(drill: Drill, key: PageKey, path: Path, offset: int) -> None:
    """Zeros instead of 512 bytes."""
    edit(path, offset + 512 * drill.dice.randrange(-(-SMALL.used_bytes // 512)), lambda old: bytes(len(old)), 512)


def truncate(drill: Drill, key: PageKey, path: Path, offset: int) -> None:
    """The file ends in or before the page."""
    os.truncate(path, drill.dice.randrange(offset + RECORD))


def delete(drill: Drill, key: PageKey, path: Path, offset: int) -> None:
    """The file is gone."""
    path.unlink()


def swap(drill: Drill, key: PageKey, path: Path, offset: int) -> None:
    """The page and its neighbour in the file change places."""
    other = offset - RECORD if offset else RECORD
    with open(path, "r+b") as file:
        data = [os.pread(file.fileno(), RECORD, place) for place in (offset, other)]
        for place, page in zip((other, offset), data, strict=True):
            os.pwrite(file.fileno(), page, place)


def stale_generation(drill: Drill, key: PageKey, path: Path, offset: int) -> None:
    """A perfect page of the same name, but of another generation."""
    edit(path, offset, lambda old: sealed(old, "run", key._replace(generation=key.generation + 1)), RECORD)


def other_run(drill: Drill, key: PageKey, path: Path, offset: int) -> None:
    """A perfect page of the same name, but of another run."""
    edit(path, offset, lambda old: sealed(old, "earlier", key), RECORD)


def sealed(record: bytes, run: str, key: PageKey) -> bytes:
    """`record` with other numbers in it, as `run` would write it."""
    changed = bytearray(record)
    changed[200] ^= 1
    Seal(SMALL, run, 0).close(memoryview(changed), key, 3)
    return bytes(changed)


def edit(path: Path, offset: int, change: Callable[[bytes], bytes], count: int) -> None:
    """Replace bytes of a file."""
    with open(path, "r+b") as file:
        data = os.pread(file.fileno(), count, offset)
        os.pwrite(file.fileno(), change(data), offset)


DAMAGE = (flip_bit, break_header, lose_sector, truncate, delete, swap, stale_generation, other_run)
READ_FAULTS = ("fails", "flips a bit", "does nothing")
WRITE_FAULTS = ("fails", "flips a bit", "does nothing")


def strike(drill: Drill) -> tuple[str, bool]:
    """One random fault and what follows: its kind, and whether the store told of it."""
    kind = drill.dice.randrange(len(DAMAGE) + 4)
    if kind < len(DAMAGE):
        drill.settle()
        target = drill.stored()
        if target is None or not target[1].exists() or target[1].stat().st_size < target[2] + 2 * RECORD:
            drill.put(6)
            return "none", False
        DAMAGE[kind](drill, *target)
        told = drill.check([target[0], *drill.some(5)]) > 0
        return DAMAGE[kind].__name__, told
    if kind == len(DAMAGE):
        fault = drill.dice.choice(READ_FAULTS)
        drill.settle()
        drill.shared["read"] = fault
        told = drill.check(drill.some(8)) > 0
        drill.shared.clear()
        return f"read {fault}", told
    if kind == len(DAMAGE) + 1:
        fault = drill.dice.choice(WRITE_FAULTS)
        drill.shared["write"] = fault
        told = drill.put(drill.dice.randrange(1, 8))
        told |= drill.settle()
        drill.shared.clear()
        return f"write {fault}", told | (drill.check(drill.some(20)) > 0)
    if kind == len(DAMAGE) + 2:
        with mock.patch.object(os, "posix_fallocate", side_effect=OSError(errno.ENOSPC, "No space left on device")):
            told = drill.put(drill.dice.randrange(1, ROWS))
            told |= drill.settle()
        return "full disk", told | (drill.check(drill.some(5)) > 0)
    told = False
    for _ in range(20):  # beyond the budget, by and by or at once
        told |= drill.put(drill.dice.choice((5, 20, SLOTS + 1)))
        if told:
            break
    return "full budget", told | (drill.check(drill.some(5)) > 0)


def killed(directory: Path, seed: int, pipe: object) -> None:
    """A run that puts and gets pages until it is killed; without DeepSpeed, whose import takes seconds."""
    dice = random.Random(seed)  # noqa: S311
    with mock.patch.object(ssd, "SEGMENT_BYTES", 16 * RECORD):
        pages = store(directory, ROWS, SLOTS, run=f"killed-{seed}", when_full="evict")
        pipe.send("open")  # type: ignore[attr-defined]
        for number in range(1 << 30):
            content(dice.randrange(1, 9), seed=number, sequence=number).put_into(pages)
            pages.prefetch(dice.sample(pages.keys(), 1))


def kill(directory: Path, dice: random.Random) -> str | None:
    """Kill a run at a random moment; what the next one finds wrong."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.tier_pages"])
    ours, theirs = context.Pipe()
    process = context.Process(target=killed, args=(directory, dice.getrandbits(30), theirs))
    process.start()
    ours.recv()
    process.join(dice.random() * 0.1)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    if not list(directory.rglob("lock")):
        return "the killed run had no files"
    given = content(20, seed=1)
    with store(directory, ROWS, SLOTS, run="next") as pages:
        left = [path.name for path in directory.iterdir() if "next" not in path.name and path.name != "mka-pages.lock"]
        if left or pages.keys():
            return f"left over: {left}"
        given.put_into(pages)
        given.same(pages, given.keys)
    return f"left over: {os.listdir(directory)}" if os.listdir(directory) else None


def run(directory: Path, faults: int, seed: int, backends: tuple[str, ...]) -> dict[str, object]:
    """`faults` faults on stores in `directory`, which is empty; the report."""
    dice = random.Random(seed)  # noqa: S311
    done: Counter[str] = Counter()
    told: Counter[str] = Counter()
    wrong: list[str] = []
    with mock.patch.object(ssd, "SEGMENT_BYTES", 16 * RECORD):
        turn = 0
        while done.total() < faults and not wrong:
            backend, when_full = backends[turn % len(backends)], ("stop", "evict")[turn // 2 % 2]
            turn += 1
            drill = Drill(directory, backend, when_full, dice)
            with drill.pages:
                for _ in range(4):
                    drill.put(8)
                for _ in range(FAULTS_PER_STORE):
                    try:
                        kind, seen = strike(drill)
                        drill.put(3)
                        if dice.random() < 0.1 and drill.given:
                            ended = dice.choice(list(drill.given)).sequence
                            drill.settle()
                            drill.pages.drop(ended)
                            drill.given = {key: value for key, value in drill.given.items() if key.sequence != ended}
                    except AssertionError as error:
                        wrong.append(f"fault {done.total()} ({backend}): {error}")
                        break
                    if kind != "none":
                        done[kind] += 1
                        told[kind] += seen
                drill.settle()
            if os.listdir(directory):
                wrong.append(f"close left {os.listdir(directory)}")
            for _ in range(sum(dice.random() < KILLS for _ in range(FAULTS_PER_STORE))):
                done["kill"] += 1
                problem = kill(directory, dice)
                wrong += [] if problem is None else [problem]
    return {"faults": done.total(), "by_kind": dict(sorted(done.items())), "told": dict(sorted(told.items())), "wrong": wrong}


def main() -> int:
    """Run the drill; 1 if the store was wrong once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backends", default="plain,aio", help="plain, aio or both")
    parser.add_argument("--directory", type=Path, help="on the disk to use; default: that of temporary files")
    parser.add_argument("--json", type=Path, help="write the report there, not to the standard output")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        report = run(Path(folder), options.faults, options.seed, tuple(options.backends.split(",")))
    text = json.dumps(report, indent=1)
    if options.json:
        options.json.write_text(text)
    else:
        print(text)
    return 1 if report["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
