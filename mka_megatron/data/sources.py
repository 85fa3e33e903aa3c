"""What a `data.train` or `data.valid` entry names: resolved, fingerprinted, and read as a stream."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mka_megatron.config.schema import SourceConfig
from mka_megatron.data.batch import DataError
from mka_megatron.data.readers import HFDataset, Reader, TextFile, file_reader

_LIMIT = 4 << 20  # characters of the longest document read from a text file
_PIECES = 64  # documents that a lone text file is cut into
_SHORTEST = 16 << 10  # but not into shorter ones than this


@dataclass(frozen=True)
class Part:
    """One file of a source."""

    name: str
    """Its name within the source, the same wherever the source lies."""
    reader: Reader
    size: int
    """Bytes, about."""


@dataclass(frozen=True)
class Source:
    """Documents to be tokenised, or a Megatron dataset that already is."""

    path: str
    """How the user named it."""
    prefix: str | None
    """Megatron .bin/.idx prefix; then there are no parts."""
    parts: tuple[Part, ...]
    """Files in a fixed order."""
    fingerprint: str
    """Changes when a file is added, removed or modified."""

    @property
    def size(self) -> int:
        """Bytes to read, about."""
        return sum(part.size for part in self.parts)

    def records(self, keys: Sequence[str]) -> Iterator[tuple[str, ...]]:
        """Fields of every document that is not empty, in a fixed order, streamed.

        Raises DataError naming file and line for unreadable input.
        """
        yield from _records(self.parts, keys)

    def sample(self, keys: Sequence[str]) -> Iterator[tuple[str, ...]]:
        """The same documents with the files in an order that has nothing to do with their names."""
        yield from _records(
            sorted(self.parts, key=lambda part: hashlib.sha256(part.name.encode()).digest()), keys
        )


def _records(parts: Sequence[Part], keys: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for part in parts:
        try:
            for fields in part.reader.read(keys):
                if all(fields):
                    yield fields
        except OSError as error:
            raise DataError(
                f"{part.reader.path}: {error.strerror or error}; make it readable or leave it out"
            ) from None


def open_source(source: SourceConfig, field: str) -> Source:
    """Resolve a source without reading its documents.

    Args:
        source: the configuration entry.
        field: its dotted name, for messages.

    Raises:
        DataError: nothing is there, or it cannot be opened.
    """
    path = source.path
    if path == "stdlib":
        return _files(path, _standard_library(), field, cut=False, skip_undecodable=True)
    if path.startswith("hf:"):
        return _hugging_face(path, field)
    if prefix := indexed_prefix(path):
        return Source(path, prefix, (), _digest([_stat(prefix + end, end) for end in (".bin", ".idx")]))
    if os.path.isdir(path):
        found = [(os.path.relpath(file, path), file) for file in _walk(path)]
        return _files(path, found, field, cut=False)
    if os.path.isfile(path):
        return _files(path, [(os.path.basename(path), path)], field, cut=True)
    matches = sorted(file for file in glob.glob(path, recursive=True) if os.path.isfile(file))
    if not matches:
        raise DataError(
            f"{field}: '{path}' is no file, directory, glob with matches, .bin/.idx prefix, hf:<name> or stdlib; "
            "correct the path"
        )
    return _files(
        path,
        [(os.path.relpath(file, os.path.commonpath(matches)), file) for file in matches],
        field,
        cut=False,
    )


def document_fields(data_format: str, text_key: str) -> tuple[str, ...]:
    """The fields of a record that make a document: one text, or a prompt and its response for sft."""
    return ("prompt", "response") if data_format == "sft" else (text_key,)


def indexed_prefix(path: str) -> str | None:
    """The Megatron prefix that `path` (with or without .bin/.idx) names, or None."""
    prefix = path[:-4] if path.endswith((".bin", ".idx")) else path
    return prefix if os.path.isfile(prefix + ".bin") and os.path.isfile(prefix + ".idx") else None


def _files(
    path: str, found: Sequence[tuple[str, str]], field: str, *, cut: bool, skip_undecodable: bool = False
) -> Source:
    """A source of (name, file) pairs; `cut`: a lone text file is a collection, not one document."""
    parts, described = [], []
    for name, file in sorted(found):
        try:
            name, size, modified = _stat(file, name)
        except OSError as error:
            raise DataError(f"{field}: {file}: {error.strerror}; make it readable or leave it out") from None
        limit = min(_LIMIT, max(_SHORTEST, size // _PIECES)) if cut else _LIMIT
        reader = TextFile(file, _LIMIT, True) if skip_undecodable else file_reader(file, limit)
        parts.append(Part(name, reader, size))
        described.append((name, size, modified))
    if not any(part.size for part in parts):
        raise DataError(f"{field}: '{path}' holds no data; name files with text in them")
    return Source(path, None, tuple(parts), _digest(["cut" if cut else "whole", *described]))


def _walk(root: str) -> Iterator[str]:
    """Files below `root`, without hidden ones."""
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (os.path.join(folder, name) for name in files if not name.startswith("."))


def _standard_library() -> list[tuple[str, str]]:
    root = sysconfig.get_paths()["stdlib"]
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [
            name for name in folders if name not in ("site-packages", "dist-packages", "__pycache__")
        ]
        for name in files:
            file = os.path.join(folder, name)
            if name.endswith(".py") and os.path.isfile(file):
                found.append((os.path.relpath(file, root), file))
    return found


def _hugging_face(path: str, field: str) -> Source:
    """hf:<name or directory>[:<config>[:<split>]]; the split defaults to train."""
    name, config, split = [*path.removeprefix("hf:").split(":"), "", ""][:3]
    split = split or "train"
    import datasets

    try:
        if os.path.isdir(name) and any(
            os.path.isfile(os.path.join(name, mark)) for mark in ("dataset_dict.json", "state.json")
        ):
            data: Any = datasets.load_from_disk(name)
            if isinstance(data, datasets.DatasetDict):
                data = data[split]
        else:
            data = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # `datasets` raises errors of many libraries here
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{field}: '{path}' cannot be loaded, split {split} ({reason}); correct name, config or split"
        ) from None
    if len(data) == 0:
        raise DataError(f"{field}: '{path}' holds no rows; name another data set or split")
    size = int(data.data.nbytes) if hasattr(data, "data") else 0
    return Source(
        path, None, (Part(path, HFDataset(path, data), size),), _digest([data._fingerprint, len(data)])
    )


def _stat(file: str, name: str) -> tuple[str, int, int]:
    info = os.stat(file)
    return name, info.st_size, info.st_mtime_ns


def _digest(description: Any) -> str:
    return hashlib.sha256(json.dumps(description).encode()).hexdigest()
