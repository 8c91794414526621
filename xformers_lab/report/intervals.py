"""Means over seeds with Student-t intervals, paired differences, and Holm's correction of a family of them.

Student, 1908, "The Probable Error of a Mean"; Holm, 1979, "A Simple Sequentially Rejective Multiple Test Procedure".
"""

import dataclasses
import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

# The error of an interval, and of a family of tests: intervals are of 95 %.
LEVEL = 0.05
# Halvings of the range of a p-value, where no formula gives it.
HALVINGS = 50

Key = TypeVar("Key", bound=Hashable)


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


class Difference(NamedTuple):
    """A mean difference of n pairs with the standard error of that mean, 0 for one pair, and half the width of the 95 %
    interval of another error, independent of it, that more pairs do not make smaller."""

    mean: float
    error: float
    n: int
    sampled: float = 0.0

    def half(self, level: float = LEVEL) -> float:
        """Half the width of its interval. The squares of the two errors' halves add up: with as few as two pairs that
        errs to the wide side, where an approximation of the degrees of freedom would err to the narrow one."""
        paired = quantile(self.n - 1, level) * self.error if self.error else 0.0
        return math.hypot(paired, self.sampled * quantile(math.inf, level) / quantile(math.inf) if self.sampled else 0)

    @property
    def p(self) -> float:
        """The two-sided p-value of no difference: the level at which the interval begins to hold zero."""
        from scipy import special

        size = abs(self.mean)
        if not self.error and not self.sampled:
            return 0.0 if size else 1.0
        if not self.error:
            return float(2 * special.ndtr(-size / self.sampled * quantile(math.inf)))
        if not self.sampled:
            return float(2 * special.stdtr(self.n - 1, -size / self.error))
        low, high = 0.0, 1.0
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if self.half(middle) < size else (middle, high)
        return high


@dataclasses.dataclass(frozen=True)
class Decision:
    """One test of a family. adjusted: its p-value, corrected for the family; level: the one that Holm's procedure
    tested it at, so that the interval of that level holds zero where, and only where, the difference does not hold."""

    difference: Difference
    adjusted: float
    level: float

    @property
    def holds(self) -> bool:
        """Whether it is told from zero, with an error of 5 % over the whole family."""
        return self.adjusted <= LEVEL

    @property
    def interval(self) -> Estimate:
        """The difference and its corrected interval."""
        return Estimate(self.difference.mean, self.difference.half(self.level), self.difference.n)


def quantile(freedom: float, level: float = LEVEL) -> float:
    """The quantile of Student's t that leaves half of `level` above it; `freedom` is at least 1, infinity for the
    normal distribution."""
    from scipy import special

    # The lower tail, since 1 - level / 2 would lose the digits of a small level.
    if math.isinf(freedom):
        return -float(special.ndtri(level / 2))
    return -float(special.stdtrit(freedom, level / 2))


def estimate(values: Sequence[float], sampled: float = 0.0) -> Estimate:
    """The mean of at least one value and its 95 % interval; `sampled` is half the width of that of another error, which
    more values do not make smaller."""
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return Estimate(mean, sampled or None, n)
    return Estimate(mean, Difference(mean, statistics.stdev(values) / math.sqrt(n), n, sampled).half(), n)


def difference(first: Mapping, second: Mapping, sampled: float = 0.0) -> Difference | None:
    """The mean of first - second over the seeds both have (seed -> value). None where there is nothing to test it
    against: they share fewer than two seeds, and no other error is known (`sampled`, as in `Difference`)."""
    shared = [first[seed] - second[seed] for seed in first if seed in second]
    if len(shared) > 1:
        return Difference(
            statistics.fmean(shared), statistics.stdev(shared) / math.sqrt(len(shared)), len(shared), sampled
        )
    if not sampled or not first or not second:
        return None
    mean = shared[0] if shared else statistics.fmean(first.values()) - statistics.fmean(second.values())
    return Difference(mean, 0.0, 1, sampled)


def differ(first: Mapping, second: Mapping, level: float = LEVEL) -> bool | None:
    """Whether the paired interval excludes zero; None where there is too little to test."""
    paired = difference(first, second)
    return None if paired is None else abs(paired.mean) > paired.half(level)


def holm(family: Mapping[Key, Difference]) -> dict[Key, Decision]:
    """What holds of a family of differences, with an error of 5 % over all of them, whatever depends on what: in rising
    order of p, each is tested at 5 % over the number of those not yet rejected, until the first that is not."""
    p_values = {key: difference.p for key, difference in family.items()}
    decisions, adjusted, level, left = {}, 0.0, LEVEL, len(family)
    for key in sorted(family, key=lambda key: p_values[key]):
        if adjusted <= LEVEL:  # after the first that does not hold, the level stays
            level = LEVEL / left
        adjusted = max(adjusted, min(1.0, p_values[key] * left))
        decisions[key] = Decision(family[key], adjusted, level)
        left -= 1
    return {key: decisions[key] for key in family}
