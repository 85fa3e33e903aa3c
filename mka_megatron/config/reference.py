"""The schema for readers: the `--help` text, and docs/configuration.md.

`python -m mka_megatron.config.reference > docs/configuration.md` renders the page again.
"""

from __future__ import annotations

import textwrap

from mka_megatron.config.fields import sections

USAGE = """usage: python -m mka_megatron.training [CONFIG.yaml ...] [section.key=value ...]

Train a model. Later files override earlier ones, section.key=value overrides every file; the values are
YAML, for example data.train=[corpus.jsonl] or memory_hierarchy.l2.summary=mean.
"""


def help_text() -> str:
    """Every key with its type, default and meaning, for a terminal."""
    lines = [USAGE]
    for key, doc, own in sections():
        lines.append(f"{key}: {doc}")
        for field in own:
            lines.append(f"  {field.key} ({field.kind}; default {field.default})")
            lines += textwrap.wrap(field.help, 96, initial_indent="      ", subsequent_indent="      ")
        lines.append("")
    return "\n".join(lines)


def markdown() -> str:
    """The configuration reference as a Markdown page."""
    lines = [
        "# Configuration reference", "",
        "Generated from `mka_megatron/config/schema.py` by",
        "`python -m mka_megatron.config.reference > docs/configuration.md`; edit the docstrings there.", "",
    ]
    for key, doc, own in sections():
        lines += [f"## `{key}`", "", doc, "", "| key | type | default | meaning |", "| --- | --- | --- | --- |"]
        for field in own:
            cells = (f"`{field.key}`", field.kind, f"`{field.default}`", field.help)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(), end="")
