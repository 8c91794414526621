"""The first table of the page: a line for each series at one length, its metric with its interval drawn beside it."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from xformers_lab.record import Figure
from xformers_lab.report import findings, human, plot, rows, study

ROLES = {"variant": "Variants", "baseline": "Baselines", "range": "Windows, to see whether the task needs long range"}
# Columns of costs, by the name of their figure, as many as a reader can compare at once.
COSTS = (
    "parameters",
    "flops_per_token",
    "flops",
    "tokens_per_second",
    "memory",
    "state_bytes",
    "prefill_seconds",
    "token_seconds",
)


class Part(NamedTuple):
    """The series of one role, best first: each with its number, its picture and the texts of its columns."""

    title: str
    lines: list[dict]


@dataclasses.dataclass(frozen=True)
class Summary:
    """The table at one length. ends: of the axis on which the intervals are drawn;
    whiskers: whether some row has one."""

    length: str
    heads: list[str]
    parts: list[Part]
    ends: str
    whiskers: bool


def of_group(group: rows.Group, looks: Sequence[plot.Look], figures: Sequence[Figure]) -> list[Summary]:
    """A table for each length, the shortest first; none for a bench, whose rows say it all, or without a metric."""
    names = [look.name for look in looks]
    if group.bench or not any(point.estimate("metric") for point in group.points):
        return []
    lengths = group.lengths or [None]
    return [
        _at(group, at, [point for point in group.points if point.seq_len == at], looks, names, figures)
        for at in lengths
        if any(point.seq_len == at for point in group.points)
    ]


def tuned(row: Mapping) -> str:
    """The knobs of a tuned row: "lr 0.003 (at the edge of the grid)"; empty for one that was not tuned."""
    said = ", ".join(f"{human.plain(knob)} {_knob(value)}" for knob, value in study.best(row).items())
    return f"{said} (at the edge of the grid)" if said and study.at_edge(row) else said


def matched(row: Mapping) -> str:
    """What was held equal and changed for it: "equal in parameters: ffn_dim 256 to 302"."""
    match = study.of(row)
    if not match:
        return ""
    what, changed = study.budget(match), match.get("changed")
    steps = [
        f"{human.plain(key)} {_knob(pair[0])} to {_knob(pair[1])}"
        for key, pair in (changed.items() if isinstance(changed, Mapping) else ())
        if isinstance(pair, list | tuple) and len(pair) == 2
    ]
    held = f"unmatched in {what} ({study.off(match)})" if match.get("ok") is False else f"equal in {what}"
    return f"{held}: {'; '.join(steps)}" if steps else held


def shared(row: dict) -> float | None:
    """The metric under the recipe that all variants share, of a row whose own knobs were tuned."""
    return rows.measure(rows.shared(row), "metric")


def _at(
    group: rows.Group,
    at: int | None,
    points: Sequence[rows.Point],
    looks: Sequence[plot.Look],
    names: Sequence[str],
    figures: Sequence[Figure],
) -> Summary:
    every = [row for point in points for row in point.rows]
    title = human.plain(group.first("metric_name", "metric"))
    with_shared = any(shared(row) is not None for row in every)
    notes = {"tuned knobs": tuned, "matched": matched}
    notes = {head: words for head, words in notes.items() if any(words(row) for row in every)}
    known = {figure.name: figure for figure in figures}
    costs = [known[name] for name in COSTS if name in known and any(rows.numbers(every, name))]
    if {"flops_per_token", "flops"} <= {figure.name for figure in costs}:
        costs = [figure for figure in costs if figure.name != "flops"]
    several = rows.seeds(group.rows) > 1
    heads = ["", f"{title}, tuned" if with_shared else title]
    heads += [f"{title}, shared recipe"] if with_shared else []
    heads += [*(["seeds"] if several else []), *(figure.heading for figure in costs), *notes]
    axis, chance = _axis(group, points)
    best = {point.series for point in group.leading(at, "metric")}
    parts = []
    for role, called in ROLES.items():
        mine = [point for point in points if point.role == role]
        mine.sort(key=lambda point: _rank(group, point))
        lines = []
        for point in mine:
            estimate = point.estimate("metric")
            look = looks[names.index(point.series)]
            ends = None if estimate is None or not estimate.half else (estimate.low, estimate.high)
            drawn = "" if estimate is None else plot.whisker(estimate.mean, ends, axis, chance, look)
            lost = human.listing(list(dict.fromkeys(human.status(row) for row in point.failed)))
            texts = [findings.with_interval(estimate) if estimate else lost or human.NONE]
            if with_shared:
                texts.append(findings.with_interval(point.shared.estimate("metric")))
            if several:
                texts.append(_seeds(point, lost))
            for figure in costs:
                values = rows.numbers(point.rows, figure.name)
                texts.append(human.in_column(figure, statistics.fmean(values) if values else None))
            said = [", ".join(dict.fromkeys(filter(None, map(words, point.rows)))) for words in notes.values()]
            lines.append(
                {
                    "series": names.index(point.series),
                    "name": point.series,
                    "drawn": drawn,
                    "texts": texts,
                    "notes": said,
                    "best": point.series in best,
                    "failed": not point.rows,
                }
            )
        if lines:
            parts.append(Part(called, lines))
    if len(parts) == 1 and parts[0].title == ROLES["variant"]:
        parts = [Part("", parts[0].lines)]
    whiskers = any(estimate.half for point in points if (estimate := point.estimate("metric")))
    ends = f"{human.score(axis.low)} to {human.score(axis.high)}"
    return Summary("" if at is None else f"{at:,} tokens", heads, parts, ends, whiskers)


def _axis(group: rows.Group, points: Sequence[rows.Point]) -> tuple[plot.Axis, float | None]:
    """The axis of the metric that all rows share, and the level of a guess where it lies near them."""
    values = []
    for point in points:
        estimate = point.estimate("metric")
        values += [estimate.low, estimate.high] if estimate else []
    guess = group.guess
    low, high = min(values, default=0.0), max(values, default=1.0)
    if guess is not None and low >= 0 and high <= 1 and 0 <= guess <= 1:
        low = min(low, guess)
    elif guess is not None and max(high, guess) - min(low, guess) > 4 * max(high - low, 1e-9):
        guess = None
    else:
        low, high = min(low, low if guess is None else guess), max(high, high if guess is None else guess)
    room = 0.03 * (high - low) or 0.05
    return plot.Axis("", low - room, high + room, []), guess


def _rank(group: rows.Group, point: rows.Point) -> float:
    estimate = point.estimate("metric")
    return float("inf") if estimate is None else -group.better("metric") * estimate.mean


def _seeds(point: rows.Point, lost: str) -> str:
    """3, or "2 of 3 (out of memory)"."""
    every = len(point.rows) + len(point.failed)
    return str(every) if not point.failed else f"{len(point.rows)} of {every} ({lost})"


def _knob(value: object) -> str:
    number = human.number(value)
    return human.plain(value) if number is None else f"{number:.6g}"
