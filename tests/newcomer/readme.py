"""The commands of the README, in its order."""

from __future__ import annotations

import re
from dataclasses import dataclass

_BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Command:
    """One line of a bash block, its continuations joined, or a whole python block."""

    language: str
    text: str


def commands(readme: str) -> list[Command]:
    """What a reader would type, from the text of the README."""
    found = []
    for language, body in _BLOCK.findall(readme):
        if language == "python":
            found.append(Command(language, body))
            continue
        lines = re.sub(r"\s*\\\n\s*", " ", body).splitlines()
        stripped = (re.sub(r"\s+#.*$", "", line).strip() for line in lines)
        found += [Command(language, line) for line in stripped if line and not line.startswith("#")]
    return found
