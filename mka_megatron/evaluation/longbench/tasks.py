"""The 21 tasks of v1, 13 of them in E. Budgets, metrics and groups are those of github.com/THUDM/LongBench
(LongBench/config/dataset2maxlen.json, LongBench/eval.py, README)."""

from __future__ import annotations

from dataclasses import dataclass

from mka_megatron.evaluation.longbench import scoring

GROUPS = ("Single-Doc QA", "Multi-Doc QA", "Summarization", "Few-shot", "Synthetic", "Code")


@dataclass(frozen=True)
class Task:
    """How a task is asked and scored."""

    group: str
    metric: scoring.Metric
    new_tokens: int
    in_e: bool = False
    chinese: bool = False
    first_line: bool = False
    """Only the first line of what a model says counts."""


_SINGLE, _MULTI, _SUMMARY, _FEW, _SYNTHETIC, _CODE = GROUPS
TASKS = {
    "narrativeqa": Task(_SINGLE, scoring.qa_f1, 128),
    "qasper": Task(_SINGLE, scoring.qa_f1, 128, in_e=True),
    "multifieldqa_en": Task(_SINGLE, scoring.qa_f1, 64, in_e=True),
    "multifieldqa_zh": Task(_SINGLE, scoring.qa_f1_zh, 64, chinese=True),
    "hotpotqa": Task(_MULTI, scoring.qa_f1, 32, in_e=True),
    "2wikimqa": Task(_MULTI, scoring.qa_f1, 32, in_e=True),
    "musique": Task(_MULTI, scoring.qa_f1, 32),
    "dureader": Task(_MULTI, scoring.rouge_zh, 128, chinese=True),
    "gov_report": Task(_SUMMARY, scoring.rouge, 512, in_e=True),
    "qmsum": Task(_SUMMARY, scoring.rouge, 512),
    "multi_news": Task(_SUMMARY, scoring.rouge, 512, in_e=True),
    "vcsum": Task(_SUMMARY, scoring.rouge_zh, 512, chinese=True),
    "trec": Task(_FEW, scoring.classification, 64, in_e=True, first_line=True),
    "triviaqa": Task(_FEW, scoring.qa_f1, 32, in_e=True, first_line=True),
    "samsum": Task(_FEW, scoring.rouge, 128, in_e=True, first_line=True),
    "lsht": Task(_FEW, scoring.classification, 64, chinese=True, first_line=True),
    "passage_count": Task(_SYNTHETIC, scoring.count, 32, in_e=True),
    "passage_retrieval_en": Task(_SYNTHETIC, scoring.retrieval, 32, in_e=True),
    "passage_retrieval_zh": Task(_SYNTHETIC, scoring.retrieval_zh, 32, chinese=True),
    "lcc": Task(_CODE, scoring.code_similarity, 64, in_e=True),
    "repobench-p": Task(_CODE, scoring.code_similarity, 64, in_e=True),
}
"""By their official names."""
PAPER = {
    "QA": ("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique"),
    "Summarization": ("gov_report", "qmsum", "multi_news"),
    "Code": ("lcc", "repobench-p"),
}
"""The paper's columns, over the English tasks: it does not name them."""
PAPER_NEW_TOKENS = 128


def score(name: str, said: str, answers: tuple[str, ...], classes: tuple[str, ...]) -> float:
    """Of one answer, 0 to 100: the best over the references."""
    task = TASKS[name]
    if task.first_line:
        said = said.lstrip("\n").split("\n")[0]
    return 100 * max((task.metric(said, answer, classes) for answer in answers), default=0.0)
