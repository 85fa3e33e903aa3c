"""Which source the i-th training sample comes from, by weight.

The order is the Webster (Sainte-Lague) apportionment: source d's k-th sample is due at time
(2k + 1) / (2 w_d) and samples are taken in order of their due time. After n samples every source has had
n * w_d / sum(w) of them, give or take one, and any position is found without walking there from the
start, so a resumed run needs nothing but its number of consumed samples. All arithmetic is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from mka_megatron.data.batch import DataError


@dataclass(frozen=True)
class Blend:
    """An endless interleaving of sources in fixed proportions."""

    shares: tuple[int, ...]
    """Integer shares, in the proportion of the weights."""

    @staticmethod
    def of(weights: Sequence[float]) -> Blend:
        """The blend of `weights` (> 0, in any unit); raises DataError otherwise."""
        for weight in weights:
            if not (weight > 0 and math.isfinite(weight)):
                raise DataError(
                    f"data.train[].weight: {weight} is not a positive number; remove the source or give one"
                )
        exact = [Fraction(weight) for weight in weights]
        common = math.lcm(*(value.denominator for value in exact))
        shares = [int(value * common) for value in exact]
        divisor = math.gcd(*shares)
        return Blend(tuple(share // divisor for share in shares))

    def locate(self, sample: int) -> tuple[int, int]:
        """Global sample number -> (source, how many samples of that source came before)."""
        total = sum(self.shares)
        # Ticks due before `near` number at most `sample`, and only a few are missing from there on.
        near = max(0, sample - len(self.shares))
        taken = [(2 * share * near + total - 1) // (2 * total) for share in self.shares]
        for _ in range(sample - sum(taken)):
            taken[self._next(taken)] += 1
        source = self._next(taken)
        return source, taken[source]

    def _next(self, taken: list[int]) -> int:
        best = 0
        for source in range(1, len(taken)):
            due, best_due = 2 * taken[source] + 1, 2 * taken[best] + 1
            if due * self.shares[best] < best_due * self.shares[source]:
                best = source
        return best
