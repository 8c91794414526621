"""A number measured several times, by seed or by round of a bench, and arithmetic paired by them."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Union

import numpy as np

from xformers_lab.report import intervals
from xformers_lab.report.intervals import Difference, Estimate


@dataclasses.dataclass(frozen=True)
class Sample:
    """values: trial -> value, a trial being a seed or the round of a bench. sampled: half the width of the 95 %
    interval that scoring a part of the test split leaves, which more trials do not make smaller. exact: the value is
    counted, not measured, so that one trial tells it. missing: why trials have no value, a sentence each.

    Two samples are subtracted and divided trial by trial, over the trials that both have.
    """

    values: Mapping[Hashable, float]
    sampled: float = 0.0
    exact: bool = False
    missing: tuple[str, ...] = ()

    def __sub__(self, other: Union["Sample", float]) -> "Sample":
        return self._with(other, lambda a, b: a - b, lambda a, b: math.hypot(self.sampled, _sampled(other)))

    def __truediv__(self, other: Union["Sample", float]) -> "Sample":
        """The ratio; its sampling error is that of a ratio of the means, to first order."""
        relative = lambda mine, theirs: (
            abs(mine / theirs) * math.hypot(self.sampled / mine if mine else 0.0, _sampled(other) / theirs)
        )
        return self._with(other, lambda a, b: a / b, relative)

    def __rsub__(self, other: float) -> "Sample":
        return dataclasses.replace(self, values={trial: other - value for trial, value in self.values.items()})

    def estimate(self, level: float = intervals.LEVEL) -> Estimate | None:
        """The mean and its interval with an error of `level`, `half` None where one trial tells nothing of it; None
        without a value."""
        numbers = list(self.values.values())
        if not numbers:
            return None
        mean, n = statistics.fmean(numbers), len(numbers)
        if self.exact:
            return Estimate(mean, 0.0, n)
        error = statistics.stdev(numbers) / math.sqrt(n) if n > 1 else 0.0
        known = n > 1 or self.sampled
        return Estimate(mean, Difference(mean, error, n, self.sampled).half(level) if known else None, n)

    def _with(
        self,
        other: Union["Sample", float],
        combine: Callable[[float, float], float],
        error: Callable[[float, float], float],
    ) -> "Sample":
        if isinstance(other, Sample):
            both = [trial for trial in self.values if trial in other.values]
            pairs = {trial: (self.values[trial], other.values[trial]) for trial in both}
            exact, missing = self.exact and other.exact, tuple(dict.fromkeys((*self.missing, *other.missing)))
        else:
            pairs = {trial: (value, other) for trial, value in self.values.items()}
            exact, missing = self.exact, self.missing
        try:
            values = {trial: combine(*pair) for trial, pair in pairs.items()}
            means = [statistics.fmean(side) for side in zip(*pairs.values(), strict=True)]
            sampled = error(*means) if means else 0.0
        except ZeroDivisionError:
            return Sample({}, missing=(*missing, "a divisor is zero"))
        return Sample(values, sampled, exact, missing)


def highest(*samples: Sample) -> Sample:
    """The highest of several at each trial that all of them have."""
    return _across(max, samples)


def lowest(*samples: Sample) -> Sample:
    """The lowest of several at each trial that all of them have."""
    return _across(min, samples)


def slope(by_size: Mapping[int, Sample]) -> Sample:
    """The exponent b of value ~ size^b: the slope of the least-squares line through the logarithms, at each trial that
    all sizes have. It is of costs, which are positive and have no sampling error."""
    sizes = sorted(by_size)
    if len(sizes) < 2 or any(sample.sampled for sample in by_size.values()):
        raise ValueError(f"a slope takes costs at two sizes or more, not {by_size}")
    logs = [math.log(size) for size in sizes]
    fit = lambda *costs: statistics.linear_regression(logs, [math.log(cost) for cost in costs]).slope
    return _across(fit, [by_size[size] for size in sizes])


def rank_correlation(firsts: Sequence[Sample], others: Sequence[Sample]) -> Sample:
    """Spearman's rank correlation of two numbers over what both are known of, ties in the middle, at each trial that
    all of them have. Exact numbers are the same at every trial. Raises ValueError for fewer than three pairs."""
    from scipy import stats

    pairs = [(first, other) for first, other in zip(firsts, others, strict=True) if first.values and other.values]
    if len(pairs) < 3:
        raise ValueError(f"a rank correlation takes three pairs or more, not {len(pairs)}")
    known = [sample for pair in pairs for sample in pair]
    halves = len(pairs)
    ranked = lambda *values: float(np.corrcoef(*map(stats.rankdata, (values[:halves], values[halves:])))[0, 1])
    return dataclasses.replace(_across(ranked, [*known[::2], *known[1::2]]), sampled=0.0)


def _across(combine: Callable[..., float], samples: Sequence[Sample]) -> Sample:
    first, *rest = samples
    trials = [trial for trial in first.values if all(trial in other.values for other in rest)]
    values = {trial: combine(*(sample.values[trial] for sample in samples)) for trial in trials}
    missing = tuple(dict.fromkeys(reason for sample in samples for reason in sample.missing))
    return Sample(values, max(map(_sampled, samples)), all(sample.exact for sample in samples), missing)


def _sampled(other: Sample | float) -> float:
    return other.sampled if isinstance(other, Sample) else 0.0
