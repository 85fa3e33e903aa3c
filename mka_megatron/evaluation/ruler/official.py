"""Samples that the authors' scripts have written: DIR/<length>/data/<task>/validation.jsonl, or DIR/<task>/... for one length.

A line has index, input, outputs and length; where answer_prefix is there, it follows the input.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mka_megatron.data.batch import DataError
from mka_megatron.evaluation.ruler.dataset import Sample

_LONGEST = 64 << 20


def read(directory: Path, name: str, length: int, count: int) -> Iterator[Sample]:
    """The first `count` samples of a task. Raises DataError, naming file and line."""
    tried = [directory / str(length) / "data" / name, directory / str(length) / name, directory / name]
    path = next((each / "validation.jsonl" for each in tried if (each / "validation.jsonl").is_file()), None)
    if path is None:
        raise DataError(f"--official {directory}: there is no {length}/data/{name}/validation.jsonl in it; put RULER's file "
                        "there, or leave the task out (--tasks).")
    try:
        with path.open("rb") as file:
            for number in range(1, count + 1):
                line = file.readline(_LONGEST)
                if not line:
                    return
                yield _sample(line, f"{path}:{number}", name, length)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; make it readable.") from None


def _sample(line: bytes, where: str, name: str, length: int) -> Sample:
    try:
        record: Any = json.loads(line)
        index, text, outputs = record["index"], record["input"], record["outputs"]
        prefix, tokens = record.get("answer_prefix", ""), record.get("length", -1)
        right = type(index) is type(tokens) is int and isinstance(text, str) and isinstance(prefix, str)
        right = right and isinstance(outputs, list) and bool(outputs) and all(isinstance(each, str) for each in outputs)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        right = False
    if not right:
        raise DataError(f"{where} is no RULER sample (index, input, outputs, length): copy the file again.")
    return Sample(name, length, index, text + prefix, tuple(outputs), tokens)
