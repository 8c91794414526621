"""The efficiency length: from which length on a variant costs less than full attention on this machine.

Zhang et al., 2023, "CAB: Comprehensive Attention Benchmarking on Long Sequence Modeling" (arXiv 2210.07661). Between
two measured lengths the logarithm of the ratio of costs is taken to be a line in the logarithm of the length; beyond
the measured ones nothing is said.
"""

import dataclasses
import math
from collections.abc import Sequence

from xformers_lab.record import PLACES
from xformers_lab.report import human, intervals, rows

# What a length is given for: a measure of a row -> the words for it.
MEASURES = {"time": "time", "memory": "memory"}


@dataclasses.dataclass(frozen=True)
class Crossover:
    """Where one series begins to cost less than another, and stays so up to the longest length that both have.

    at: the length; 0 where it does at every length, infinity where it does not at the longest. low, high: the same of
    the bounds of the pointwise 95 % interval of the ratio, paired by round of a bench or by seed; None where it was
    measured once. lengths: the shortest and the longest; ratios: (length, cost over that of the reference).
    """

    series: str
    reference: str
    measure: str
    at: float
    low: float | None
    high: float | None
    lengths: tuple[int, int]
    ratios: tuple[tuple[int, float], ...]

    @property
    def words(self) -> str:
        """ "812 tokens [700, 950]", "from the shortest on (64)" or "beyond 4,096"."""
        first, last = self.lengths
        if self.at == 0:
            doubt = ""
            if self.high is not None and self.high > 0:
                told = "nowhere told from it" if math.isinf(self.high) else f"told from it from {_at(self.high)} on"
                doubt = f", {told}"
            return f"from the shortest on ({first:,}{doubt})"
        if math.isinf(self.at):
            untold = self.low is not None and not math.isinf(self.low)
            doubt = f" (not told from it from {_at(max(self.low or 0, first))} on)" if untold else ""
            return f"not within {first:,} to {last:,}{doubt}"
        if self.low is None or self.high is None:
            return f"{_at(self.at)} tokens"
        low = f"below {first:,}" if self.low == 0 else _at(self.low)
        high = f"beyond {last:,}" if math.isinf(self.high) else _at(self.high)
        return f"{_at(self.at)} tokens{'' if low == high else f' [{low}, {high}]'}"


def crossovers(group: rows.Group, measure: str = "time") -> list[Crossover]:
    """The crossover of every variant with full attention that shares its other keys, in order of appearance; of those
    that share two measured lengths or more. measure: "time", of a step or a pass, or "memory"."""
    if "attention" not in group.varied:
        return []
    keys = [key for key in group.varied if key not in (*PLACES, "attention")]
    by_series: dict[str, dict[int, rows.Point]] = {}
    for point in group.of_role("variant"):
        if point.rows and point.seq_len is not None:
            by_series.setdefault(point.series, {})[point.seq_len] = point
    apart = lambda points: tuple(str(rows.value(next(iter(points.values())).rows[0], key)) for key in keys)
    is_full = lambda points: rows.value(next(iter(points.values())).rows[0], "attention") == "full"
    full = {apart(points): (name, points) for name, points in by_series.items() if is_full(points)}
    found = []
    for series, points in by_series.items():
        if is_full(points) or apart(points) not in full:
            continue
        reference, others = full[apart(points)]
        pairs = [at for at in sorted(points) if at in others]
        if measure == "time":
            pairs = [at for at in pairs if group.one_machine(points[at], others[at])]
        ratios = [(at, _ratio(points[at], others[at], measure)) for at in pairs]
        known = [(at, ratio) for at, ratio in ratios if ratio is not None]
        if len(known) > 1:
            found.append(_crossover(series, reference, measure, known))
    return found


def marks(group: rows.Group, measure: str = "time") -> dict[str, tuple[float, float | None, float | None]]:
    """Series -> (length, low, high) of each crossover that lies within the measured lengths, for a chart; None for both
    ends of an interval that is not known, or reaches beyond them."""
    found = {}
    for each in crossovers(group, measure):
        if 0 < each.at < math.inf:
            ends = each.low or math.inf, each.high or math.inf
            found[each.series] = (each.at, *(ends if math.inf not in ends else (None, None)))
    return found


def sentences(group: rows.Group) -> list[str]:
    """One sentence for each measure; none where no variant and full attention share two lengths."""
    lines = []
    for measure, words in MEASURES.items():
        found = crossovers(group, measure)
        if found:
            full = human.listing(list(dict.fromkeys(each.reference for each in found)))
            alike: dict[str, list[str]] = {}
            for each in found:
                alike.setdefault(each.words, []).append(each.series)
            said = "; ".join(f"{human.listing(names)} {outcome}" for outcome, names in alike.items())
            lines.append(f"Efficiency length, from which on {words} is less than that of {full}: {said}.")
    return lines


def _ratio(point: rows.Point, full: rows.Point, measure: str) -> intervals.Difference | None:
    """The logarithm of the ratio of two costs, with its error over the trials that they share."""
    if measure == "memory":
        mine, others = point.estimate("memory"), full.estimate("memory")
        if not mine or not others or mine.mean <= 0 or others.mean <= 0:
            return None
        return intervals.Difference(math.log(mine.mean / others.mean), 0.0, 0)
    for name, sign in (("seconds_median", 1), ("tokens_per_second", -1)):
        mine, others = rows.trials(point, name), rows.trials(full, name)
        paired = intervals.difference(mine, others)
        if paired is None and mine and others:
            paired = intervals.Difference(_mean(mine) - _mean(others), 0.0, 1)
        if paired is not None:
            return paired._replace(mean=sign * paired.mean)
    return None


def _crossover(
    series: str, reference: str, measure: str, known: Sequence[tuple[int, intervals.Difference]]
) -> Crossover:
    line = lambda side: _last([(at, ratio.mean + side * _half(ratio)) for at, ratio in known])
    # What is planned, as memory is, has no error; what was timed once has one that is not known.
    tested = all(ratio.n != 1 for _, ratio in known)
    return Crossover(
        series,
        reference,
        measure,
        line(0),
        line(-1) if tested else None,
        line(1) if tested else None,
        (known[0][0], known[-1][0]),
        tuple((at, math.exp(ratio.mean)) for at, ratio in known),
    )


def _last(points: Sequence[tuple[int, float]]) -> float:
    """Where a line through (length, logarithm of a ratio) falls below zero for good; 0 where it is below all along,
    infinity where it ends at zero or above."""
    above = [place for place, (_, ratio) in enumerate(points) if ratio >= 0]
    if not above:
        return 0.0
    if above[-1] == len(points) - 1:
        return math.inf
    (first, high), (second, low) = points[above[-1]], points[above[-1] + 1]
    return math.exp(math.log(first) + math.log(second / first) * high / (high - low))


def _half(ratio: intervals.Difference) -> float:
    return ratio.half() if ratio.n > 1 else 0.0


def _mean(trials: dict) -> float:
    return math.fsum(trials.values()) / len(trials)


def _at(length: float) -> str:
    return f"{length:,.0f}"
