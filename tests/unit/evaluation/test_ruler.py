"""RULER: samples equal to those that the authors' scripts make, and their metrics by hand.

ruler_golden.json has what scripts/data/synthetic/*.py of github.com/NVIDIA/RULER (at c3f5e3b) wrote for three samples of 1,024
tokens of each task, seed 42: the prompts' SHA-256, outputs and lengths. They ran on tests.helpers.evaluated's files, with words
separated by blanks for tokens, our short word lists in wonderwords' place, and our cuts between sentences in nltk's.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from mka_megatron.config.errors import ConfigError
from mka_megatron.data.batch import DataError
from mka_megatron.evaluation.results import Results
from mka_megatron.evaluation.ruler import dataset, evaluation, official, scoring, sources
from mka_megatron.evaluation.ruler.tasks import TASKS
from tests.helpers.evaluated import Characters, Counting, write_ruler_files

GOLDEN = json.loads((Path(__file__).parent / "ruler_golden.json").read_text())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ruler_files(tmp_path_factory.mktemp("ruler"))


@pytest.fixture(autouse=True)
def short_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "find_spec", lambda name: None)


def words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize("name", TASKS)
def test_samples_are_the_authors(files: Path, name: str) -> None:
    found = list(dataset.samples(name, 1024, 3, words, files, 42))
    assert [[hashlib.sha256(each.prompt.encode()).hexdigest(), list(each.outputs), each.tokens] for each in found] == GOLDEN[name]


@pytest.mark.parametrize("name", TASKS)
def test_samples_fit_hold_their_answers_and_differ(files: Path, name: str) -> None:
    found = list(dataset.samples(name, 2000, 3, words, files, 1))
    assert len({each.prompt for each in found}) == 3 and [each.index for each in found] == [0, 1, 2]
    for each in found:
        assert words(each.prompt) + TASKS[name].new_tokens == each.tokens <= 2000
        assert each.tokens > 0.85 * 2000 or name.startswith("qa")  # the stand-ins have few documents
        if not name.startswith("qa"):
            assert all(output in each.prompt for output in each.outputs)


def test_what_was_replaced_is_said(files: Path) -> None:
    [made] = dataset.samples("niah_single_2", 1024, 1, words, None, 42)
    assert "The grass is green." in made.prompt
    assert any("PaulGrahamEssays.json" in clause for clause in made.replaced)
    [with_files] = dataset.samples("niah_single_2", 1024, 1, words, files, 42)
    assert "The grass is green." not in with_files.prompt
    assert with_files.replaced == ("a short list of words for want of the package wonderwords",)


def test_missing_files_and_too_short_lengths_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"qa_1 needs squad\.json, which is not here: put it into"):
        list(dataset.samples("qa_1", 1024, 1, words, tmp_path, 42))
    for name in ("niah_single_1", "cwe", "fwe"):
        with pytest.raises(ConfigError, match="nothing of RULER's"):
            list(dataset.samples(name, 150, 1, words, None, 42))
    with pytest.raises(ConfigError, match="--tasks has vt: its worked example has to fit into 500 tokens"):
        list(dataset.samples("vt", 4096, 1, len, None, 42))  # a token a character
    (tmp_path / "hotpotqa.json").write_text('[{"question": 1}]')
    with pytest.raises(DataError, match="has not the fields"):
        list(dataset.samples("qa_2", 1024, 1, words, tmp_path, 42))


def test_metrics_by_hand() -> None:
    assert scoring.string_match_all("the 123 and ABC", ["123", "abc", "zz"]) == pytest.approx(200 / 3)
    assert scoring.string_match_part("the answer is Paris", ["London", "paris"]) == 100
    assert scoring.string_match_part("Rome", ["London", "paris"]) == 0
    assert scoring.cleaned(" a\x00b\x1f ") == "a\nb"
    assert scoring.score(TASKS["qa_1"], "one", ["one", "two"]) == 100
    assert scoring.score(TASKS["vt"], "one", ["one", "two"]) == 50


def test_official_files_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "4096" / "data" / "vt"
    folder.mkdir(parents=True)
    record = {"index": 3, "input": "What?", "outputs": ["A", "B"], "length": 40, "answer_prefix": " It is"}
    (folder / "validation.jsonl").write_text(json.dumps(record) + "\n" + json.dumps({**record, "outputs": "A"}) + "\n")
    [sample] = official.read(tmp_path, "vt", 4096, 1)
    assert (sample.prompt, sample.outputs, sample.key) == ("What? It is", ("A", "B"), "vt/4096/3")
    with pytest.raises(DataError, match=r"validation\.jsonl:2 is no RULER sample"):
        list(official.read(tmp_path, "vt", 4096, 5))
    with pytest.raises(DataError, match="no 4096/data/cwe/validation"):
        list(official.read(tmp_path, "cwe", 4096, 5))


def test_scores_by_task_and_length(tmp_path: Path) -> None:
    """`Counting` says the characters after the prompt's last: after `@`, A and all that follow it."""
    samples = [dataset.Sample("vt", n, i, "what @", out, n) for n in (64, 128) for i, out in enumerate([("ABC",), ("ABC", "xxx")])]
    results, model = Results(tmp_path, {}), Counting(8)
    evaluation.evaluate(model, Characters(), samples, results, batch=2)
    report = evaluation.report(results, "counting", ["vt"], [64, 128])
    assert report.figures["tasks"] == {"vt": [75.0, 75.0]} and report.figures["mean"] == [75.0, 75.0]
    assert len(model.rows) == 4 and report.title.startswith("RULER v1")
    with pytest.raises(ConfigError, match="more than its length"):
        evaluation.evaluate(model, Characters(), [dataset.Sample("vt", 32, 0, "what @", ("A",), 1)], results, batch=1)
