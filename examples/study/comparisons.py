"""Differences between losses, and which of many can't be chance."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .measure import mean_and_interval

LEVEL = 0.05  # the chance of a single false one, among all


@dataclass(frozen=True)
class Comparison:
    """Paired differences, one for each seed, or one for each fold of classes."""

    differences: tuple[float, ...]

    @classmethod
    def between(cls, first: Sequence[float], second: Sequence[float]) -> Comparison:
        """First minus second."""
        return cls(tuple(a - b for a, b in zip(first, second, strict=True)))

    @property
    def p_value(self) -> float | None:
        """Of Student's t test that the mean is 0, two-sided; None of a single difference."""
        from scipy.stats import t

        mean, deviation, _ = mean_and_interval(self.differences)
        if deviation is None:
            return None
        if deviation == 0:
            return float(mean == 0)
        count = len(self.differences)
        return float(2 * t.sf(abs(mean) * math.sqrt(count) / deviation, count - 1))

    @property
    def excludes_zero(self) -> bool:
        """Whether its own 95 % interval does, whatever the others say."""
        p = self.p_value
        return p is not None and p < LEVEL

    def __str__(self) -> str:
        mean, _, half = mean_and_interval(self.differences)
        interval = "" if half is None else f" [{mean - half:+.2f}, {mean + half:+.2f}]"
        return f"{mean:+.2f}{interval}"


def holm(comparisons: Iterable[Comparison]) -> set[Comparison]:
    """Return the comparisons whose mean is not 0, by Holm's correction for their number.

    The smallest p-value of k is held against LEVEL / k, the next against LEVEL / (k - 1), and so on
    to the first that is above. The chance that any of those returned is false is at most LEVEL,
    however they depend on one another. A comparison that is there twice counts once; one without
    an interval isn't among the k.

    References:
        Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of
        Statistics 6, 1979.
    """
    found = {comparison: comparison.p_value for comparison in comparisons}
    known = sorted((p, index) for index, p in enumerate(found.values()) if p is not None)
    every, significant = list(found), set()
    for rank, (p, index) in enumerate(known):
        if p > LEVEL / (len(known) - rank):
            break
        significant.add(every[index])
    return significant
