"""The parts that sentences about a group share: places, scores with their intervals, differences."""

from collections.abc import Callable, Collection, Sequence

from xformers_lab.report import human, intervals, rows
from xformers_lab.report.intervals import Decision


def place(seq_len: int | None) -> str:
    """How a sentence about a length begins."""
    return "" if seq_len is None else f"At {seq_len:,} tokens: "


def with_interval(estimate: intervals.Estimate | None, form: Callable[[object], str] = human.score) -> str:
    """0.981 ± 0.012, or only the mean where there is one seed."""
    if estimate is None:
        return human.NONE
    mean = form(estimate.mean)
    return mean if estimate.half is None else f"{mean} ± {form(estimate.half)}"


def score(point: rows.Point) -> str:
    """The metric of a point."""
    return with_interval(point.estimate("metric"))


def metric(group: rows.Group) -> str:
    """The name of the group's metric."""
    return human.plain(group.first("metric_name", "metric"))


def guesses(group: rows.Group) -> str:
    """What is to be beaten, in words: "chance 0.500 · majority 0.947", the second where classes are unequal."""
    return " · ".join(f"{name} {human.score(score)}" for name, score in group.guesses.items())


def by(decision: Decision) -> str:
    """A difference with its corrected interval: "+0.021 [+0.010, +0.032]"."""
    interval = decision.interval
    ends = [signed(interval.low), signed(interval.high)]
    if ends[0] == ends[1]:  # all pairs differ alike
        return signed(interval.mean)
    return f"{signed(interval.mean)} [{', '.join(ends)}]"


def signed(value: float) -> str:
    """A difference of scores: +0.021."""
    text = human.score(abs(value))
    return text if float(text) == 0 else f"{'-' if value < 0 else '+'}{text}"


def percent(ratio: float) -> str:
    """How far a ratio is from one: +8 %."""
    return f"{100 * (ratio - 1):+.0f} %"


def names(points: Sequence[rows.Point]) -> str:
    """The series of points, listed."""
    return human.listing([point.series for point in points])


def tests(family: Collection[Decision]) -> str:
    """ "4 paired t-tests, Holm-corrected": how a family was tested."""
    kind = "paired t-test" if any(each.difference.n > 1 for each in family) else "test"
    return f"{len(family)} {kind}{'' if len(family) == 1 else 's, Holm-corrected'}"
