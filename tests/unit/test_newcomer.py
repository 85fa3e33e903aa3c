"""The README and what tests/newcomer/walk.py expects of its commands do not drift apart."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.newcomer.readme import Command, commands
from tests.newcomer.walk import ROOT, Expectation, expectations, paired, typed, verdict

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_command_is_expected_and_every_expectation_is_a_command() -> None:
    for command, expected in paired(README, expectations()):
        text = typed(command, expected)
        assert expected.skip or expected.output or expected.files or expected.command.startswith(". "), f"nothing is checked of {text}"
        if command.language == "bash":
            shlex.split(text)


def test_drift_is_an_error() -> None:
    expected = expectations()
    first = expected[0].command
    for changed in (README.replace(f"{first}\n", "", 1), README.replace(first, first + " x", 1), README + "\n```bash\nls\n```\n"):
        with pytest.raises(ValueError, match="command"):
            paired(changed, expected)
    with pytest.raises(ValueError, match="replaces"):
        typed(Command("bash", "ls"), Expectation("ls", replace={"x": "y"}))


def test_commands_as_typed() -> None:
    text = "```bash\nls a \\\n    b  # why\n\n# no\nls '#c'\n```\n```yaml\nx: 1\n```\n```python\nimport a\na.b()\n```\n"
    assert commands(text) == [Command("bash", "ls a b"), Command("bash", "ls '#c'"), Command("python", "import a\na.b()\n")]


def test_verdicts(tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    expected = Expectation("x", output=["per.*y"], files=["there"])
    assert verdict(expected, 0, "perplexity 3", tmp_path) == "as expected"
    assert "exit code 2" in verdict(expected, 2, "perplexity 3", tmp_path)
    assert "per.*y" in verdict(expected, 0, "", tmp_path)
    assert "absent" in verdict(Expectation("x", files=["absent"]), 0, "", tmp_path)
    assert "not done" in verdict(expected, 124, "", tmp_path)
