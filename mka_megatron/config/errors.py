"""The one exception of a wrong configuration."""

from __future__ import annotations


class ConfigError(ValueError):
    """A configuration that cannot run. The message is one sentence: key, value and fix."""


def show(value: object) -> str:
    """`value` as a user would write it, on one line of at most 80 characters."""
    if value is None or isinstance(value, bool):
        text = {None: "null", True: "true", False: "false"}[value]
    elif isinstance(value, str):
        text = value if value.isprintable() and value and value == value.strip() else repr(value)
    else:
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def refuse(key: str, value: object, reason: str) -> ConfigError:
    """The sentence "`key` is `value`: `reason`." as an exception to raise."""
    return ConfigError(f"{key} is {show(value)}: {reason}.")
