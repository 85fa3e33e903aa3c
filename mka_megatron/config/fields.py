"""What the schema says about its fields: dotted key, type in words, default, docstring."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from mka_megatron.config.errors import show
from mka_megatron.config.schema import Config


@dataclass(frozen=True)
class FieldInfo:
    """One field for a reader."""

    key: str
    """Dotted key; `[]` stands for an item of a list."""
    kind: str
    """Type in words."""
    default: str
    """Default value as YAML, or `required`."""
    help: str
    """The field's docstring on one line."""


@cache
def type_hints(section: type) -> dict[str, Any]:
    """Resolved annotations of a schema dataclass, in field order."""
    hints = typing.get_type_hints(section)
    return {f.name: hints[f.name] for f in dataclasses.fields(section)}


@cache
def docstrings(section: type) -> dict[str, str]:
    """The string after each field of a schema dataclass, whitespace folded."""
    body = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0]
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
                and isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)):
            found[statement.target.id] = " ".join(str(following.value.value).split())
    return found


def item_type(hint: Any) -> Any:
    """`X` of `tuple[X, ...]`, else None."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else None


def is_section(hint: Any) -> bool:
    """True for a schema dataclass."""
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def kind(hint: Any) -> str:
    """The type in words, for a sentence such as "must be ..."."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return " or ".join("null" if arm is type(None) else kind(arm) for arm in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Literal:
        options = [show(option) for option in typing.get_args(hint)]
        return options[0] if len(options) == 1 else f"{', '.join(options[:-1])} or {options[-1]}"
    if item_type(hint) is not None:
        return f"a list of {'mappings' if is_section(item_type(hint)) else kind(item_type(hint)).split()[-1] + 's'}"
    if is_section(hint):
        return "a mapping"
    return {int: "an integer", float: "a number", str: "a string", bool: "true or false"}[hint]


def annotation_at(location: tuple[str | int, ...], root: type = Config) -> Any:
    """The annotation of the field (or list item) at `location` in `root`, None where there is none."""
    hint: Any = root
    for step in location:
        if isinstance(step, int):
            hint = item_type(hint)
        else:
            hint = type_hints(hint).get(step) if is_section(hint) else None
        if hint is None:
            return None
    return hint


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    if isinstance(value, tuple):
        return f"[{', '.join(show(getattr(item, 'path', item)) for item in value)}]"
    return show(value)


def sections(section: type = Config, prefix: str = "") -> Iterator[tuple[str, str, list[FieldInfo]]]:
    """Every section of the schema, depth first: (dotted key, docstring, its own fields)."""
    own: list[FieldInfo] = []
    below: list[tuple[type, str]] = []
    for field in dataclasses.fields(section):
        hint = type_hints(section)[field.name]
        key = f"{prefix}{field.name}"
        if is_section(hint):
            below.append((hint, f"{key}."))
            continue
        own.append(FieldInfo(key, kind(hint), _default(field), docstrings(section)[field.name]))
        if is_section(item_type(hint)):
            below.append((item_type(hint), f"{key}[]."))
    if own:
        yield prefix.removesuffix("."), " ".join((section.__doc__ or "").split()), own
    for child, child_prefix in below:
        yield from sections(child, child_prefix)
