"""LongBench's files, read in place: data.zip (or a folder of its JSONL files) of v1, data.json of v2.

Nothing is unpacked, members are asked for by their exact names, and lines, members and files have largest sizes.
"""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mka_megatron.data.batch import DataError

_LONGEST_LINE = 64 << 20
_LARGEST = 4 << 30


@dataclass(frozen=True)
class Item:
    """A line of v1."""

    task: str
    number: int
    context: str
    input: str
    answers: tuple[str, ...]
    classes: tuple[str, ...]
    length: int
    """Words (Chinese: characters), as the file says."""

    @property
    def key(self) -> str:
        """task/line."""
        return f"{self.task}/{self.number}"


@dataclass(frozen=True)
class Choice:
    """A question of v2."""

    key: str
    context: str
    question: str
    choices: tuple[str, str, str, str]
    answer: str
    """A to D."""
    difficulty: str
    """easy or hard."""
    length: str
    """short, medium or long."""


def items(path: Path, task: str, e: bool) -> Iterator[Item]:
    """The lines of a task of v1 (`e`: of E). Raises DataError, naming file and line."""
    name = f"{task}_e.jsonl" if e else f"{task}.jsonl"
    with _opened(path, name) as (file, where):
        number = 0
        while line := file.readline(_LONGEST_LINE):
            number += 1
            if line.strip():
                yield _item(line, task, number, f"{where}:{number}")


def check(path: Path, tasks: list[str], e: bool) -> None:
    """Raises DataError where a file of `tasks` is missing, before any is read."""
    for task in tasks:
        with _opened(path, f"{task}_e.jsonl" if e else f"{task}.jsonl"):
            pass


def choices(path: Path) -> Iterator[Choice]:
    """The questions of v2: a JSON list, or JSON lines. Raises DataError."""
    path = path / "data.json" if path.is_dir() else path
    if not path.is_file():
        raise DataError(f"LongBench v2 needs data.json, and --data {path} is no file: put it there "
                        "(huggingface.co/datasets/THUDM/LongBench-v2).")
    if path.stat().st_size > _LARGEST:
        raise DataError(f"{path} has more than {_LARGEST >> 30} GiB: that is not LongBench v2's data.json.")
    try:
        raw = path.read_bytes()
        records = json.loads(raw) if raw.lstrip()[:1] == b"[" else [json.loads(line) for line in raw.splitlines() if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is no readable JSON ({error}): copy it again.") from None
    for number, record in enumerate(records, 1):
        yield _checked(lambda record=record: _choice(record), f"{path}: question {number}")  # type: ignore[misc]


@contextmanager
def _opened(path: Path, name: str) -> Iterator[tuple[IO[bytes], str]]:
    missing = DataError(f"LongBench needs {name}, which is not in --data {path}: give data.zip of "
                        "huggingface.co/datasets/THUDM/LongBench, or the folder of its JSONL files.")  # fmt: skip
    if path.is_dir():
        found = next((each for each in (path / name, path / "data" / name) if each.is_file()), None)
        if found is None:
            raise missing
        with found.open("rb") as file:
            yield file, str(found)
        return
    if not path.is_file():
        raise missing
    try:
        with zipfile.ZipFile(path) as archive:
            member = next((each for each in (f"data/{name}", name) if each in archive.namelist()), None)
            if member is None:
                raise missing
            info = archive.getinfo(member)
            if info.file_size > _LARGEST:
                raise DataError(f"{path}: {info.filename} says that it has more than {_LARGEST >> 30} GiB; that is not "
                                "LongBench's.")
            with archive.open(info) as file:
                yield file, f"{path}:{info.filename}"
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, OSError, EOFError) as error:
        raise DataError(f"{path} is no readable zip file ({error}): copy data.zip again.") from None


def _item(line: bytes, task: str, number: int, where: str) -> Item:
    def read() -> Item:
        record = json.loads(line)
        context, asked, answers, length = (record[name] for name in ("context", "input", "answers", "length"))
        classes = record.get("all_classes") or []
        _require(isinstance(context, str) and isinstance(asked, str) and type(length) is int)
        _require(_texts(answers) and _texts(classes) and bool(answers))
        pattern = {"passage_retrieval_en": r"Paragraph \d", "passage_retrieval_zh": r"段落\d"}.get(task)
        _require(pattern is None or all(re.search(pattern, answer) for answer in answers))
        return Item(task, number, context, asked, tuple(answers), tuple(classes), length)

    return _checked(read, where)


def _choice(record: Any) -> Choice:
    names = ("_id", "context", "question", "choice_A", "choice_B", "choice_C", "choice_D", "answer", "difficulty", "length")
    key, context, question, a, b, c, d, answer, difficulty, length = (record[name] for name in names)
    _require(_texts([record[name] for name in names]) and answer in ("A", "B", "C", "D"))
    return Choice(key, context, question, (a, b, c, d), answer, difficulty, length)


def _texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _require(right: bool) -> None:
    if not right:
        raise ValueError


def _checked(read: Callable[[], Any], where: str) -> Any:
    try:
        return read()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DataError(f"{where} has not the fields of LongBench: copy the file again.") from None
