"""Samples processed segment by segment: the sessions of a rank's micro-batches over one page store."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch

from mka_megatron.config.errors import ConfigError
from mka_megatron.config.schema import Config
from mka_megatron.config.variants import recalls
from mka_megatron.data.batch import Batch
from mka_megatron.memory.hierarchy import Session
from mka_megatron.memory.tiers.opening import open_store
from mka_megatron.memory.tiers.pages import PageShape, TierError
from mka_megatron.memory.tiers.statistics import TierStatistics
from mka_megatron.memory.tiers.store import TierStore
from mka_megatron.model.build import DTYPES
from mka_megatron.parallel.groups import Topology
from mka_megatron.planning.steps import segments_per_step


class Segments:
    """What lies between the segments of the samples in progress.

    Args:
        config: with training.segment_length.
        topology: process groups and device.
    """

    def __init__(self, config: Config, topology: Topology) -> None:
        length = config.training.segment_length
        if length is None:
            raise ValueError("training.segment_length is null: samples have no segments.")
        self._config, self._topology = config, topology
        self._length = length
        self.count = config.data.sequence_length // length
        """Segments of a sample."""
        self.per_step = segments_per_step(config)
        """Segments of an optimizer step."""
        self.next = 0
        """The segment that the next step begins with; 0: with a new sample."""
        self._generation = 0
        self._sequences = count()
        self._sessions: dict[int, Session] = {}
        self._store: TierStore | None = None

    def open(self) -> None:
        """Open the page store, before any work. Raises ConfigError where the configured tiers cannot be used."""
        if self._store is not None:
            return
        memory, topology = self._config.memory_hierarchy, self._topology
        model, l3 = self._config.model, memory.l3
        hashed = l3.selection == "hash"
        shape = PageShape(
            memory.l1.chunk_size,
            model.head_dim,
            DTYPES[self._config.training.precision],
            0 if not recalls(self._config) else l3.hash_tables * l3.hash_bits // 64 if hashed else model.head_dim,
            torch.int64 if hashed else torch.float64,
        )
        output = str(Path(self._config.training.output_dir).resolve())
        run = hashlib.sha256(output.encode()).hexdigest()[:12]
        try:
            self._store = open_store(memory, shape, run, topology.rank, topology.device)
        except TierError as error:
            raise ConfigError(str(error)) from error

    def step(self, micro_batches: Sequence[Batch]) -> Iterator[tuple[Batch, Session]]:
        """The passes of one optimizer step: a segment and its begun session, to be committed after its backward."""
        for index, batch in enumerate(micro_batches):
            if self.next == 0:
                self._sessions[index] = self._session(batch.tokens.shape[0])
            for number in range(self.next, self.next + self.per_step):
                yield self._begun(batch, number, self._sessions[index])
            if self.next + self.per_step == self.count:
                self._sessions.pop(index).close()

    def parts(self, micro_batches: Sequence[Batch]) -> list[Batch]:
        """The slots that :meth:`step` goes over."""
        begin, end = self.next * self._length, (self.next + self.per_step) * self._length
        return [batch.part(begin, end) for batch in micro_batches]

    def advance(self) -> None:
        """A step is done."""
        self.next = (self.next + self.per_step) % self.count

    def whole(self, batch: Batch) -> Iterator[tuple[Batch, Session]]:
        """All segments of samples that nothing continues (evaluation), each to be committed after its forward."""
        session = self._session(batch.tokens.shape[0])
        try:
            for number in range(self.count):
                yield self._begun(batch, number, session)
        finally:
            session.close()

    def statistics(self) -> TierStatistics:
        """Of the store, since the last call."""
        store = self._opened()
        found = store.statistics()
        store.reset_statistics()
        return found

    def close(self) -> None:
        """End the store and all samples in progress."""
        self._sessions.clear()
        if self._store is not None:
            self._store.close()

    def save(self, write: Callable[[Any, str], None]) -> None:
        """Hand the samples in progress to `write(plain tensors and numbers, file name)`, pages some at a time."""
        files: dict[int, int] = {}
        for index, session in self._sessions.items():
            files[index] = 0
            for block in session.blocks():
                write(block, self._name(f"pages-{index:03d}-{files[index]:05d}"))
                files[index] += 1
        states = {index: session.state() for index, session in self._sessions.items()}
        body = {"next": self.next, "generation": self._generation, "sessions": states, "files": files}
        write(body, self._name("samples"))

    def load(self, folder: Path) -> None:
        """Go on where :meth:`save` was called, with pages of a new generation. Raises ConfigError as :meth:`open`."""
        saved = self._read(folder, self._name("samples"))
        self.next, self._generation = saved["next"], saved["generation"] + 1
        self.open()
        for index, state in saved["sessions"].items():
            session = self._session(len(state["sequences"]))
            names = (self._name(f"pages-{index:03d}-{number:05d}") for number in range(saved["files"][index]))
            blocks = (self._read(folder, name) for name in names)
            session.restore(state, blocks, self._topology.device)
            self._sessions[index] = session

    def saved_position(self, folder: Path) -> int:
        """The segment that the run which saved into `folder` went on with; 0: it was between two samples."""
        return int(self._read(folder, self._name("samples", rank=0))["next"])

    def load_between_samples(self, folder: Path) -> None:
        """The same as :meth:`load` where no sample was in progress, whichever ranks saved."""
        self._generation = self._read(folder, self._name("samples", rank=0))["generation"] + 1
        self.open()

    def _read(self, folder: Path, name: str) -> Any:
        return torch.load(folder / name, map_location="cpu", weights_only=True)

    def _name(self, what: str, rank: int | None = None) -> str:
        return f"memory-{self._topology.rank if rank is None else rank:05d}-{what}.pt"

    def _begun(self, batch: Batch, number: int, session: Session) -> tuple[Batch, Session]:
        part = batch.part(number * self._length, (number + 1) * self._length)
        session.begin(part.documents)
        return part, session

    def _session(self, rows: int) -> Session:
        memory, topology = self._config.memory_hierarchy, self._topology
        heads = self._config.model.num_kv_heads // topology.tp_size
        return Session(
            self._opened(),
            self._generation,
            [next(self._sequences) for _ in range(rows)],
            range(topology.tp_rank * heads, (topology.tp_rank + 1) * heads),
            memory.l1.chunk_size,
            (memory.l1.window or 0) // memory.l1.chunk_size,
        )

    def _opened(self) -> TierStore:
        self.open()
        assert self._store is not None
        return self._store
