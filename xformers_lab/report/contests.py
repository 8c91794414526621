"""Which scores of one length differ: families of paired tests, each held to an error of 5 % as a whole.

The reference is fixed before there are scores, so each variant is tested against it in a family of its own, which has
few tests and finds most. Which variant is best is known from the scores alone: what is said of it is tested in the
family of all pairs, which holds whichever pair the scores choose.
"""

import functools
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from xformers_lab.report import intervals
from xformers_lab.report.intervals import Decision, Difference


class Scores(NamedTuple):
    """A series at one length: seed -> metric, and half the width of the interval that scoring a sample leaves."""

    series: str
    by_seed: Mapping
    sampled: float

    def minus(self, other: "Scores") -> Difference | None:
        """The paired difference; None where nothing is known of its error."""
        return intervals.difference(self.by_seed, other.by_seed, math.hypot(self.sampled, other.sampled))


class Contest:
    """The families of one length.

    variants: what is compared; others: baselines beside them; reference: the series that the others are
    tested against, known before the scores; guess: what a variant has to beat, None where that is not known.
    """

    def __init__(
        self, variants: Sequence[Scores], others: Sequence[Scores], reference: str | None, guess: float | None
    ):
        self.variants = {scores.series: scores for scores in variants}
        self.others = {scores.series: scores for scores in others}
        self.reference = reference
        self.guess = guess

    @functools.cached_property
    def against(self) -> dict[str, Decision]:
        """Series -> its metric less that of the reference; a family of all variants but the reference."""
        fixed = self.variants.get(self.reference or "")
        rest = [scores for scores in self.variants.values() if scores is not fixed]
        return _family({scores.series: scores.minus(fixed) for scores in rest if fixed is not None})

    @functools.cached_property
    def pairs(self) -> dict[tuple[str, str], Decision]:
        """(Series, series) -> the metric of the first less that of the second; a family of all pairs of variants."""
        pairs = itertools.combinations(self.variants.values(), 2)
        return _family({(first.series, second.series): first.minus(second) for first, second in pairs})

    @functools.cached_property
    def beside(self) -> dict[tuple[str, str], Decision]:
        """(Baseline, variant) -> the metric of the first less that of the second; a family of all of
        these."""
        pairs = itertools.product(self.others.values(), self.variants.values())
        return _family({(other.series, mine.series): other.minus(mine) for other, mine in pairs})

    @functools.cached_property
    def guesses(self) -> dict[str, Decision]:
        """Series -> its metric less what a guess scores; a family of all variants."""
        return _family({scores.series: self._over_guess(scores) for scores in self.variants.values()})

    def between(self, first: str, second: str) -> Decision | None:
        """How the metric of the first differs from that of the second. A pair with the reference is decided in the
        family that was known before the scores, so that no two sentences disagree. None where it is not tested."""
        if first == self.reference and second in self.against:
            return _turned(self.against[second])
        if second == self.reference and first in self.against:
            return self.against[first]
        for family in (self.pairs, self.beside):
            if (first, second) in family:
                return family[first, second]
            if (second, first) in family:
                return _turned(family[second, first])
        return None

    def _over_guess(self, scores: Scores) -> Difference | None:
        if self.guess is None:
            return None
        values = list(scores.by_seed.values())
        if len(values) < 2 and not scores.sampled:
            return None
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
        return Difference(statistics.fmean(values) - self.guess, error, len(values), scores.sampled)


def _family(differences: Mapping) -> dict:
    return intervals.holm({key: difference for key, difference in differences.items() if difference is not None})


def _turned(decision: Decision) -> Decision:
    return Decision(decision.difference._replace(mean=-decision.difference.mean), decision.adjusted, decision.level)
