"""LongBench: metrics on cases worked out by hand from the authors' formulae, files that are not to be trusted, and truncation."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from mka_megatron.data.batch import DataError
from mka_megatron.evaluation.longbench import data, scoring
from mka_megatron.evaluation.longbench.evaluation import middle_cut, multiple_choice
from mka_megatron.evaluation.longbench.prompts import PROMPTS
from mka_megatron.evaluation.longbench.tasks import GROUPS, TASKS, score
from tests.helpers.evaluated import Characters


def test_the_table_of_tasks() -> None:
    assert set(TASKS) == set(PROMPTS) and len(TASKS) == 21
    assert [sum(task.group == group for task in TASKS.values()) for group in GROUPS] == [4, 4, 4, 4, 3, 2]
    e = {name for name, task in TASKS.items() if task.in_e}
    assert len(e) == 13 and not any(TASKS[name].chinese for name in e)
    # dataset2maxlen.json
    assert {n: sorted(name for name, task in TASKS.items() if task.new_tokens == n) for n in (32, 64, 128, 512)} == {
        32: ["2wikimqa", "hotpotqa", "musique", "passage_count", "passage_retrieval_en", "passage_retrieval_zh", "triviaqa"],
        64: ["lcc", "lsht", "multifieldqa_en", "multifieldqa_zh", "repobench-p", "trec"],
        128: ["dureader", "narrativeqa", "qasper", "samsum"],
        512: ["gov_report", "multi_news", "qmsum", "vcsum"],
    }


@pytest.mark.parametrize(("said", "answer", "wanted"), [
    ("The cat, sat!", "a cat sat", 1.0),  # articles, cases and punctuation go
    ("cat sat on mat", "cat sat", 2 * (2 / 4) * (2 / 2) / (2 / 4 + 2 / 2)),
    ("cat cat cat", "cat", 0.5),  # one of three, once
    ("dog", "cat", 0.0),
    ("", "cat", 0.0),
])  # fmt: skip
def test_qa_f1(said: str, answer: str, wanted: float) -> None:
    assert scoring.qa_f1(said, answer) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(("said", "answer", "classes", "wanted"), [
    ("Type: location city", "location", ["location", "person"], 1.0),
    ("person or location", "location", ["location", "person"], 0.5),
    ("person", "location", ["location", "person"], 0.0),
    # "city" is part of the right class's name, and does not count
    ("Location city", "Location city", ["city", "Location city"], 1.0),
    # the original passes over the class after one that it drops: b stays, and halves the score
    ("a b ab", "ab", ["a", "b", "ab"], 0.5),
])  # fmt: skip
def test_classification(said: str, answer: str, classes: list[str], wanted: float) -> None:
    assert scoring.classification(said, answer, classes) == wanted


def test_numbers() -> None:
    assert scoring.retrieval("Paragraph 7, or 7 or 12", "Paragraph 7") == pytest.approx(2 / 3)
    assert scoring.retrieval("17", "Paragraph 7") == 0 and scoring.retrieval("none", "Paragraph 7") == 0
    assert scoring.retrieval_zh("段落3", "段落3") == 1
    assert scoring.count("There are 5 of 10", "5") == 0.5


def test_code_similarity() -> None:
    """2 * matches / length of both, in whole percent: `abcd` and `abxd` share ab and d."""
    assert scoring.code_similarity("abcd", "abxd") == 0.75
    assert scoring.code_similarity("\n# comment\n``\n// more\nx = 1\ny", "x = 1") == 1.0
    assert scoring.code_similarity("# nothing else", "x") == 0.0
    assert scoring.code_similarity("abc", "abd") == 0.67  # 66.7 rounded
    fuzz = pytest.importorskip("fuzzywuzzy.fuzz")
    for a, b in (("return self.x + 1", "return x + self.y"), ("a" * 300 + "b", "b" + "a" * 250), ("", "abc"), ("x", "X")):
        assert scoring.code_similarity(a, b) == fuzz.ratio(a, b) / 100


def test_rouge() -> None:
    """LCS of `the cat sat on the mat` and `the cat lay on a mat`: the cat on mat, 4 words. The package counts different
    words only, 5 of the first text and 6 of the second, so that precision is 4/5 and recall 4/6."""
    pytest.importorskip("rouge")
    wanted = 2 * (4 / 5) * (4 / 6) / (4 / 5 + 4 / 6)
    assert scoring.rouge("the cat sat on the mat", "the cat lay on a mat") == pytest.approx(wanted, abs=1e-7)
    assert scoring.rouge("", "the cat") == 0.0


def test_chinese() -> None:
    pytest.importorskip("jieba")
    assert scoring.qa_f1_zh("北京。", "北京") == 1.0
    assert scoring.qa_f1_zh("上海", "北京") == 0.0
    assert scoring.rouge_zh("我爱北京", "我爱北京") == pytest.approx(1.0, abs=1e-6)


def test_the_best_reference_counts_and_of_some_tasks_the_first_line_only() -> None:
    assert score("hotpotqa", "Paris\nLondon", ("London", "Paris France"), ()) == pytest.approx(100 * 2 / 3)
    assert score("triviaqa", "\nParis\nLondon", ("London", "Paris"), ()) == 100
    assert score("triviaqa", "Rome\nLondon", ("London",), ()) == 0


@pytest.mark.parametrize(("said", "letter"), [
    ("The correct answer is (B)", "B"), ("**The correct answer is C**", "C"), ("(A)", None), ("The correct answer is E", None),
])  # fmt: skip
def test_the_choice_of_v2(said: str, letter: str | None) -> None:
    assert scoring.choice(said) == letter


def test_the_middle_is_cut() -> None:
    ids, cut = middle_cut("abcdefghij", Characters(), 7)
    assert (Characters().decode(ids), cut) == ("abchij", True)
    assert middle_cut("abc", Characters(), 3) == ([97, 98, 99], False)


def line(**changed: object) -> bytes:
    record = {"input": "q {x}", "context": "c", "answers": ["a"], "length": 9, "all_classes": None, "_id": "1"}
    return json.dumps(record | changed).encode() + b"\n"


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_a_zip_is_read_in_place(tmp_path: Path) -> None:
    path = zipped(tmp_path / "data.zip", {"data/lcc.jsonl": line() + line(answers=["b", "c"]), "../evil.jsonl": b"x"})
    found = list(data.items(path, "lcc", e=False))
    assert [item.answers for item in found] == [("a",), ("b", "c")] and found[1].key == "lcc/2"
    # braces of the data are data
    assert PROMPTS["trec"].format(context=found[0].context, input=found[0].input).endswith("q {x}")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["data.zip"]


@pytest.mark.parametrize("wrong", [b"{", b"[]\n", line(answers="a"), line(length="9"), line(answers=[]), line(input=None)])
def test_a_wrong_line_is_named(tmp_path: Path, wrong: bytes) -> None:
    path = zipped(tmp_path / "data.zip", {"data/lcc.jsonl": line() + wrong})
    with pytest.raises(DataError, match=r"lcc\.jsonl:2 has not the fields"):
        list(data.items(path, "lcc", e=False))


def test_what_is_missing_or_broken_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"needs lcc_e\.jsonl, which is not in --data .*data\.zip"):
        data.check(tmp_path, ["lcc"], e=True)
    broken = tmp_path / "data.zip"
    broken.write_bytes(b"PK\x03\x04 no zip")
    with pytest.raises(DataError, match="no readable zip"):
        data.check(broken, ["lcc"], e=False)
    large = zipped(tmp_path / "large.zip", {"data/lcc.jsonl": line() * 100})
    monkeypatch.setattr(data, "_LARGEST", 500)
    with pytest.raises(DataError, match="says that it has more than"):
        data.check(large, ["lcc"], e=False)
    monkeypatch.setattr(data, "_LARGEST", 1 << 20)
    monkeypatch.setattr(data, "_LONGEST_LINE", 20)
    with pytest.raises(DataError, match=r"jsonl:1 has not"):
        list(data.items(large, "lcc", e=False))


def test_questions_of_v2(tmp_path: Path) -> None:
    record = {"_id": "x", "context": " doc ", "question": "Why?", "answer": "C", "difficulty": "easy", "length": "short",
              **{f"choice_{letter}": f"{letter}!" for letter in "ABCD"}}  # fmt: skip
    path = tmp_path / "data.json"
    path.write_text(json.dumps([record]))
    [question] = data.choices(path)
    prompt = multiple_choice(question)
    assert "<text>\ndoc\n</text>" in prompt and "question: Why?\nChoices:\n(A) A!\n(B) B!" in prompt
    path.write_text(json.dumps([record | {"answer": "E"}]))
    with pytest.raises(DataError, match="question 1"):
        list(data.choices(path))
