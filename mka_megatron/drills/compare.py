"""Whether two checkpoints hold the same bits: every file, record by record, without unpickling any of it."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

from mka_megatron.training import manifest


@dataclass(frozen=True)
class Comparison:
    """What was compared, and what was not equal."""

    files: int
    tensors: int
    """Storages of tensors: weights, optimizer states, random generators."""
    bytes: int
    """Of these storages."""
    different: tuple[str, ...]
    """Files and records that are not equal, or that only one of the two has."""


def compare(first: Path, second: Path) -> Comparison:
    """Compare two published checkpoints, which are verified before; raises CheckpointError where one is not intact.

    A .pt file is a zip archive of one pickle and the storages of its tensors; both are compared as bytes.
    """
    names = [set(manifest.verify(folder).body["files"]) for folder in (first, second)]
    different = sorted(names[0] ^ names[1])
    tensors = size = 0
    for name in sorted(names[0] & names[1]):
        with zipfile.ZipFile(first / name) as one, zipfile.ZipFile(second / name) as other:
            records = [{_inner(entry): entry for entry in archive.namelist()} for archive in (one, other)]
            different += [f"{name}: {inner}" for inner in sorted(set(records[0]) ^ set(records[1]))]
            for inner in sorted(set(records[0]) & set(records[1])):
                content = one.read(records[0][inner])
                if content != other.read(records[1][inner]):
                    different.append(f"{name}: {inner}")
                if inner.startswith("data/"):
                    tensors, size = tensors + 1, size + len(content)
    return Comparison(len(names[0] & names[1]), tensors, size, tuple(different))


def _inner(entry: str) -> str:
    """A record's name without the archive's own, which is that of the file."""
    return entry.split("/", 1)[-1]
