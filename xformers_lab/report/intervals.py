"""Means over seeds with Student-t 95 % intervals, and paired differences.

Student, 1908, "The Probable Error of a Mean".
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

# The 97.5 % quantile of Student's t for 1 to 10 degrees of freedom; beyond, the series below is right to four digits.
_QUANTILES = (12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157, 2.228139)
_NORMAL = 1.959964


class Estimate(NamedTuple):
    """The mean of n values; `half` is half the width of its 95 % interval, None where one value tells nothing of it."""

    mean: float
    half: float | None
    n: int

    @property
    def low(self) -> float:
        return self.mean - (self.half or 0.0)

    @property
    def high(self) -> float:
        return self.mean + (self.half or 0.0)


def quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t; `freedom` is at least 1. Abramowitz and Stegun, 26.7.5."""
    if freedom <= len(_QUANTILES):
        return _QUANTILES[freedom - 1]
    z = _NORMAL
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of at least one value and its 95 % interval."""
    n = len(values)
    if n < 2:
        return Estimate(statistics.fmean(values), None, n)
    return Estimate(statistics.fmean(values), quantile(n - 1) * statistics.stdev(values) / math.sqrt(n), n)


def joined(estimate: Estimate, half: float) -> Estimate:
    """An estimate with the half-width of another error, independent of the first."""
    return estimate._replace(half=math.hypot(estimate.half or 0.0, half)) if half else estimate


def difference(first: Mapping, second: Mapping) -> Estimate | None:
    """The mean of first - second over the seeds both have (seed -> value); None where they share fewer than two."""
    shared = [first[seed] - second[seed] for seed in first if seed in second]
    return estimate(shared) if len(shared) > 1 else None


def differ(first: Mapping, second: Mapping) -> bool | None:
    """Whether the paired 95 % interval excludes zero; None where there is too little to test."""
    paired = difference(first, second)
    if paired is None or paired.half is None:
        return None
    return abs(paired.mean) > paired.half
