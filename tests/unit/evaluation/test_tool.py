"""tools/evaluate.py in this process, on a tiny model of transformers: every command, resumed, and its refusals."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from pathlib import Path

import pytest

from mka_megatron.evaluation.ruler import sources
from mka_megatron.hf.language_model import HFModel
from tests.helpers.evaluated import tiny_directory
from tests.helpers.tokenizers import words
from tests.unit.evaluation.test_longbench import line, zipped

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_directory(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], directory: str):
    monkeypatch.syspath_prepend(str(ROOT))
    spec = importlib.util.spec_from_file_location("evaluate_tool", ROOT / "tools" / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments: object, model: bool = True) -> tuple[int, str, str]:
        command = ["evaluate.py", *map(str, arguments), *(["--hf", directory] if model else [])]
        monkeypatch.setattr(sys, "argv", command)
        code = module.main()
        out, err = capsys.readouterr()
        return code, out, err

    return run


def figures(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def test_passkey_and_what_it_writes(tool, tmp_path: Path) -> None:
    code, out, _ = tool("passkey", "--out", tmp_path, "--lengths", "192,256", "--depths", "0,1", "--trials", 2, "--batch", 4)
    assert code == 0 and "| depth | 192 | 256 |" in out
    found = figures(tmp_path)
    assert len(found["by_depth_and_length"]) == 2 and found["settings"]["model"]["back_end"] == "transformers"
    rows = list(csv.reader((tmp_path / "results.csv").open()))
    assert rows[0] == ["depth", "192", "256"] and [row[0] for row in rows[1:]] == ["0%", "100%", "all"]
    assert (tmp_path / "results.md").read_text().strip() == out.strip()
    pytest.importorskip("matplotlib")
    assert (tmp_path / "passkey.png").read_bytes().startswith(b"\x89PNG")


def test_the_papers_passkey_asks_for_one_token(tool, tmp_path: Path) -> None:
    code, _, _ = tool("passkey", "--out", tmp_path, "--lengths", 192, "--depths", "0.5", "--trials", 1, "--protocol", "paper")
    assert code == 0 and figures(tmp_path)["settings"]["max_new_tokens"] == 1


def test_a_resumed_ruler_asks_only_what_is_left(tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    greedy = HFModel.greedy

    def failing(self, prompts, *args, **kwargs):
        asked.append(len(prompts))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return greedy(self, prompts, *args, **kwargs)

    monkeypatch.setattr(HFModel, "greedy", failing)
    monkeypatch.setattr(sources, "find_spec", lambda name: None)  # wonderwords' pairs are millions
    command = ("ruler", "--lengths", 512, "--tasks", "fwe,niah_single_1", "--samples", 2)
    with pytest.raises(KeyboardInterrupt):
        tool(*command, "--out", tmp_path / "a")
    code, out, _ = tool(*command, "--out", tmp_path / "a")
    assert code == 0 and asked == [1, 1, 1, 1, 1]
    assert "| niah_single_1 |" in out and "| mean of 2 tasks |" in out
    code, _, _ = tool(*command, "--out", tmp_path / "b", "--batch", 2)
    assert asked[5:] == [2, 2]
    one, other = (sorted((tmp_path / x / "examples.jsonl").read_text().splitlines()) for x in "ab")
    assert one == other
    code, _, _ = tool(*command, "--out", tmp_path / "a")  # nothing left
    assert code == 0 and asked[7:] == []


def test_longbench(tool, tmp_path: Path) -> None:
    pytest.importorskip("rouge")
    path = zipped(tmp_path / "data.zip", {
        f"data/{name}.jsonl": line(context="some words " * 900, length=100) + line(length=5000)
        for name in ("lcc", "lcc_e", "samsum", "samsum_e")
    })  # fmt: skip
    code, out, _ = tool("longbench", "--out", tmp_path / "v1", "--data", path, "--tasks", "lcc,samsum", "--max-length", 600)
    assert code == 0 and "| Few-shot |" in out
    records = [json.loads(each) for each in (tmp_path / "v1" / "examples.jsonl").read_text().splitlines()]
    assert [record["cut"] for record in records] == [True, False] * 2 and max(record["tokens"] for record in records) <= 600
    code, out, _ = tool("longbench", "--out", tmp_path / "e", "--data", path, "--tasks", "samsum", "--e", "--limit", 2)
    assert code == 0 and "| task | lines | score | 0-4k | 4-8k | 8k+ |" in out


def test_the_papers_longbench(tool, tmp_path: Path) -> None:
    pytest.importorskip("rouge")
    names = ("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "gov_report", "qmsum", "multi_news",
             "lcc", "repobench-p")  # fmt: skip
    path = zipped(tmp_path / "data.zip", {f"data/{name}.jsonl": line() for name in names})
    code, out, _ = tool("longbench", "--out", tmp_path / "p", "--data", path, "--protocol", "paper")
    assert code == 0 and "| model | QA | Summarization | Code | Avg |" in out
    assert figures(tmp_path / "p")["settings"]["new_tokens"] == 128


def test_longbench_v2(tool, tmp_path: Path) -> None:
    record = {"_id": "x", "context": "doc", "question": "Why?", "answer": "C", "difficulty": "easy", "length": "short",
              **{f"choice_{letter}": letter for letter in "ABCD"}}  # fmt: skip
    (tmp_path / "data.json").write_text(json.dumps([record]))
    code, _, _ = tool("longbench", "--out", tmp_path / "v2", "--data", tmp_path / "data.json", "--v2")
    assert code == 0 and figures(tmp_path / "v2")["questions"] == 1


@pytest.mark.parametrize(("arguments", "sentence"), [
    (("ruler", "--tasks", "niah"), "--tasks has niah"),
    (("ruler", "--tasks", "qa_2"), "qa_2 needs hotpotqa.json"),
    (("ruler", "--lengths", "4096", "--tasks", "fwe"), "--lengths needs 4095 positions"),
    (("ruler", "--lengths", "420", "--tasks", "niah_single_1,vt", "--samples", "1"), "nothing of RULER's vt fits"),
    (("ruler", "--official", "nowhere"), "--official nowhere is no folder"),
    (("passkey", "--depths", "2"), "--depths is [2.0]"),
    (("passkey", "--lengths", "64"), "leaves no room"),
    (("passkey", "--batch", "0"), "--batch is 0"),
    (("passkey", "--recalled", "4"), "--recalled is 4"),
    (("passkey", "attention.variant=gqa"), "add --patch"),
    (("passkey", "attention.variant=gqa", "--seed", "1", "attention.core=dense", "--patch", "model.x=1"), "model.x"),
    (("longbench", "--data", "nowhere.zip"), "needs narrativeqa.jsonl, which is not in --data nowhere.zip"),
    (("longbench", "--data", "nowhere", "--v2"), "LongBench v2 needs data.json"),
])  # fmt: skip
def test_refusals_are_one_sentence(tool, tmp_path: Path, arguments: tuple[str, ...], sentence: str) -> None:
    code, out, err = tool(arguments[0], "--out", tmp_path / "out", *arguments[1:])
    assert code == 2 and not out and sentence in err and "Traceback" not in err
    assert not any(path.read_text() for path in tmp_path.rglob("examples.jsonl"))


def test_what_a_tokenizer_puts_before_a_text(tmp_path: Path, directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from tools.evaluated_model import beginning

    assert beginning(directory) == []
    assert beginning(words(tmp_path, ["<s>", "a", "<eos>"])) == [0]
