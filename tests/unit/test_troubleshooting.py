"""docs/troubleshooting.md quotes messages that the sources have, and some of every file that refuses something."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
RAISERS = {"ConfigError", "DataError", "CheckpointError", "TierError", "NonFiniteError", "LibraryError", "refuse"}
SPOKEN = re.compile(r'\b(?:fail|say) "((?:[^"\\]|\\.)*)"')
LITERAL_LETTERS = 25
"""A message with fewer of its own is put together elsewhere."""


def written(node: ast.expr) -> str:
    """The words of a string expression, … for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(written, node.values))
    if isinstance(node, ast.BinOp):
        return written(node.left) + written(node.right)
    return "…"


def called(node: ast.Call) -> str:
    return node.func.id if isinstance(node.func, ast.Name) else node.func.attr if isinstance(node.func, ast.Attribute) else ""


def messages() -> dict[str, list[str]]:
    """File -> the messages that it raises or says."""
    found: dict[str, list[str]] = {}
    for path in [*(ROOT / "mka_megatron").rglob("*.py"), *(ROOT / "tools").glob("*.py")]:
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call) and called(node) in RAISERS]
        found[str(path.relative_to(ROOT))] = [": ".join(map(written, node.args)) for node in calls]
    for path in (ROOT / "launch").rglob("*"):
        if path.is_file():
            texts = SPOKEN.findall(path.read_text(encoding="utf-8"))
            found[str(path.relative_to(ROOT))] = [re.sub(r"\$\{[^}]*\}|\$\([^)]*\)|\$\w+", "…", text) for text in texts]
    return found


def quoted(page: str) -> list[str]:
    """The quotations that an entry of the page begins with."""
    entries = re.findall(r"^- (`.*?)(?=^- |^#|\Z)", page, re.M | re.S)
    return [each for entry in entries for each in re.match(r"((?:`[^`]+`,?\s*)+)", entry)[0].strip("` ,\n").replace("\n", " ").split("`") if each.strip(" ,")]


def holds(message: str, quotation: str) -> bool:
    """The quotation's pieces are in the message, in order."""
    message, at = " ".join(message.split()), 0
    for piece in (part.strip() for part in quotation.split("…")):
        at = message.find(piece, at)
        if at < 0:
            return False
        at += len(piece)
    return True


MESSAGES = messages()
QUOTATIONS = quoted(PAGE)


def test_every_quotation_is_a_message() -> None:
    assert len(QUOTATIONS) > 150
    stale = [each for each in QUOTATIONS if not any(holds(message, each) for own in MESSAGES.values() for message in own)]
    assert not stale, "no source says this any more"


@pytest.mark.parametrize("name", sorted(name for name, own in MESSAGES.items() if any(sum(map(str.isalpha, m)) >= LITERAL_LETTERS for m in own)))
def test_every_file_that_refuses_is_on_the_page(name: str) -> None:
    assert any(holds(message, each) for message in MESSAGES[name] for each in QUOTATIONS), MESSAGES[name]


def test_matching() -> None:
    assert holds("a file x is gone; copy it", "file … gone") and not holds("gone is a file x", "file … gone")
    assert quoted("- `a b`, `c\n  d`: fix `e`\n- *f*: g\n- `h`: i\n") == ["a b", "c   d", "h"]
