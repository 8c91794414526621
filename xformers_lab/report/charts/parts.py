"""What charts are made of: a chart with its choices, the axis of a figure, points with their intervals and words."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from xformers_lab.record import Figure, Form
from xformers_lab.report import findings, human, intervals, rows
from xformers_lab.report.plot import Axis, Plot, log_ticks, ticks
from xformers_lab.report.saved import LARGEST

# How the axis of a figure writes its numbers; what spans orders of magnitude has a logarithmic one.
LOGARITHMIC: tuple[Form, ...] = ("count", "duration", "size")
# What a guess does, by the name of its score.
GUESSES = {
    "chance": "chance",
    "majority": "always the most frequent class",
    "unigram": "tokens by how often each comes in the training data",
}
DIRECTIONS = {1: "higher is better", 0: "", -1: "less is better"}


class Pick(NamedTuple):
    """What a reader chooses for a chart, and what there is to choose from; `chosen` is shown first."""

    label: str
    options: list[str]
    chosen: int


class Pane(NamedTuple):
    """The plots that one choice shows side by side; `at` has the place of each pick's option."""

    at: tuple[int, ...]
    plots: list[Plot]


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart and the words around it. heads, lines: its numbers as a table."""

    title: str
    note: str
    panes: list[Pane]
    picks: list[Pick] = dataclasses.field(default_factory=list)
    heads: list[str] = dataclasses.field(default_factory=list)
    lines: list[list[str]] = dataclasses.field(default_factory=list)

    @property
    def wide(self) -> bool:
        """Whether it has several plots beside each other."""
        return max(len(pane.plots) for pane in self.panes) > 1

    def options(self, pane: Pane) -> list[str]:
        """What is chosen where a pane is shown, in words."""
        return [pick.options[at] for pick, at in zip(self.picks, pane.at, strict=True)]


@dataclasses.dataclass(frozen=True)
class Measure:
    """What an axis shows: the name in a row, the words, how a number is written there and elsewhere, and whether the
    axis is logarithmic, with powers of two on it."""

    name: str
    title: str
    written: Callable[[object], str]
    tick: Callable[[object], str] = human.significant
    log: bool = False
    binary: bool = False


class Item(NamedTuple):
    """A point of a chart: the mean of a series at a length (0 for none), the ends of its interval, and its words.
    title: what the words do not say of themselves."""

    series: int
    name: str
    length: int
    value: float
    ends: tuple[float, float] | None
    text: str
    title: str


def of_figure(figure: Figure) -> Measure:
    """The axis of a figure."""
    written = lambda value: human.alone(figure, value)
    if figure.form not in LOGARITHMIC:
        return Measure(figure.name, figure.heading, written)
    tick = lambda value: human.in_column(figure, value)
    return Measure(figure.name, figure.heading, written, tick, log=True, binary=figure.form == "size")


def picked(label: str, options: list[str], panes: list[Pane]) -> tuple[list[Pick], list[Pane]]:
    """One choice, the last first."""
    return needed([Pick(label, options, len(options) - 1)], panes)


def needed(picks: list[Pick], panes: list[Pane]) -> tuple[list[Pick], list[Pane]]:
    """The choices between two things or more; a choice that is shown first has a pane."""
    there = [sorted({pane.at[place] for pane in panes}) for place in range(len(picks))]
    kept = [place for place in range(len(picks)) if len(there[place]) > 1]
    chosen = [
        Pick(
            picks[place].label,
            [picks[place].options[at] for at in there[place]],
            there[place].index(picks[place].chosen) if picks[place].chosen in there[place] else len(there[place]) - 1,
        )
        for place in kept
    ]
    renamed = [Pane(tuple(there[place].index(pane.at[place]) for place in kept), pane.plots) for pane in panes]
    return chosen, renamed


def mappings(value: object) -> list[Mapping]:
    """The mappings in what is to be a list of them."""
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list | tuple) else []


def number(value: object) -> float | None:
    """A number that can be drawn."""
    number = human.number(value)
    return None if number is None or abs(number) > LARGEST else number


def items(points: Sequence[rows.Point], names: Sequence[str], measure: Measure) -> list[Item]:
    """An item for each point that has the measure; a logarithmic axis has no place for zero."""
    data = []
    for point in points:
        estimate = point.estimate(measure.name)
        if estimate is None or (measure.log and estimate.mean <= 0):
            continue
        data.append(item_of(names.index(point.series), names, point.seq_len or 0, estimate, measure))
    return data


def item_of(series: int, names: Sequence[str], length: int, estimate: intervals.Estimate, measure: Measure) -> Item:
    # What is planned or counted has the same value for every seed, and no interval.
    text = findings.with_interval(estimate, measure.written) if estimate.half else measure.written(estimate.mean)
    ends = None
    if estimate.half is not None and estimate.half > 0:
        ends = (max(estimate.low, estimate.mean / 10) if measure.log else estimate.low), estimate.high
    title = measure.title if measure.name == "metric" else ""
    return Item(series, names[series], length, estimate.mean, ends, text, title)


def tip(item: Item) -> str:
    words = f"{item.name}\n{item.title} {item.text}" if item.title else f"{item.name}\n{item.text}"
    return words + (f"\nat {item.length:,} tokens" if item.length else "")


def guess_words(group: rows.Group, level: float) -> str:
    what = next((GUESSES[name] for name, score in group.guesses.items() if score == level), "chance")
    return f"{what}, {human.score(level)}"


def length_axis(lengths: Sequence[int]) -> Axis:
    marks = [(float(length), str(length)) for length in lengths]
    return Axis("sequence length, tokens", lengths[0] / 1.12, lengths[-1] * 1.12, marks, log=True)


def guess_drawn(group: rows.Group, data: Sequence[Item], level: float | None) -> tuple[float | None, str]:
    """What a guess scores, to draw, and words for it; where that is far from all values, which it would flatten, words
    alone."""
    if level is None or not data:
        return None, ""
    drawn = f"; dashed: {guess_words(group, level)}"
    low, high = min(item.value for item in data), max(item.value for item in data)
    if low >= 0 and high <= 1 and 0 <= level <= 1:
        return level, drawn
    if max(high, level) - min(low, level) > 4 * max(high - low, 1e-9):
        return None, f"; {guess_words(group, level)}, lies {'above' if level > high else 'below'} the picture"
    return level, drawn


def ends_of(data: Sequence[Item], chance: float | None) -> tuple[float, float]:
    values = [value for item in data for value in (item.value, *(item.ends or ()))]
    values += [] if chance is None else [chance]
    return min(values), max(values)


def axis_of(measure: Measure, ends: tuple[float, float], chance: float | None) -> Axis:
    """The axis of a measure: between 0 and 1 where chance and all values are (an accuracy), else around the values."""
    low, high = ends
    if measure.log:
        low, high = low / 1.3, high * 1.3
        marks = log_ticks(low, high, measure.binary)
        return Axis("", low, high, [(mark, measure.tick(mark)) for mark in marks], log=True, grid=True)
    if chance is not None and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    else:
        room = 0.08 * (high - low) or 0.05 * abs(high) or 0.1
        low, high = low - room, high + room
    return Axis("", low, high, [(mark, measure.tick(mark)) for mark in ticks(low, high)], grid=True)


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]
