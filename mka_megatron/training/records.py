"""What one step and one evaluation report, and means over the steps between two log lines."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step. Times in seconds; `tokens` are the labels that the loss averages over,
    `processed` all token slots of the global batch."""

    step: int
    samples: tuple[int, int]
    """First and last sample of its global batch, in data order."""
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    processed: int
    skipped: bool
    seconds: float
    data_seconds: float
    flops: float
    """Model FLOPs of this step on one device."""


@dataclass(frozen=True)
class Evaluation:
    """Held-out loss after `step` steps, in nats per token over `tokens` labels."""

    step: int
    loss: float
    perplexity: float
    tokens: int
    consumed_samples: int
    seconds: float


def perplexity(loss: float) -> float:
    """exp(loss); infinity where that overflows."""
    return math.exp(loss) if loss < 709.0 else math.inf


class Window:
    """Steps since the last log line, averaged; a skipped step counts for time and not for loss."""

    def __init__(self) -> None:
        self._records: list[StepRecord] = []

    def add(self, record: StepRecord) -> None:
        self._records.append(record)

    def drain(self) -> dict[str, float]:
        """Means over the window (loss, grad_norm, seconds, data_seconds, tokens_per_second, flops_per_second) and
        the number of steps, then empty it. There must be a record in it."""
        records, self._records = self._records, []
        good = [record for record in records if not record.skipped]
        seconds = sum(record.seconds for record in records)
        count = len(records)
        return {
            "loss": sum(r.loss for r in good) / len(good) if good else math.nan,
            "grad_norm": records[-1].grad_norm,
            "learning_rate": records[-1].learning_rate,
            "seconds": seconds / count,
            "data_seconds": sum(r.data_seconds for r in records) / count,
            "tokens_per_second": sum(r.processed for r in records) / seconds,
            "flops_per_second": sum(r.flops for r in records) / seconds,
            "skipped": float(count - len(good)),
            "steps": float(count),
        }
