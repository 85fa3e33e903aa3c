"""Ask a model RULER's samples and tabulate the scores by task and length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from mka_megatron.config.errors import ConfigError
from mka_megatron.data.tokenizer import Tokenizer
from mka_megatron.evaluation.language_model import LanguageModel
from mka_megatron.evaluation.results import Record, Results, run
from mka_megatron.evaluation.ruler.dataset import Sample
from mka_megatron.evaluation.ruler.scoring import cleaned, score
from mka_megatron.evaluation.ruler.tasks import TASKS
from mka_megatron.evaluation.tables import Cell, HeatMap, Report, percent

_DEPTHS = 5
"""Rows of the needle's heat map."""


def evaluate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    samples: Iterable[Sample],
    results: Results,
    *,
    batch: int,
    progress: Callable[[int], None] | None = None,
) -> None:
    """A record per sample: what the model said, the score, and how deep the (first) answer lies in the prompt.

    Raises ConfigError where a prompt with its budget is longer than the sample's length, as with another tokenizer's samples.
    """

    def finish(group: Sequence[Sample]) -> Iterator[Record]:
        new_tokens = TASKS[group[0].task].new_tokens
        prompts = tokenizer.encode([sample.prompt for sample in group])
        for sample, ids in zip(group, prompts, strict=True):
            if len(ids) + new_tokens > sample.length:
                raise ConfigError(f"{sample.key} has {len(ids)} tokens and {new_tokens} to generate, more than its length with "
                                  "this tokenizer: make RULER's samples with the model's own.")
        said = [tokenizer.decode(new) for new in model.greedy(prompts, new_tokens, stop=(tokenizer.eos_id,))]
        for sample, text in zip(group, said, strict=True):
            at = sample.prompt.find(sample.outputs[0])
            yield {
                "key": sample.key, "task": sample.task, "length": sample.length, "tokens": sample.tokens,
                "outputs": list(sample.outputs), "said": text, "null": not cleaned(text),
                "replaced": list(sample.replaced), "depth": at / len(sample.prompt) if at >= 0 else None, "score": score(TASKS[sample.task], text, sample.outputs),
            }  # fmt: skip

    run(results, samples, batch, finish, progress)


def report(results: Results, name: str, tasks: Sequence[str], lengths: Sequence[int]) -> Report:
    """Mean scores by task and length, and their mean over the tasks; RULER-style where official material was replaced."""
    replaced = sorted({clause for record in results.records.values() for clause in record["replaced"]})
    title = "RULER-style" if replaced else "RULER v1"
    notes = [f"Not RULER's own samples: {'; '.join(replaced)}."] if replaced else []
    cells: dict[tuple[str, int], list[float]] = {}
    deep: dict[tuple[int, int], list[float]] = {}
    for record in results.records.values():
        cells.setdefault((record["task"], record["length"]), []).append(record["score"])
        if record["task"].startswith("niah_single") and record["depth"] is not None:
            row = min(_DEPTHS - 1, int(record["depth"] * _DEPTHS))
            deep.setdefault((row, record["length"]), []).append(record["score"])
    grid = [[_mean(cells.get((task, length))) for length in lengths] for task in tasks]
    means = [_mean([line[i] for line in grid if line[i] is not None]) for i in range(len(lengths))]
    rows: list[list[Cell]] = [[task, *map(percent, line)] for task, line in zip(tasks, grid, strict=True)]
    rows.append([f"mean of {len(tasks)} tasks", *map(percent, means)])
    figures = {
        "model": name, "settings": results.settings, "title": title, "replaced": replaced, "lengths": list(lengths),
        "tasks": dict(zip(tasks, grid, strict=True)), "mean": means,
        "nulls": sum(record["null"] for record in results.records.values()), "samples": len(results.records),
    }  # fmt: skip
    labels = [f"{length:,}" for length in lengths]
    maps = [HeatMap("ruler", f"{title}, {name}", "tokens", "task", labels, list(tasks), grid)]
    if deep:
        shares = [f"{100 * i // _DEPTHS} to {100 * (i + 1) // _DEPTHS}%" for i in range(_DEPTHS)]
        depth_grid = [[_mean(deep.get((row, length))) for length in lengths] for row in range(_DEPTHS)]
        figures["niah_single_by_depth"] = depth_grid
        maps.append(HeatMap("niah", f"Single needle, {name}", "tokens", "depth of the needle", labels, shares, depth_grid))
    return Report(f"{title}, {name}, %", ("task", *labels), rows, figures, maps, notes)


def _mean(scores: Sequence[float | None] | None) -> float | None:
    known = [score for score in scores or () if score is not None]
    return sum(known) / len(known) if known else None
