"""RULER's metrics, for one sample: 0 to 100."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mka_megatron.evaluation.ruler.tasks import Questions, Task


def score(task: Task, prediction: str, outputs: Sequence[str]) -> float:
    """string_match_part for questions, string_match_all for the others, of the cleaned prediction."""
    said = cleaned(prediction)
    return (string_match_part if isinstance(task, Questions) else string_match_all)(said, outputs)


def cleaned(prediction: str) -> str:
    """Control characters as line ends, none at either end."""
    return re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip()


def string_match_all(prediction: str, outputs: Sequence[str]) -> float:
    """Share of `outputs` that the prediction contains, cases aside."""
    return 100 * sum(output.lower() in prediction.lower() for output in outputs) / len(outputs)


def string_match_part(prediction: str, outputs: Sequence[str]) -> float:
    """Whether it contains one of them."""
    return 100.0 * any(output.lower() in prediction.lower() for output in outputs)
