"""mka_manifest.json: the bytes and SHA-256 of every file of a directory, so that damage shows.

    {"version": 1, "files": {name: {"bytes": n, "sha256": hex}}, "base": {name: text}}

`base` (an import's only) keeps the JSON files of the plain model that were rewritten, letter for letter.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from mka_megatron.config.errors import ConfigError, show
from mka_megatron.files.jsonfile import dump, read_object

NAME = "mka_manifest.json"
LARGEST = 32 << 20
"""Bytes of the largest manifest that is read."""
_VERSION = 1
_CHUNK = 4 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Digest:
    """Size and SHA-256 of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a directory should hold; names are relative paths with slashes."""

    files: Mapping[str, Digest]
    base: Mapping[str, str] = field(default_factory=dict)


def read(directory: Path) -> Manifest | None:
    """The manifest of `directory`, None where it has none; ConfigError where it is not one."""
    path = directory / NAME
    if not path.is_file():
        return None
    raw = read_object(path, LARGEST)
    if raw.get("version") != _VERSION:
        raise ConfigError(f"version is {show(raw.get('version'))} in {path}: this one reads {_VERSION}; update mka_megatron.")
    files, base = raw.get("files"), raw.get("base", {})
    if not isinstance(files, dict) or not isinstance(base, dict) or not all(isinstance(t, str) for t in base.values()):
        raise ConfigError(f"{path} is not a manifest; convert the model again.")
    return Manifest({name: _digest(path, name, entry) for name, entry in files.items()}, base)


def verify(directory: Path) -> Manifest | None:
    """Read every file that the manifest of `directory` lists and compare; None where there is no manifest.

    Raises:
        ConfigError: naming the first file that is missing or differs.
    """
    manifest = read(directory)
    if manifest is not None:
        check_sizes(directory, manifest)
        for name, expected in manifest.files.items():
            check(directory / name, digest_of(directory / name), expected)
    return manifest


def check_sizes(directory: Path, manifest: Manifest) -> None:
    """The files of `manifest` are there with their sizes; raises ConfigError naming the first that is not."""
    for name, expected in manifest.files.items():
        try:
            found = (directory / name).stat().st_size
        except OSError:
            raise ConfigError(f"{directory / name} is missing, and {NAME} lists it; copy the model again.") from None
        if found != expected.bytes:
            raise ConfigError(f"{directory / name} has {found} bytes and {NAME} says {expected.bytes}; copy the model again.")


def check(path: Path, found: Digest, expected: Digest | None) -> None:
    """Refuse a file whose bytes are not those that its manifest lists (`expected`; None: it lists none)."""
    if expected is not None and found != expected:
        raise ConfigError(f"{path} is damaged: its SHA-256 is not the one in {NAME}; copy the model again.")


def digest_of(path: Path) -> Digest:
    """Reads the file once; raises ConfigError where it cannot."""
    digest, size = hashlib.sha256(), 0
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; copy the model again.") from None
    return Digest(size, digest.hexdigest())


def write(directory: Path, known: Mapping[str, Digest], base: Mapping[str, str] | None = None) -> None:
    """Write the manifest of all files under `directory`; those in `known` are not read again. Raises OSError."""
    files = dict(known)
    for path in _files(directory):
        name = path.relative_to(directory).as_posix()
        if name not in files and name != NAME:
            files[name] = digest_of(path)
    body: dict[str, Any] = {
        "version": _VERSION,
        "files": {name: {"bytes": digest.bytes, "sha256": digest.sha256} for name, digest in files.items()},
    }
    if base:
        body["base"] = dict(base)
    with open(directory / NAME, "xb") as file:
        file.write(dump(body))
        file.flush()
        os.fsync(file.fileno())


def _files(directory: Path) -> Iterable[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _digest(path: Path, name: str, entry: Any) -> Digest:
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise ConfigError(f"{show(name)} in {path} is not a file of that directory; convert the model again.")
    if isinstance(entry, dict) and set(entry) == {"bytes", "sha256"}:
        size, sha256 = entry["bytes"], entry["sha256"]
        if type(size) is int and isinstance(sha256, str) and _SHA256.fullmatch(sha256):
            return Digest(size, sha256)
    raise ConfigError(f"{show(name)} is {show(entry)} in {path}: it must be bytes and sha256; convert the model again.")
