"""JSON files of untrusted origin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mka_megatron.config.errors import ConfigError, show


def parse_object(text: bytes, origin: str) -> dict[str, Any]:
    """The JSON object `text`; ConfigError names `origin` where it is something else or has a key twice."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError:
        raise ConfigError(f"{origin} is not usable: it is nested too deeply; copy the model again.") from None
    except ValueError as error:
        reason = str(error) if isinstance(error, _Refused) else "it is not JSON"
        raise ConfigError(f"{origin} is not usable: {reason}; copy the model again.") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{origin} is not usable: it is not a JSON object; copy the model again.")
    return value


def read_object(path: Path, limit: int) -> dict[str, Any]:
    """The JSON object in the file `path` of at most `limit` bytes; raises ConfigError."""
    return parse_object(read_bytes(path, limit), str(path))


def read_bytes(path: Path, limit: int) -> bytes:
    """The whole file `path`; ConfigError where it cannot be read or has more than `limit` bytes."""
    try:
        with open(path, "rb") as file:
            text = file.read(limit + 1)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; copy the model again.") from None
    if len(text) > limit:
        raise ConfigError(f"{path} is larger than {limit >> 20} MiB, which no such file is; copy the model again.")
    return text


def dump(value: dict[str, Any]) -> bytes:
    """`value` as transformers writes its JSON files."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


class _Refused(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _Refused(f"{show(name)} is given twice")
        found[name] = value
    return found


def _refuse_constant(name: str) -> Any:
    raise _Refused(f"it holds {name}")
