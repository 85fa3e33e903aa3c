"""Plain values (of YAML or JSON) as a typed configuration; a wrong one is a sentence that says where it was written."""

from __future__ import annotations

import difflib
import json
from functools import cache
from typing import Any, TypeVar, cast

import pydantic

from mka_megatron.config.errors import ConfigError, show
from mka_megatron.config.fields import annotation_at, is_section, kind, sections, type_hints
from mka_megatron.config.schema import Config

COMMAND_LINE = "the command line"
T = TypeVar("T")
Origins = dict[tuple[str, ...], str]
"""Path of a key -> the file (or the command line) that set it; a key without one takes its section's."""


@cache
def _adapter(root: Any) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(root)


def typed(merged: dict[str, Any], origins: Origins) -> Config:
    """Merged layers as a Config; strict types, no unknown keys. Raises ConfigError."""
    return typed_as(Config, merged, origins)


def typed_as(root: type[T], merged: dict[str, Any], origins: Origins) -> T:
    """The same for another schema whose sections are `root`'s."""
    try:
        text = json.dumps(merged)
    except (TypeError, ValueError, RecursionError):
        raise _unreadable(origins) from None
    try:
        return _adapter(cast(Any, root)).validate_json(text, strict=True, extra="forbid")
    except pydantic.ValidationError as error:
        errors = sorted(error.errors(include_url=False), key=lambda e: e["type"] != "unexpected_keyword_argument")
        raise _sentence(errors[0]["type"], errors[0]["loc"], errors[0]["input"], origins, root) from None


def _sentence(problem: str, location: tuple[str | int, ...], value: Any, origins: Origins, root: type) -> ConfigError:
    """pydantic's first complaint as our sentence."""
    if problem == "json_invalid":
        return _unreadable(origins)
    key = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in location).lstrip(".")
    names = tuple(step for step in location if isinstance(step, str))
    origin = next((origins[names[:n]] for n in range(len(names), 0, -1) if names[:n] in origins), COMMAND_LINE)
    if problem == "unexpected_keyword_argument":
        return ConfigError(f"{show(key)} in {origin} is not a configuration key; {_suggestion(location, root)}.")
    if problem == "missing":
        return ConfigError(f"{key} is missing in {origin}; add it.")
    return ConfigError(f"{key} is {show(value)} in {origin}: it must be {kind(annotation_at(location, root))}.")


def _unreadable(origins: Origins) -> ConfigError:
    """For what JSON does not hold; YAML files have nothing of that kind."""
    return ConfigError(f"A value in {' or '.join(dict.fromkeys(origins.values())) or COMMAND_LINE} is not plain JSON; use numbers, "
                       "text, true, false, null, and lists and objects of them, not too deep.")


def _suggestion(location: tuple[str | int, ...], root: type) -> str:
    """The nearest known key, from the same section first, then from anywhere."""
    parent = annotation_at(location[:-1], root) if len(location) > 1 else root
    wrong = str(location[-1])
    prefix = "".join(f"[{s}]" if isinstance(s, int) else f".{s}" for s in location[:-1]).lstrip(".")
    if is_section(parent):
        near = difflib.get_close_matches(wrong, list(type_hints(parent)), n=1, cutoff=0.6)
        if near:
            return f"did you mean {prefix}{'.' if prefix else ''}{near[0]}"
    leaves = {field.key.rsplit(".", 1)[-1]: field.key for _, _, own in sections(root) for field in own}
    near = difflib.get_close_matches(wrong, list(leaves), n=1, cutoff=0.6)
    if near:
        return f"did you mean {leaves[near[0]]}"
    if is_section(parent):
        return f"{prefix or 'the top level'} has {', '.join(type_hints(parent))}"
    return "see --help for the keys"
