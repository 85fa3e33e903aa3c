"""The commands of tools/evaluate.py: from its arguments to what mka_megatron.evaluation does, and its report."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from mka_megatron.config.errors import ConfigError
from mka_megatron.data.batch import DataError
from mka_megatron.evaluation import passkey, perplexity
from mka_megatron.evaluation.longbench import data as longbench_data
from mka_megatron.evaluation.longbench import evaluation as longbench
from mka_megatron.evaluation.longbench import tasks as longbench_tasks
from mka_megatron.evaluation.results import Record, Results
from mka_megatron.evaluation.ruler import dataset, official
from mka_megatron.evaluation.ruler import evaluation as ruler
from mka_megatron.evaluation.ruler import tasks as ruler_tasks
from mka_megatron.evaluation.tables import Report
from tools.evaluated_model import Evaluated

VALID_FRACTION = 0.02
"""Of the embedded corpus: what training holds out by default."""
PAPER_RECALLED = 8


def check(arguments: argparse.Namespace) -> None:
    """Before the model is loaded."""
    for name in ("batch", "trials", "samples", "limit", "max_new_tokens", "max_length"):
        value = getattr(arguments, name, None)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; give at least 1.")


def check_passkey(arguments: argparse.Namespace) -> None:
    check(arguments)
    if not all(0 <= depth <= 1 for depth in arguments.depths):
        raise ConfigError(f"--depths is {arguments.depths}; give shares from 0 (first) to 1 (last).")
    if arguments.protocol == "paper":
        arguments.max_new_tokens, arguments.recalled_by_protocol = 1, PAPER_RECALLED


def check_ruler(arguments: argparse.Namespace) -> None:
    check(arguments)
    known = {"all": tuple(ruler_tasks.TASKS), "generated": ruler_tasks.GENERATED}
    arguments.tasks = _chosen(arguments.tasks, known, ruler_tasks.TASKS)
    for option in ("data", "official"):
        folder = getattr(arguments, option)
        if folder is not None and not folder.is_dir():
            raise DataError(f"--{option} {folder} is no folder: name the one with RULER's files.")
    for name in arguments.tasks:
        task = ruler_tasks.TASKS[name]
        if isinstance(task, ruler_tasks.Questions) and arguments.official is None:
            dataset.Sources(arguments.data).questions(task.file)


def check_longbench(arguments: argparse.Namespace) -> None:
    check(arguments)
    if arguments.v2:
        return
    every = {name: task for name, task in longbench_tasks.TASKS.items() if task.in_e or not arguments.e}
    if arguments.protocol == "paper":
        if arguments.tasks != ["all"]:
            raise ConfigError("--tasks goes not with --protocol paper, which names its own; leave it out.")
        arguments.tasks = [name for names in longbench_tasks.PAPER.values() for name in names]
    else:
        arguments.tasks = _chosen(arguments.tasks, {"all": tuple(every)}, every)
    longbench_data.check(arguments.data, arguments.tasks, arguments.e)
    for name in arguments.tasks:  # a missing package shows now
        longbench_tasks.score(name, "x", ("Paragraph 1 段落1",), ())


def perplexity_of(arguments: argparse.Namespace, evaluated: Evaluated, rank: int) -> Report:
    from mka_megatron.evaluation import documents  # with Megatron's data sets, which nothing else here needs

    positions = evaluated.model.positions
    length = positions if arguments.length is None else arguments.length
    stride = length if arguments.stride is None else arguments.stride
    if not 1 <= length <= positions:
        raise ConfigError(f"--length is {length}: the model has {positions} positions; give 1 to as many.")
    if not 1 <= stride <= length:
        raise ConfigError(f"--stride is {stride}: give 1 to --length ({length}).")
    fingerprint, texts = documents.documents(arguments.text, arguments.text_key, VALID_FRACTION)
    results = _results(arguments, evaluated, rank, length=length, stride=stride, min_tokens=arguments.min_tokens,
                       text=arguments.text or documents.EMBEDDED, text_key=arguments.text_key, content=fingerprint)  # fmt: skip
    perplexity.evaluate(
        evaluated.model, evaluated.tokenizer, texts, results, length=length, stride=stride, batch=arguments.batch,
        min_tokens=arguments.min_tokens, progress=_progress("document", None, rank),
    )  # fmt: skip
    return perplexity.report(results, evaluated.name)


def passkey_of(arguments: argparse.Namespace, evaluated: Evaluated, rank: int) -> Report:
    lengths, depths, trials, new = arguments.lengths, arguments.depths, arguments.trials, arguments.max_new_tokens
    _fits(evaluated, max(lengths) + new - 1, "--lengths")
    settings = {"lengths": lengths, "depths": depths, "trials": trials, "max_new_tokens": new}
    results = _results(arguments, evaluated, rank, **settings)
    passkey.evaluate(
        evaluated.model, evaluated.tokenizer, results, lengths=lengths, depths=depths, trials=trials, max_new_tokens=new,
        seed=arguments.seed, batch=arguments.batch, progress=_progress("trial", len(lengths) * len(depths) * trials, rank),
    )  # fmt: skip
    return passkey.report(results, evaluated.name, lengths, depths)


def ruler_of(arguments: argparse.Namespace, evaluated: Evaluated, rank: int) -> Report:
    names, lengths, count = arguments.tasks, arguments.lengths, arguments.samples
    _fits(evaluated, max(lengths) - 1, "--lengths")
    folder = arguments.official or arguments.data
    settings = {"tasks": names, "lengths": lengths, "samples": count, "official": arguments.official is not None,
                "data": None if folder is None else str(folder)}  # fmt: skip
    results = _results(arguments, evaluated, rank, **settings)
    progress = _progress("sample", len(names) * len(lengths) * count, rank)

    def tokens(text: str) -> int:
        return len(evaluated.tokenizer.encode([text])[0])

    if arguments.official is None:
        for name in names:  # a task that does not fit is refused before any is asked
            next(dataset.samples(name, min(lengths), 1, tokens, arguments.data, arguments.seed))
    for name in names:
        for length in lengths:
            if all(f"{name}/{length}/{index}" in results.records for index in range(count)):
                (progress or _ignored)(count)  # made and asked by an earlier run
                continue
            if arguments.official is not None:
                samples = official.read(arguments.official, name, length, count)
            else:
                samples = dataset.samples(name, length, count, tokens, arguments.data, arguments.seed)
            ruler.evaluate(evaluated.model, evaluated.tokenizer, samples, results, batch=arguments.batch, progress=progress)
    return ruler.report(results, evaluated.name, names, lengths)


def longbench_of(arguments: argparse.Namespace, evaluated: Evaluated, rank: int) -> Report:
    paper = arguments.protocol == "paper"
    new = longbench_tasks.PAPER_NEW_TOKENS if paper else None
    settings = {
        "tasks": None if arguments.v2 else arguments.tasks, "edition": "v2" if arguments.v2 else "E" if arguments.e else "v1",
        "data": str(arguments.data), "content": _stat(arguments.data), "limit": arguments.limit,
        "max_length": arguments.max_length, "new_tokens": new,
    }  # fmt: skip
    results = _results(arguments, evaluated, rank, **settings)
    model, tokenizer, batch = evaluated.model, evaluated.tokenizer, arguments.batch
    if arguments.v2:
        questions = islice(longbench_data.choices(arguments.data), arguments.limit)
        most = _room(arguments, evaluated, longbench.CHOICE_NEW_TOKENS)
        progress = _progress("question", arguments.limit, rank)
        longbench.evaluate_choices(model, tokenizer, questions, results, most=most, batch=batch, progress=progress)
        return longbench.choices_report(results, evaluated.name)
    progress = _progress("line", None, rank)
    for name in arguments.tasks:
        most = _room(arguments, evaluated, new or longbench_tasks.TASKS[name].new_tokens)
        lines = islice(longbench_data.items(arguments.data, name, arguments.e), arguments.limit)
        longbench.evaluate(
            model, tokenizer, lines, results, most=most, new_tokens=new, batch=batch, progress=progress
        )
    if paper:
        return longbench.paper_report(results, evaluated.name)
    return longbench.report(results, evaluated.name, arguments.tasks, arguments.e)


def _chosen(names: list[str], sets: dict[str, tuple[str, ...]], known: dict[str, Any]) -> list[str]:
    """In the benchmark's order."""
    wanted = {name for each in names for name in sets.get(each, (each,))}
    unknown = sorted(wanted - set(known))
    if unknown:
        raise ConfigError(f"--tasks has {unknown[0]}, which is none of {', '.join([*sets, *known])}.")
    return [name for name in known if name in wanted]


def _fits(evaluated: Evaluated, tokens: int, option: str) -> None:
    if tokens > evaluated.model.positions:
        raise ConfigError(f"{option} needs {tokens} positions, new tokens included, and the model has "
                          f"{evaluated.model.positions} (max_position_embeddings): give less.")


def _room(arguments: argparse.Namespace, evaluated: Evaluated, new_tokens: int) -> int:
    """Tokens of a prompt at most."""
    room = evaluated.model.positions - new_tokens
    if (arguments.max_length is not None and arguments.max_length > room) or room < 2:
        raise ConfigError(f"--max-length is {arguments.max_length}: with {new_tokens} new tokens the model's "
                          f"{evaluated.model.positions} positions leave room for {room}; give no more.")
    return arguments.max_length or room


def _results(arguments: argparse.Namespace, evaluated: Evaluated, rank: int, **settings: Any) -> Results:
    known: Record = {"command": arguments.command, "model": evaluated.identity, "seed": arguments.seed, **settings}
    return Results(arguments.out, known, write=rank == 0)


def _stat(path: Path) -> list[int] | None:
    return [path.stat().st_size, path.stat().st_mtime_ns] if path.exists() else None


def _progress(what: str, total: int | None, rank: int) -> Callable[[int], Any] | None:
    if rank:
        return None
    from tqdm import tqdm

    return tqdm(total=total, unit=what, disable=None, leave=False).update


def _ignored(done: int) -> None:
    pass
