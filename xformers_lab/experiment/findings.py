"""Findings with thresholds, and the verdict that follows from them.

A claim is reproduced where all of its findings hold, each with 95 %: a claim that is false in one part passes by chance
in at most 5 of 100 runs, since it has to pass there too (an intersection-union test; Berger, 1982). It is not
reproduced where one of them fails, each held to 5 % over their number, since several may fail by chance (Bonferroni).
Else it is inconclusive.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from xformers_lab.experiment.sample import Sample
from xformers_lab.report.intervals import LEVEL, Estimate

Verdict = Literal["reproduced", "not reproduced at this scale", "inconclusive"]
VERDICTS: tuple[Verdict, ...] = ("reproduced", "not reproduced at this scale", "inconclusive")


@dataclasses.dataclass(frozen=True)
class Finding:
    """What was measured, with the rule that it has to keep: at least `low` and at most `high`, None for no end. Without
    either it is reported alone, and decides nothing."""

    what: str
    sample: Sample
    low: float | None = None
    high: float | None = None

    @property
    def decides(self) -> bool:
        """Whether the verdict rests on it."""
        return self.low is not None or self.high is not None

    @property
    def rule(self) -> str:
        """ "at least 0.4", in words; empty where it decides nothing."""
        ends = {"at least": self.low, "at most": self.high}
        return " and ".join(f"{word} {end:g}" for word, end in ends.items() if end is not None)

    def holds(self, family: int = 1) -> bool | None:
        """True where the whole 95 % interval keeps the rule, False where the whole interval of 5 % over `family` breaks
        it, None where neither is so, or nothing was measured."""
        if not self.decides:
            return None
        wide = self.sample.estimate()
        if wide is None or wide.half is None:
            return None
        if self._keeps(wide.low) and self._keeps(wide.high):
            return True
        corrected = self.sample.estimate(LEVEL / family) or wide
        below = self.low is not None and corrected.high < self.low
        above = self.high is not None and corrected.low > self.high
        return False if below or above else None

    @property
    def estimate(self) -> Estimate | None:
        """The mean and its 95 % interval."""
        return self.sample.estimate()

    def _keeps(self, value: float) -> bool:
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)


def at_least(what: str, sample: Sample, bound: float) -> Finding:
    """It has to be at least so much."""
    return Finding(what, sample, low=bound)


def at_most(what: str, sample: Sample, bound: float) -> Finding:
    """It has to be at most so much."""
    return Finding(what, sample, high=bound)


def reported(what: str, sample: Sample) -> Finding:
    """It is shown beside the others, and decides nothing."""
    return Finding(what, sample)


def outcomes(findings: Sequence[Finding]) -> list[bool | None]:
    """Whether each holds, fails, or is left open."""
    family = sum(finding.decides for finding in findings)
    return [finding.holds(max(1, family)) for finding in findings]


def verdict(findings: Sequence[Finding]) -> Verdict:
    """What follows for the claim; ValueError where no finding decides."""
    decisive = [held for finding, held in zip(findings, outcomes(findings), strict=True) if finding.decides]
    if not decisive:
        raise ValueError("no finding has a threshold: use at_least or at_most")
    if all(decisive):
        return "reproduced"
    return "not reproduced at this scale" if False in decisive else "inconclusive"
