"""Streamed readers: a file (or data set) -> its documents, each a tuple of text fields."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mka_megatron.data.batch import DataError

_BATCH = 256  # records read at once from Parquet and HF data sets

JSON_LINES = (".jsonl", ".json", ".ndjson")
PARQUET = (".parquet",)


@dataclass(frozen=True)
class TextFile:
    """A UTF-8 text file: one document, or several where it is longer than `limit` characters."""

    path: str
    limit: int
    """Documents are cut at the first line end after this many characters (at twice that, without one)."""
    skip_undecodable: bool = False
    """Pass over a file that is not UTF-8 instead of raising."""

    def read(self, keys: Sequence[str]) -> Iterator[tuple[str, ...]]:
        """Documents of one field; raises DataError where two fields are wanted or the file is not UTF-8."""
        if len(keys) != 1:
            raise DataError(
                f"{self.path}: a text file has no fields {', '.join(keys)}; give JSONL, Parquet or hf: data"
            )
        try:
            with open(self.path, encoding="utf-8", newline="") as stream:
                while text := stream.read(self.limit):
                    if len(text) == self.limit:
                        text += stream.readline(self.limit)
                    yield (text,)
        except UnicodeDecodeError as error:
            if not self.skip_undecodable:
                raise DataError(
                    f"{self.path}: not UTF-8 text ({error.reason}); convert it, or name the text files by a glob"
                ) from None


@dataclass(frozen=True)
class JsonLines:
    """One JSON object per line."""

    path: str

    def read(self, keys: Sequence[str]) -> Iterator[tuple[str, ...]]:
        """The `keys` of every line; raises DataError with the line number."""
        with open(self.path, "rb") as stream:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                where = f"{self.path}:{number}"
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{where}: not valid JSON ({error}); repair or drop the line") from None
                if not isinstance(record, dict):
                    raise DataError(
                        f"{where}: a JSON {type(record).__name__} where an object per line is expected"
                    )
                yield _fields(record, keys, where)


@dataclass(frozen=True)
class Parquet:
    """A Parquet file, read a row group's slice at a time."""

    path: str

    def read(self, keys: Sequence[str]) -> Iterator[tuple[str, ...]]:
        """The `keys` columns of every row; raises DataError for a damaged file or a missing column."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        number = 0
        try:
            with pq.ParquetFile(self.path) as file:
                _require(keys, file.schema_arrow.names, self.path)
                for batch in file.iter_batches(batch_size=_BATCH, columns=list(keys)):
                    for record in batch.to_pylist():
                        number += 1
                        yield _fields(record, keys, f"{self.path}: row {number}")
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(
                f"{self.path}: not a readable Parquet file ({reason}); write or download it again"
            ) from None


@dataclass(frozen=True)
class HFDataset:
    """A split of a Hugging Face data set, memory-mapped by `datasets`."""

    path: str
    """How the user named it."""
    data: Any
    """datasets.Dataset."""

    def read(self, keys: Sequence[str]) -> Iterator[tuple[str, ...]]:
        """The `keys` columns of every row; raises DataError for a missing column."""
        _require(keys, self.data.column_names, self.path)
        number = 0
        for batch in self.data.select_columns(list(keys)).iter(batch_size=_BATCH):
            for values in zip(*(batch[key] for key in keys), strict=True):
                number += 1
                yield _fields(dict(zip(keys, values, strict=True)), keys, f"{self.path}: row {number}")


Reader = TextFile | JsonLines | Parquet | HFDataset


def file_reader(path: str, limit: int) -> Reader:
    """The reader for a file's extension; anything unknown is text, cut at `limit` characters."""
    extension = os.path.splitext(path)[1].lower()
    if extension in JSON_LINES:
        return JsonLines(path)
    if extension in PARQUET:
        return Parquet(path)
    return TextFile(path, limit)


def _require(keys: Sequence[str], names: Sequence[str], path: str) -> None:
    for key in keys:
        if key not in names:
            raise DataError(
                f"{path}: no column '{key}' among {', '.join(names)}; set text_key to one of them"
            )


def _fields(record: dict[str, Any], keys: Sequence[str], where: str) -> tuple[str, ...]:
    values = []
    for key in keys:
        value = record.get(key)
        if not isinstance(value, str):
            found = f"holds {type(value).__name__}" if key in record else "is missing"
            raise DataError(
                f"{where}: field '{key}' {found} where text is expected; repair it or set text_key"
            )
        try:
            value.encode()
        except UnicodeEncodeError:
            raise DataError(
                f"{where}: field '{key}' holds a lone surrogate, which is no text; repair it"
            ) from None
        values.append(value)
    return tuple(values)
