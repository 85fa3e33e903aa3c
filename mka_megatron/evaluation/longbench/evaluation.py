"""Ask a model LongBench's questions and tabulate the scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from mka_megatron.data.tokenizer import Tokenizer
from mka_megatron.evaluation.language_model import LanguageModel
from mka_megatron.evaluation.longbench import tasks
from mka_megatron.evaluation.longbench.data import Choice, Item
from mka_megatron.evaluation.longbench.prompts import MULTIPLE_CHOICE, PROMPTS
from mka_megatron.evaluation.longbench.scoring import choice
from mka_megatron.evaluation.results import Record, Results, run
from mka_megatron.evaluation.tables import Cell, Report, percent

BUCKETS = (("0-4k", 0, 4000), ("4-8k", 4000, 8000), ("8k+", 8000, None))
"""Of E: name, from, to, in the words that a line's `length` counts."""
CHOICE_NEW_TOKENS = 128
_VIEWS = (("difficulty", ("easy", "hard")), ("length", ("short", "medium", "long")))


def middle_cut(prompt: str, tokenizer: Tokenizer, most: int) -> tuple[list[int], bool]:
    """The tokens of a prompt, at most `most`: where they are more, those in the middle are left out; and whether they were.

    As the authors do it, the two halves are text again before they are tokens.
    """
    [ids] = tokenizer.encode([prompt])
    if len(ids) <= most:
        return ids, False
    half = most // 2
    [ids] = tokenizer.encode([tokenizer.decode(ids[:half]) + tokenizer.decode(ids[-half:])])
    # the seam may have become more tokens
    return (ids if len(ids) <= most else ids[:half] + ids[-half:]), True


def evaluate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    items: Iterable[Item],
    results: Results,
    *,
    most: int,
    new_tokens: int | None,
    batch: int,
    progress: Callable[[int], None] | None = None,
) -> None:
    """A record per line of one task of v1.

    Args:
        most: tokens of a prompt.
        new_tokens: instead of the task's own number.
    """
    ends = (tokenizer.eos_id,)
    # so that a model does not go on with the next dialogue
    line_end = tokenizer.encode(["\n"])[0][-1:]

    def finish(group: Sequence[Item]) -> Iterator[Record]:
        task = group[0].task
        texts = [PROMPTS[task].format(context=item.context, input=item.input) for item in group]
        prompts = [middle_cut(text, tokenizer, most) for text in texts]
        stop, least = ((*ends, *line_end), 1) if task == "samsum" else (ends, 0)
        wanted = tasks.TASKS[task].new_tokens if new_tokens is None else new_tokens
        made = model.greedy([ids for ids, _ in prompts], wanted, stop=stop, at_least=least)
        for item, (ids, cut), new in zip(group, prompts, made, strict=True):
            said = tokenizer.decode(new)
            yield {
                "key": item.key, "task": task, "length": item.length, "tokens": len(ids), "cut": cut, "said": said,
                "answers": list(item.answers), "score": tasks.score(task, said, item.answers, item.classes),
            }  # fmt: skip

    run(results, items, batch, finish, progress)


def evaluate_choices(
    model: LanguageModel,
    tokenizer: Tokenizer,
    questions: Iterable[Choice],
    results: Results,
    *,
    most: int,
    batch: int,
    progress: Callable[[int], None] | None = None,
) -> None:
    """A record per question of v2."""

    def finish(group: Sequence[Choice]) -> Iterator[Record]:
        prompts = [middle_cut(multiple_choice(question), tokenizer, most) for question in group]
        made = model.greedy([ids for ids, _ in prompts], CHOICE_NEW_TOKENS, stop=(tokenizer.eos_id,))
        for question, (ids, cut), new in zip(group, prompts, made, strict=True):
            said = tokenizer.decode(new)
            yield {
                "key": question.key, "difficulty": question.difficulty, "length": question.length, "tokens": len(ids),
                "cut": cut, "said": said, "choice": choice(said.strip()), "answer": question.answer,
                "score": 100.0 * (choice(said.strip()) == question.answer),
            }  # fmt: skip

    run(results, questions, batch, finish, progress)


def multiple_choice(question: Choice) -> str:
    """The prompt of v2."""
    prompt = MULTIPLE_CHOICE.replace("$DOC$", question.context.strip()).replace("$Q$", question.question.strip())
    for letter, text in zip("ABCD", question.choices, strict=True):
        prompt = prompt.replace(f"$C_{letter}$", text.strip())
    return prompt


def report(results: Results, name: str, names: Sequence[str], e: bool) -> Report:
    """Scores by task (and for E by length), and their means by group."""
    scores = {task: _scores(results, lambda r, task=task: r["task"] == task) for task in names}  # type: ignore[misc]
    figures: Record = {"model": name, "settings": results.settings, "lines": len(results.records),
                       "cut": sum(r["cut"] for r in results.records.values())}  # fmt: skip
    columns: list[str] = ["task", "lines", "score", *(bucket for bucket, _, _ in BUCKETS if e)]
    rows: list[list[Cell]] = []
    figures["tasks"] = {}
    for task in names:
        parts = [_mean(_scores(results, _in_bucket(task, low, high))) for _, low, high in BUCKETS] if e else []
        figures["tasks"][task] = {"score": _mean(scores[task]), **dict(zip((b for b, _, _ in BUCKETS), parts, strict=False))}
        line: list[Cell] = [task, len(scores[task]), percent(_mean(scores[task])), *map(percent, parts)]
        rows.append(line)
    groups = {group: [task for task in names if tasks.TASKS[task].group == group] for group in tasks.GROUPS}
    figures["groups"] = _means(figures["tasks"], groups)
    blank: list[Cell] = [None] * (len(columns) - 3)
    rows += [[group, None, percent(value), *blank] for group, value in figures["groups"].items()]
    figures["mean"] = _mean([each["score"] for each in figures["tasks"].values()])
    rows.append([f"mean of {len(names)} tasks", None, percent(figures["mean"]), *blank])
    title = f"LongBench{'-E' if e else ''}, {name}"
    return Report(title, columns, rows, figures)


def paper_report(results: Results, name: str) -> Report:
    """QA, Summarization, Code and their mean."""
    scores: Record = {
        task: {"score": _mean(_scores(results, lambda r, task=task: r["task"] == task))}  # type: ignore[misc]
        for names in tasks.PAPER.values() for task in names
    }  # fmt: skip
    groups = _means(scores, {group: list(names) for group, names in tasks.PAPER.items()})
    mean = _mean(list(groups.values()))
    figures = {"model": name, "settings": results.settings, "tasks": scores, "groups": groups, "mean": mean}
    note = (f"{tasks.PAPER_NEW_TOKENS} new tokens for every task; English tasks only (the paper does not name its tasks): "
            + "; ".join(f"{group}: {', '.join(names)}" for group, names in tasks.PAPER.items()) + ".")  # fmt: skip
    row: list[Cell] = [name, *map(percent, groups.values()), percent(mean)]
    return Report("LongBench, the paper's protocol", ("model", *tasks.PAPER, "Avg"), [row], figures, notes=(note,))


def choices_report(results: Results, name: str) -> Report:
    """Accuracy of v2, overall and by difficulty and length."""
    figures: Record = {"model": name, "settings": results.settings, "questions": len(results.records),
                       "overall": _mean(_scores(results, lambda r: True)),
                       "unanswered": sum(r["choice"] is None for r in results.records.values())}  # fmt: skip
    for field, values in _VIEWS:
        for value in values:
            chosen = _scores(results, lambda r, field=field, value=value: r[field] == value)  # type: ignore[misc]
            figures[value] = _mean(chosen)
    names = ("overall", *(value for _, values in _VIEWS for value in values))
    return Report(f"LongBench v2, {name}, % right", ("model", *names), [[name, *(percent(figures[n]) for n in names)]], figures)


def _in_bucket(task: str, low: int, high: int | None) -> Callable[[Record], bool]:
    return lambda record: record["task"] == task and low <= record["length"] and (high is None or record["length"] < high)


def _scores(results: Results, wanted: Callable[[Record], bool]) -> list[float]:
    return [record["score"] for record in results.records.values() if wanted(record)]


def _means(scores: Record, groups: dict[str, list[str]]) -> dict[str, float | None]:
    found = {group: _mean([scores[task]["score"] for task in names]) for group, names in groups.items() if names}
    return {group: value for group, value in found.items() if value is not None}


def _mean(scores: Sequence[float | None]) -> float | None:
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if known else None
