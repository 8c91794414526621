"""What was measured while training went on: losses and validation over steps, tokens and seconds."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from xformers_lab.report import human, rows
from xformers_lab.report.charts.parts import (
    DIRECTIONS,
    Chart,
    Pane,
    Pick,
    capital,
    needed,
    number,
)
from xformers_lab.report.plot import Axis, Band, Dot, Line, Plot, ticks

# Points of all training curves of a chart together.
CURVE_POINTS = 12_000
# A curve is smoothed by an exponential mean whose weights halve every 1/30 of it.
SMOOTHED = 30


class _Curve(NamedTuple):
    """Values of a cell over steps, with the tokens and seconds that each step is after, where they are known."""

    series: int
    ok: bool
    xs: dict[str, list[float]]
    ys: list[float]


def of_training(group: rows.Group, names: Sequence[str], varied: Sequence[str], metric: str) -> list[Chart | None]:
    """What was measured while training went on: the training loss, and loss and metric of validation where it took
    place more than once."""
    training = [(row, [tuple(point) for point in row.get("curve") or []]) for row in group.rows]
    better = capital(DIRECTIONS[group.better("metric")])
    note = "Cross-entropy in nats; lower is better"
    charts = [_while_training(names, varied, training, "Learning curves", note, smooth=True)]
    if max((len(rows.validation(row)) for row in group.rows), default=0) > 1:
        losses = [(row, [(step, loss) for step, loss, _ in rows.validation(row)]) for row in group.rows]
        scores = [(row, [(step, score) for step, _, score in rows.validation(row)]) for row in group.rows]
        note = "On the validation split, at the steps that have a point"
        charts += [
            _while_training(names, varied, losses, "Validation loss", f"{note}; lower is better"),
            _while_training(names, varied, scores, f"Validation {metric}", f"{better}; {note.lower()}"),
        ]
    return charts


def _while_training(
    names: Sequence[str],
    varied: Sequence[str],
    measured: Sequence[tuple[dict, Sequence[tuple]]],
    title: str,
    note: str,
    *,
    smooth: bool = False,
) -> Chart | None:
    """measured: each row with (step, value) or (step, value, seconds). smooth: whether the lines are smoothed, with
    what was measured faint behind them; else each measured point has a dot."""
    curves = [(row, curve) for row, curve in measured if curve]
    if not curves:
        return None
    most = max(8, min(100, CURVE_POINTS // len(curves)))
    found: dict[int, list[_Curve]] = {}
    for row, points in curves:
        curve = _curve(row, points, most, names.index(rows.series(row, varied)))
        if curve is not None:
            found.setdefault(rows.length(row) or 0, []).append(curve)
    if not found:
        return None
    every = [curve for mine in found.values() for curve in mine]
    units = [unit for unit in ("steps", "tokens", "seconds") if all(unit in curve.xs for curve in every)]
    lengths, panes = sorted(found), []
    banded = False
    for at, length in enumerate(lengths):
        for over, unit in enumerate(units):
            plot = _training_plot(found[length], names, unit, smooth)
            banded = banded or bool(plot.of(Band))
            panes.append(Pane((at, over), [plot]))
    note += "; smoothed, as measured faint behind" if smooth else ""
    note += "; band: from the lowest to the highest seed" if banded else ""
    note += "" if all(rows.ok(row) for row, _ in curves) else "; cells that failed are drawn as far as they came"
    picks = [
        Pick("at", [f"{length:,} tokens" if length else "" for length in lengths], len(lengths) - 1),
        Pick("over", units, 0),
    ]
    picks, panes = needed(picks, panes)
    lines = [
        [names[series], f"{length:,}" if length else "", human.score(statistics.fmean(last))]
        for length in lengths
        for series in dict.fromkeys(curve.series for curve in found[length])
        if (last := [curve.ys[-1] for curve in found[length] if curve.series == series and curve.ok])
    ]
    return Chart(title, f"{note}.", panes, picks, ["", "length", "at the last point"], lines)


def _curve(row: dict, points: Sequence[tuple], most: int, series: int) -> _Curve | None:
    known = [point for point in points if len(point) > 1 and None not in map(number, point[:2])]
    if not known:
        return None
    known = [*known[: -1 : max(1, math.ceil(len(known) / most))], known[-1]]
    xs = {"steps": [float(point[0]) for point in known]}
    batch, length = human.number(rows.value(row, "batch")), rows.length(row)
    if batch and length:
        xs["tokens"] = [step * batch * length for step in xs["steps"]]
    if all(len(point) > 2 and number(point[2]) is not None for point in known):
        xs["seconds"] = [float(point[2]) for point in known]
    return _Curve(series, rows.ok(row), xs, [float(point[1]) for point in known])


def _training_plot(curves: Sequence[_Curve], names: Sequence[str], unit: str, smooth: bool) -> Plot:
    """A line for each series, the mean of its seeds that ended ok; those that failed on their own."""
    bands, faint, lines, dots, ends = [], [], [], [], []
    for series in dict.fromkeys(curve.series for curve in curves):
        mine = [curve for curve in curves if curve.series == series]
        done = [curve for curve in mine if curve.ok] or mine
        if smooth:
            faint += [Line(series, curve.xs[unit], curve.ys, faint=True) for curve in mine]
        drawn = [curve._replace(ys=smoothed(curve.ys)) if smooth else curve for curve in done]
        xs, means, lows, highs = _over_seeds(drawn, unit)
        lines.append(Line(series, xs, means))
        ends += [*means, *lows, *highs, min(min(curve.ys) for curve in mine)]
        if len(drawn) > 1:
            bands.append(Band(series, xs, lows, highs))
        words = lambda x, y, name=names[series]: f"{name}\n{human.score(y)} at {human.count(x)} {unit}"
        marked = list(zip(xs, means, strict=True))
        dots += [Dot(series, x, y, words(x, y)) for x, y in (marked[-1:] if smooth else marked)]
    low, high = min(ends), max(ends)
    room = 0.05 * (high - low) or 0.1
    low, high = low - room, high + room
    last = max(max(curve.xs[unit]) for curve in curves)
    first = min(min(curve.xs[unit]) for curve in curves)
    y = Axis("", low, high, [(mark, human.significant(mark)) for mark in ticks(low, high)], grid=True)
    tick = human.significant if unit == "seconds" else human.count
    x = Axis(unit, first, last, [(mark, tick(mark) if mark else "0") for mark in ticks(first, last)])
    return Plot(x, y, [*faint, *bands, *lines, *dots])


def _over_seeds(curves: Sequence[_Curve], unit: str) -> tuple[list[float], list[float], list[float], list[float]]:
    """x, mean, lowest and highest of the curves at each step that the first of them has."""
    at: dict[float, list[tuple[float, float]]] = {}
    for curve in curves:
        for step, x, y in zip(curve.xs["steps"], curve.xs[unit], curve.ys, strict=True):
            at.setdefault(step, []).append((x, y))
    steps = [step for step in sorted(at) if len(at[step]) == len(curves)] or sorted(at)
    xs = [statistics.fmean(x for x, _ in at[step]) for step in steps]
    ys = [[y for _, y in at[step]] for step in steps]
    return xs, [statistics.fmean(y) for y in ys], [min(y) for y in ys], [max(y) for y in ys]


def smoothed(values: Sequence[float]) -> list[float]:
    """An exponential mean of a curve, without the pull of a start from zero; the same number of values."""
    keep = 0.5 ** (SMOOTHED / max(len(values), 1))
    total = weight = 0.0
    means = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1.0
        means.append(total / weight)
    return means
