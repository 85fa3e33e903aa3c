"""Means over seeds and what may be claimed of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Mean:
    """A mean over `count` runs."""

    mean: float
    std: float | None
    """Of the sample (n - 1); None of one run."""
    count: int

    @staticmethod
    def of(values: Sequence[float]) -> Mean:
        """Of at least one value."""
        mean = sum(values) / len(values)
        if len(values) == 1:
            return Mean(mean, None, 1)
        square = sum((value - mean) ** 2 for value in values)
        return Mean(mean, math.sqrt(square / (len(values) - 1)), len(values))

    @property
    def standard_error(self) -> float | None:
        """Of the mean; None of one run."""
        return None if self.std is None else self.std / math.sqrt(self.count)

    def differs(self) -> bool:
        """Whether it is further from zero than two standard errors; with one run nothing is."""
        return self.standard_error is not None and abs(self.mean) > 2 * self.standard_error

    def text(self, digits: int) -> str:
        """`mean ± std`, or the one value."""
        return f"{self.mean:,.{digits}f}" if self.std is None else f"{self.mean:,.{digits}f} ± {self.std:,.{digits}f}"


def paired(values: dict[int, float], others: dict[int, float]) -> Mean | None:
    """Mean difference of two contenders over the seeds that both have; None without one."""
    common = sorted(values.keys() & others.keys())
    return Mean.of([values[seed] - others[seed] for seed in common]) if common else None
