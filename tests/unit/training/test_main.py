"""The command line: help, the merged configuration, and one sentence for what is wrong."""

from __future__ import annotations

import sys

import pytest
import yaml

from mka_megatron.training import __main__ as command

TINY = "configs/run/tiny.yaml"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_WAIT_FOR_RANK_0", 0.0)


def no_training(*_: object) -> int:
    raise AssertionError("training was started")


def test_help_names_every_section_and_the_exit_codes(capsys) -> None:
    assert command.main(["--help"]) == 0
    text = capsys.readouterr().out
    for key in ("training.steps", "attention.variant", "memory_hierarchy.l2.decay", "--print-config", "Exit codes"):
        assert key in text


def test_print_config_shows_the_merged_values(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "run", no_training)
    assert command.main([TINY, "training.steps=77", "--print-config"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["training"]["steps"] == 77
    assert shown["data"]["train"][0]["path"] == "stdlib"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([TINY, "training.stepz=3"], "training.steps"),
        ([TINY, "training.steps=many"], "training.steps is many"),
        (["no_such_file.yaml"], "no_such_file.yaml does not exist"),
        ([TINY, "--resume"], "--resume is not an option"),
        ([TINY, "parallel.pipeline_parallel=2"], "parallel.pipeline_parallel"),
        ([TINY, "parallel.tensor_parallel=2"], "parallel.tensor_parallel"),
    ],
)
def test_a_wrong_configuration_is_one_sentence_and_exit_code_2(arguments, expected, capsys, monkeypatch) -> None:
    monkeypatch.setattr(command, "run", no_training)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert command.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert expected in captured.err and captured.err.count("\n") == 1 and captured.err.endswith(".\n")


def test_only_rank_0_speaks(capsys, monkeypatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(command.time, "sleep", waits.append)
    monkeypatch.setenv("RANK", "1")
    assert command.main([TINY, "training.steps=many"]) == 2
    assert len(waits) == 1  # torchrun ends it here
    assert command.main(["--help"]) == 0
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_a_refusal_comes_before_any_process_group(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "mka_megatron.training.loop", None)  # importing it would raise
    assert command.main([TINY, "training.steps=many"]) == 2
