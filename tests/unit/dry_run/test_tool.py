"""tools/dry_run.py: a wrong command line is one sentence, before anything is built."""

from __future__ import annotations

import pytest

from tools import dry_run as tool

SEVEN = "configs/run/qwen2.5-7b.yaml"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--ranks", "0"], "--ranks is 0: it must be at least 1."),
        (["--ranks", "-8"], "--ranks is -8: it must be at least 1."),
        (["--ranks", "8", "--jobs", "0"], "--jobs is 0: it must be at least 1."),
        (["--ranks", "8", "--ranks-per-node", "0"], "--ranks-per-node is 0: it must be at least 1."),
        (["--ranks", "8", "--json", "/no/such/folder/dry.json"], "--json is /no/such/folder/dry.json: its directory does not exist;"),
        (["--ranks", "8", "training.stepz=3"], "training.stepz"),
        (["--ranks", "8", "--rank", "8", "model.vocab_size=152064"], "--rank is 8: the world's ranks are 0 to 7."),
    ],
)
def test_a_wrong_command_line_is_one_sentence(capsys, arguments: list[str], expected: str) -> None:
    assert tool.main([SEVEN, *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and expected in said.err and said.err.count("\n") == 1 and said.err.endswith(".\n")
