"""The command lines: what they ask for, and what they refuse in one sentence."""

from __future__ import annotations

import json

import pytest

from mka_megatron.config.errors import ConfigError
from mka_megatron.training.deepspeed_config import requested_stage
from tools import ablate, benchmark


def parsed(*arguments: str) -> dict:
    return benchmark.options_of(benchmark.parser().parse_args(list(arguments)))


def test_runs_are_listed(capsys) -> None:
    assert benchmark.main(["--dry-run", "--attention_type", "gqa,fmka", "--seq_length", "512,1024", "--seeds", "0,1"]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert lines[:2] == [["gqa", "seed 0", "length 512"], ["fastmka", "seed 0", "length 512"]]
    assert len(lines) == 8
    assert benchmark.main(["--dry-run"]) == 0
    assert [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()] == list(benchmark.ALL)


def test_flags_become_options(tmp_path) -> None:
    assert parsed()["precision"] is None and parsed()["zero_stage"] is None
    assert parsed("--bf16")["precision"] == "bf16" and parsed("--fp16")["precision"] == "fp16"
    assert parsed("--deepspeed", "--local_rank=1")["zero_stage"] == 1
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    found = parsed("--deepspeed", "--deepspeed_config", str(file), "--batch_size", "8", "--num_groups", "1", "a.b=c")
    assert (found["zero_stage"], found["deepspeed_config"]) == (2, str(file))
    assert (found["batch_size"], found["num_groups"], found["overrides"]) == (8, 1, ["a.b=c"])
    file.write_text("{}")
    assert parsed("--deepspeed", "--deepspeed_config", str(file))["zero_stage"] == 1
    file.write_text(json.dumps({"zero_optimization": {"stage": 4}}))
    with pytest.raises(ConfigError, match=r"zero_optimization\.stage to 4"):
        requested_stage(str(file))


@pytest.mark.parametrize("arguments", [["--attention_type", "gqa,mba"], ["--deepspeed_config", "nowhere.json"]])
def test_refused_with_a_sentence(arguments, capsys) -> None:
    assert benchmark.main(["--dry-run", *arguments]) == 2
    told = capsys.readouterr().err.strip()
    assert arguments[1].rpartition(",")[2] in told and "\n" not in told


def test_studies_are_listed_and_unknown_ones_refused(capsys) -> None:
    assert ablate.main(["--list"]) == 0
    assert "tiers (fastmka): L1; L1+L2; L1+L3; L1+L2+L3" in capsys.readouterr().out
    assert ablate.main(["--study", "tears"]) == 2
    assert "tears" in capsys.readouterr().err
