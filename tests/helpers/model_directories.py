"""Whole model directories: tiny weights, a tokenizer, and what else comes with a model."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.hf_checkpoints import SHAPE, random_model, save
from tests.helpers.tokenizers import words


def write_directory(directory: Path, family: str = "qwen2", sharded: bool = False, dtype: object = None) -> Path:
    """A model of `family` with all the files that one has on the hub."""
    model = random_model(family)
    save(model if dtype is None else model.to(dtype), directory, sharded)
    words(directory, [f"w{i}" for i in range(SHAPE["vocab_size"] - 1)] + ["<eos>"])
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (directory / "LICENSE").write_text("Apache-2.0")
    (directory / "README.md").write_text("# A model\n")
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of `directory` by relative name."""
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
