"""The schemas for readers: the `--help` texts, docs/configuration.md and docs/fine_tuning.md.

`python -m mka_megatron.config.reference > docs/configuration.md` renders the page again, with `fine-tune` the other.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence

from mka_megatron.config.fields import FieldInfo, sections
from mka_megatron.config.fine_tune import FineTuneConfig
from mka_megatron.config.schema import Config

USAGE = """usage: python -m mka_megatron.training [CONFIG.yaml ...] [section.key=value ...]

Train a model. Later files override earlier ones, section.key=value overrides every file; the values are
YAML, for example data.train=[corpus.jsonl] or memory_hierarchy.l2.summary=mean.
"""


def help_text() -> str:
    """Every key with its type, default and meaning, for a terminal."""
    return f"{USAGE}\n{_keys(Config)}"


def fine_tune_help() -> str:
    """The same of fine-tuning's keys."""
    return _keys(FineTuneConfig)


def _keys(root: type) -> str:
    lines = []
    for key, doc, own in sections(root):
        lines.append(f"{key}: {doc}" if key else doc)
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
        lines += [f"## `{key}`", "", doc, "", *_table(own)]
    return "\n".join(lines)


def fine_tune_markdown() -> str:
    """The keys of fine-tuning that a training run does not have, as a Markdown page."""
    lines = [
        "# Fine-tuning reference", "",
        "The keys of `tools/train_hf.py`. Its sections `attention`, `routing`, `memory_hierarchy` and `data` are those of",
        "the [configuration reference](configuration.md). Generated from `mka_megatron/config/fine_tune.py` by",
        "`python -m mka_megatron.config.reference fine-tune > docs/fine_tuning.md`; edit the docstrings there.", "",
    ]
    for key, doc, own in sections(FineTuneConfig):
        if key in ("", "model"):
            lines += [*([f"## `{key}`", ""] if key else []), doc, "", *_table(own)]
    return "\n".join(lines)


def _table(fields: Sequence[FieldInfo]) -> list[str]:
    lines = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for field in fields:
        cells = (f"`{field.key}`", field.kind, f"`{field.default}`", field.help)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return [*lines, ""]


if __name__ == "__main__":
    print(fine_tune_markdown() if sys.argv[1:] == ["fine-tune"] else markdown(), end="")
