"""--help and docs/configuration.md explain every field of the schema."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from mka_megatron.config import reference
from mka_megatron.config.fields import item_type, type_hints
from mka_megatron.config.fine_tune import FineTuneConfig
from mka_megatron.config.schema import Config

PAGE = Path(__file__).parents[3] / "docs/configuration.md"
FINE_TUNING = PAGE.with_name("fine_tuning.md")


def every_key(section: Any = Config, prefix: str = "") -> list[str]:
    keys = []
    for name, hint in type_hints(section).items():
        item = item_type(hint)
        if dataclasses.is_dataclass(hint):
            keys += every_key(hint, f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{name}")
            if dataclasses.is_dataclass(item):
                keys += every_key(item, f"{prefix}{name}[].")
    return keys


def test_help_explains_every_field() -> None:
    lines = reference.help_text().splitlines()
    for key in every_key():
        at = next(index for index, line in enumerate(lines) if line.startswith(f"  {key} ("))
        assert "default" in lines[at] and len(lines[at + 1].strip()) > 10, key


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == reference.markdown(), (
        "run: python -m mka_megatron.config.reference > docs/configuration.md")


def test_the_page_has_a_row_for_every_field() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert sorted(row.split("`")[1] for row in rows) == sorted(every_key())


def test_fine_tuning_is_explained_too() -> None:
    keys = [name for name, hint in type_hints(FineTuneConfig).items() if not dataclasses.is_dataclass(hint)]
    text = FINE_TUNING.read_text()
    assert text == reference.fine_tune_markdown(), (
        "run: python -m mka_megatron.config.reference fine-tune > docs/fine_tuning.md")
    for key in [*keys, "model.init_from"]:
        assert f"| `{key}` |" in text and f"  {key} (" in reference.fine_tune_help()
