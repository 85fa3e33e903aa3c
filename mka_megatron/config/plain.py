"""Plain JSON values as a typed Config by the standard library alone: what `typed` is where pydantic is not there.

Used by the files that travel with a Hugging Face model; it refuses what `typed` refuses, in shorter sentences.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal, Union, get_args, get_origin

from mka_megatron.config.errors import ConfigError, show
from mka_megatron.config.schema import Config

Origins = dict[tuple[str, ...], str]
"""Path of a key -> the file that set it; only a section's own is looked up."""


def typed(merged: dict[str, Any], origins: Origins) -> Config:
    """`merged` as a Config; strict types, no unknown keys. Raises ConfigError."""
    sections = {name: _section(value, hint, name, origins.get((name,), "the configuration"))
                for name, value, hint in _fields(merged, Config, "", "the configuration")}  # fmt: skip
    return Config(**sections)


def _fields(value: Any, section: type, key: str, origin: str) -> list[tuple[str, Any, Any]]:
    """(name, value, type) of the keys that are there."""
    if not isinstance(value, dict):
        raise ConfigError(f"{key} is {show(value)} in {origin}: it must be an object.")
    hints = typing.get_type_hints(section)
    unknown = next((name for name in value if name not in hints), None)
    if unknown is not None:
        raise ConfigError(f"{show(f'{key}.{unknown}'.lstrip('.'))} in {origin} is not a configuration key.")
    return [(name, each, hints[name]) for name, each in value.items()]


def _section(value: Any, section: Any, key: str, origin: str) -> Any:
    built = {}
    for name, each, hint in _fields(value, section, key, origin):
        inner = f"{key}.{name}"
        if dataclasses.is_dataclass(hint):
            built[name] = _section(each, hint, inner, origin)
        elif _is(each, hint):
            built[name] = float(each) if isinstance(each, int) and _takes(hint, float) and not _takes(hint, int) else each
        else:
            raise ConfigError(f"{inner} is {show(each)} in {origin}: it has another type.")
    return section(**built)


def _is(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint) and isinstance(value, str)
    if get_origin(hint) in (Union, types.UnionType):
        return any(_is(value, each) for each in get_args(hint))
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float)) if hint is float else isinstance(value, hint)


def _takes(hint: Any, kind: type) -> bool:
    return kind in (get_args(hint) or (hint,))
