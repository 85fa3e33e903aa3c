"""Finished examples on disk, so that an interrupted evaluation goes on where it stopped.

A directory holds settings.json (what was asked for, and its hash) and examples.jsonl (one record per finished example).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from mka_megatron.config.errors import ConfigError, show
from mka_megatron.data.batch import DataError

Record = dict[str, Any]


class Keyed(Protocol):
    """An example."""

    @property
    def key(self) -> str:
        """Its name, no other example's."""
        ...


Example = TypeVar("Example", bound=Keyed)


class Results:
    """The records of one evaluation, by key.

    Args:
        directory: made where it is not there.
        settings: everything that a record depends on, as JSON has it; the directory of other settings is refused.
        write: False: keep what is added in memory only (ranks other than the first).

    Raises:
        ConfigError: the directory belongs to other settings.
        DataError: it cannot be read or written.
    """

    def __init__(self, directory: Path, settings: Record, write: bool = True) -> None:
        self.directory, self.records = directory, dict[str, Record]()
        self._write = write
        described = json.dumps(settings, sort_keys=True, ensure_ascii=False)
        # as a reader of the file has them: tuples are lists there
        self.settings: Record = json.loads(described)
        self._hash = hashlib.sha256(described.encode()).hexdigest()
        try:
            if write:
                directory.mkdir(parents=True, exist_ok=True)
            self._claim()
            self._read()
        except OSError as error:
            raise DataError(f"--out {directory}: {error.strerror or error}; name a directory that can be written.") from None

    def add(self, record: Record) -> None:
        """Keep a finished example; its `key` names it."""
        self.records[record["key"]] = record
        if self._write:
            with (self.directory / "examples.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def _claim(self) -> None:
        path = self.directory / "settings.json"
        if not path.exists():
            if self._write:
                content = {"hash": self._hash, "settings": self.settings}
                path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            theirs, hashed = found["settings"], found["hash"]
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path} is damaged: remove its directory or name another --out.") from None
        if hashed != self._hash:
            raise ConfigError(f"--out {self.directory} holds results of other settings ({_difference(theirs, self.settings)}): "
                              "name another directory or remove it.")

    def _read(self) -> None:
        path = self.directory / "examples.jsonl"
        if not path.exists():
            return
        raw = path.read_bytes()
        # a line that a killed run did not finish
        whole = raw[: raw.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                self.records[record["key"]] = record
            except (ValueError, KeyError, TypeError):
                raise DataError(f"{path}:{number} is no record of this evaluation: remove the line.") from None
        if self._write and len(whole) < len(raw):
            with path.open("r+b") as file:
                file.truncate(len(whole))


def _difference(theirs: Any, mine: Record) -> str:
    if not isinstance(theirs, dict):
        return "they are unreadable"
    for name in sorted({*theirs, *mine}):
        if theirs.get(name) != mine.get(name):
            return f"{name} was {show(theirs.get(name))} and is {show(mine.get(name))} now"
    return "their hash differs"


def run(
    results: Results,
    examples: Iterable[Example],
    batch: int,
    finish: Callable[[Sequence[Example]], Iterable[Record]],
    progress: Callable[[int], None] | None = None,
) -> None:
    """Finish the examples that have no record yet, `batch` at a time and in order.

    Args:
        finish: the records of examples, with their `key`s.
        progress: called with how many examples more are done, those of an earlier run at once.
    """
    for group in _grouped(examples, batch, results, progress or (lambda done: None)):
        for record in finish(group):
            results.add(record)
        if progress is not None:
            progress(len(group))


def _grouped(
    examples: Iterable[Example], size: int, results: Results, known: Callable[[int], None]
) -> Iterator[list[Example]]:
    group: list[Example] = []
    for example in examples:
        if example.key in results.records:
            known(1)
            continue
        group.append(example)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
