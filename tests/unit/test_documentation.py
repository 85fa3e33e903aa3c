"""README.md and docs/ name only what is there: links and their anchors, files, options of the tools."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
NAMED = re.compile(r"(?<![\w./:<-])((?:mka_megatron|tests|docs|configs|launch|tools|kernels)/[\w./*-]*\w)(?!/?<)")
PLACEHOLDER = re.compile(r"MODEL|CONTEXT|\bresults\b")
"""In names that stand for several files, or for one that a run writes."""
COMMAND = re.compile(r"\b((?:tools|kernels)/\w+\.py)([^`|\n#]*)")
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
SHARED = {"tools/evaluate.py": "tools/evaluated_model.py"}
"""Tool -> where the rest of its options is."""


def anchors(page: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    prose = re.sub(r"^```.*?^```", "", page, flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", prose, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def options(tool: str) -> set[str]:
    """The options in the sources of a tool."""
    sources = [tool, *([SHARED[tool]] if tool in SHARED else [])]
    return {"--help", *re.findall(r'"(--[\w-]+)"', "".join((ROOT / source).read_text(encoding="utf-8") for source in sources))}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_are_there(page: Path) -> None:
    for name in NAMED.findall(page.read_text(encoding="utf-8")):
        assert PLACEHOLDER.search(name) or any(ROOT.glob(name)), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_options_that_the_tools_have(page: Path) -> None:
    text = re.sub(r"\\\n", " ", page.read_text(encoding="utf-8"))
    for tool, arguments in COMMAND.findall(text):
        unknown = set(OPTION.findall(arguments)) - options(tool)
        assert not unknown, f"{tool}{arguments}"


def test_anchors() -> None:
    assert anchors("# A b\n```\n# c\n```\n## On a GPU, `x`\n") == {"a-b", "on-a-gpu-x"}
