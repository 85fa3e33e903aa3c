"""YAML as PyYAML's safe loader reads it, without what surprises people.

`1e-3` is a number (YAML 1.1 wants `1.0e-3`), a date stays a string, and so do `017` and `1:30` (which YAML 1.1 takes for
octal and base 60). A key given twice, aliases (nested ones grow without bound) and tags are refused, and so is what no
configuration needs: depth, length, numbers of hundreds of digits.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from mka_megatron.config.errors import ConfigError

LONGEST_TEXT = 1 << 16
"""Characters; PyYAML reads about as many in a second."""
DEEPEST = 32
"""Levels of nesting."""
_MOST_DIGITS = 300


class _Loader(yaml.SafeLoader):
    """SafeLoader with the differences named above; it builds nothing but plain Python values."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _problem("aliases are not supported, write the value out", event.start_mark)
        if event.tag is not None:
            raise _problem("tags such as !!str are not supported, write a plain value or quote it", event.start_mark)
        if self.depth == DEEPEST:
            raise _problem("it is nested too deeply", event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise _problem(f"the key {key.value} is given twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)

    def construct_text(self, node: yaml.ScalarNode) -> str:
        text = str(node.value)
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise _problem("half a surrogate pair is not a character", node.start_mark)
        return text

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > _MOST_DIGITS:
            raise _problem(f"a number has {len(node.value)} digits", node.start_mark)
        return int(node.value.replace("_", ""), 0)


def _problem(problem: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


_TAG = "tag:yaml.org,2002:"
_REPLACED = {f"{_TAG}timestamp", f"{_TAG}int", f"{_TAG}float"}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(f"{_TAG}int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    f"{_TAG}float",
    re.compile(r"^[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"),
    list("-+0123456789."),
)
_Loader.add_constructor(f"{_TAG}str", _Loader.construct_text)
_Loader.add_constructor(f"{_TAG}int", _Loader.construct_integer)


def parse_yaml(text: str, origin: str) -> Any:
    """The value of YAML `text`; ConfigError names `origin`, the line and the problem."""
    if len(text) > LONGEST_TEXT:
        raise ConfigError(f"{origin} has {len(text)} characters; a configuration has at most {LONGEST_TEXT}.")
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{origin}{line} is not valid YAML: {_on_one_line(error.problem)}.") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{origin} is not valid YAML: {_on_one_line(str(error))}.") from None


def _on_one_line(problem: str | None) -> str:
    """PyYAML's words, with what they quote of the file made printable and short."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join((problem or "it cannot be parsed").split()))
    return text if len(text) <= 200 else f"{text[:197]}..."
