"""A run that stands still is ended, with the stack traces of every rank and one sentence on who is behind.

Each rank's watchdog is a thread that tells of the rank's progress in a small file, `output_dir/ranks/<rank>`, which
the others read once they wait themselves. Files, because a stopped rank takes its part of any process group with it, and
rank 0 the store. No progress of any rank for the limit is a hang: every rank writes its stack traces and ends with exit
code 1, for torchrun to start the ranks anew. A stopped process (SIGSTOP, a dead disk) writes nothing; it is named.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeVar

_LONGEST_PERIOD = 30.0
_MARKER = "hang"

T = TypeVar("T")


@dataclass(frozen=True)
class Beat:
    """What a rank's file says. `beat` grows while the process lives, `progress` while its main thread gets on, and
    `place` counts what all ranks do in the same order."""

    beat: int
    progress: int
    place: int
    doing: str
    host: str
    pid: int


class Watchdog:
    """Context manager around a run; its main thread calls :meth:`note` whenever it gets on. `doing` is the last of these.

    Args:
        output_dir: on a file system that all ranks share.
        rank, world_size: of this process.
        limit: seconds without progress of any rank after which the run is ended.
    """

    def __init__(self, output_dir: Path, rank: int, world_size: int, limit: float) -> None:
        self._folder, self._hangs = output_dir / "ranks", output_dir / "hangs"
        self._rank, self._world_size, self._limit = rank, world_size, limit
        self._period = min(limit / 20, _LONGEST_PERIOD)
        self._beat = self._progress = self._place = 0
        self._clock = self._at = 0.0  # seconds that this thread has seen pass, and when the main thread got on by them
        self.doing = "starting"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._rank == 0:
            (self._folder / _MARKER).unlink(missing_ok=True)
        self._tell()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop watching, and remove this rank's file; again does nothing."""
        self._ended.set()
        self._thread.join(2 * self._period)
        (self._folder / str(self._rank)).unlink(missing_ok=True)

    def note(self, doing: str) -> None:
        """The main thread got on, and does `doing` now, as all ranks do in the same order."""
        self._place += 1
        self.note_alone(doing)

    def note_alone(self, doing: str) -> None:
        """The same for what the others wait for."""
        # the clock is up to a period behind
        self.doing, self._at, self._progress = doing, self._clock + self._period, self._progress + 1

    def over(self, items: Iterable[T], doing: str) -> Iterator[T]:
        """`items`, each of them noted."""
        for number, item in enumerate(items, 1):
            self.note(f"{doing}, part {number}")
            yield item

    def _run(self) -> None:
        since: float | None = None  # when this rank began to wait and to watch the others
        progressed = 0.0
        first: dict[int, Beat] = {}
        last: dict[int, Beat] = {}
        ticked = time.monotonic()
        while not self._ended.wait(self._period):
            with contextlib.suppress(OSError):  # a full disk is the checkpoint's to report
                self._tell()
            passed, ticked = time.monotonic() - ticked, time.monotonic()
            now = self._clock = self._clock + min(passed, self._limit / 10)  # more: the process itself was stopped
            if now - self._at < self._limit / 10:
                since = None
                continue
            beats = self._others()
            if since is None:
                since, progressed, first, last = now, now, beats, beats
            if any(beat.progress != last[rank].progress for rank, beat in beats.items() if rank in last):
                progressed = now
            last = beats
            if os.path.exists(self._folder / _MARKER) or min(now - self._at, now - progressed) >= self._limit:
                known = first if now - since > self._limit / 2 else {}
                self._end({rank for rank, beat in beats.items() if rank in known and beat.beat == known[rank].beat}, beats)

    def _tell(self) -> None:
        """Write this rank's file."""
        self._beat += 1
        partial = self._folder / f".{self._rank}"
        partial.write_text(json.dumps(vars(self._own())))
        os.replace(partial, self._folder / str(self._rank))

    def _own(self) -> Beat:
        return Beat(self._beat, self._progress, self._place, self.doing, socket.gethostname(), os.getpid())

    def _others(self) -> dict[int, Beat]:
        """The other ranks' files; one that has ended has none."""
        found = {}
        for rank in range(self._world_size):
            if rank != self._rank:
                try:
                    found[rank] = Beat(**json.loads((self._folder / str(rank)).read_text()))
                except (OSError, ValueError, TypeError):
                    continue
        return found

    def _end(self, silent: set[int], beats: dict[int, Beat]) -> None:
        """Write the stack traces, let the others do the same, and end the process, whatever else fails."""
        try:
            self._leave_traces()
            if not set(range(self._rank)) & set(beats) - silent:  # the first rank that can, for all
                print(self._sentence(silent, beats), file=sys.stderr, flush=True)
            self._ended.wait(2 * self._period + 1)
            for rank in silent:  # torchrun would wait for them before it starts the ranks anew
                if beats[rank].host == socket.gethostname() and _parent(beats[rank].pid) == os.getppid():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(beats[rank].pid, signal.SIGKILL)
        finally:
            os._exit(1)

    def _leave_traces(self) -> None:
        try:
            self._hangs.mkdir(exist_ok=True)
            path = self._hangs / f"rank-{self._rank:05d}-{time.strftime('%Y%m%dT%H%M%S')}.txt"
            with open(path, "w") as file:
                print(f"rank {self._rank}, in {self.doing} for {self._clock - self._at:.0f} s", file=file, flush=True)
                faulthandler.dump_traceback(file, all_threads=True)
            (self._folder / _MARKER).touch()
        except OSError:
            faulthandler.dump_traceback(sys.stderr, all_threads=True)

    def _sentence(self, silent: set[int], beats: dict[int, Beat]) -> str:
        doing: dict[str, list[str]] = {}
        for rank, beat in sorted((beats | {self._rank: self._own()}).items(), key=lambda item: (item[1].place, item[0])):
            lost = f" (process {beat.pid} on {beat.host}, which does not answer and leaves no stack trace)" if rank in silent else ""
            doing.setdefault(beat.doing, []).append(f"rank {rank}{lost}")
        places = "; then ".join(f"{', '.join(ranks)} in {what}" for what, ranks in doing.items())
        return (f"no rank has made progress for {self._limit:.0f} s (engine.timeout_seconds), the one behind first: {places}; stack "
                f"traces are in {self._hangs}, and the run ends with exit code 1.")  # fmt: skip


def _parent(pid: int) -> int | None:
    """Of a process of this machine; None where it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None
