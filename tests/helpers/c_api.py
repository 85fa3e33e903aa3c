"""kernels/c_api.h read as text, to compare the bindings' structs with it."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

HEADER = Path(__file__).parents[2] / "kernels" / "c_api.h"


def struct_fields(name: str) -> list[tuple[str, type]]:
    """(name, ctypes type) of the members of `typedef struct {...} name`, in order."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", HEADER.read_text(encoding="utf-8"), flags=re.DOTALL)
    body = re.search(r"typedef\s+struct\s*\w*\s*\{([^{}]*)\}\s*" + name + r"\s*;", text)
    assert body, f"{name} is not in {HEADER}"
    found: list[tuple[str, type]] = []
    for member in filter(None, (m.strip() for m in body[1].split(";"))):
        kind = re.match(r"(?:const\s+)?(\w+)\s*(.*)", member, re.DOTALL)
        assert kind, member
        for each in kind[2].split(","):
            pointer = "*" in each
            plain = {"int64_t": ctypes.c_int64, "double": ctypes.c_double}
            member_name, _, length = each.strip(" *\n]").partition("[")
            type_ = ctypes.c_void_p if pointer else plain[kind[1]]
            found.append((member_name, type_ * int(length) if length else type_))
    return found
