"""The metric on validation data over each tuned knob."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from xformers_lab.report import human, rows
from xformers_lab.report.charts.parts import (
    DIRECTIONS,
    Chart,
    Measure,
    Pane,
    capital,
    mappings,
    number,
    picked,
)
from xformers_lab.report.plot import Axis, Dot, Line, Mark, Plot, ticks


class _Tuning(NamedTuple):
    """How one knob of a series was tuned at a length; curve: value of the knob -> metric, None where it failed."""

    best: float | None
    edge: bool
    widened: bool
    curve: dict[float, float | None]
    metric: str
    share: float | None


def sensitivities(group: rows.Group, names: Sequence[str], varied: Sequence[str], quality: Measure) -> list[Chart]:
    """The metric on validation data over each tuned knob, a line for each series at one length."""
    tuned: dict[str, dict[int, dict[int, _Tuning]]] = {}
    for row in group.rows:
        tuning = row.get("tuning")
        if not isinstance(tuning, Mapping):
            continue
        best = tuning.get("best")
        best = best if isinstance(best, Mapping) else {}
        knobs = tuning.get("knobs")
        for knob in knobs if isinstance(knobs, list | tuple) else best:
            at = tuned.setdefault(str(knob), {}).setdefault(rows.length(row) or 0, {})
            better = tuning.get("higher_is_better")
            at[names.index(rows.series(row, varied))] = _Tuning(
                number(best.get(str(knob))),
                bool(tuning.get("edge")),
                bool(tuning.get("widened")),
                _sweep(tuning, str(knob), group.better("metric") if better is None else 1 if better else -1),
                human.plain(tuning.get("metric_name") or quality.title),
                number(tuning.get("share")),
            )
    return [
        chart for knob, at in tuned.items() if (chart := _sensitivity(group, names, human.plain(knob), at)) is not None
    ]


def _sensitivity(
    group: rows.Group, names: Sequence[str], knob: str, at: Mapping[int, Mapping[int, _Tuning]]
) -> Chart | None:
    lengths, panes, lines = sorted(at), [], []
    every = [tuning for mine in at.values() for tuning in mine.values()]
    metric, better = every[0].metric, group.better("metric")
    for place, length in enumerate(lengths):
        xs = sorted({x for tuning in at[length].values() for x in tuning.curve})
        known = [y for tuning in at[length].values() for y in tuning.curve.values() if y is not None]
        if not known:
            continue
        room = 0.08 * (max(known) - min(known)) or 0.05
        low, high = min(known) - room, max(known) + room
        y = Axis("", low, high, [(mark, human.significant(mark)) for mark in ticks(low, high)], grid=True)
        curves: list[Mark] = []
        dots: list[Mark] = []
        for series, tuning in at[length].items():
            pairs = [(x, y) for x, y in sorted(tuning.curve.items()) if y is not None]
            curves += [Line(series, [x for x, _ in pairs], [y for _, y in pairs])] if pairs else []
            dots += _tried(series, names[series], knob, tuning, low if better > 0 else high)
            score = None if tuning.best is None else tuning.curve.get(tuning.best)
            edge = "" if not tuning.edge else "yes, after widening" if tuning.widened else "yes"
            lines.append([names[series], f"{length:,}", human.significant(tuning.best), human.score(score), edge])
        panes.append(Pane((place,), [Plot(_knob_axis(knob, xs), y, [*curves, *dots])]))
    if not panes:
        return None
    picks, panes = picked("at", [f"{length:,} tokens" for length in lengths], panes)
    note = f"{capital(DIRECTIONS[better])}; on validation data; ringed: the best, with which the row was trained"
    shares = {tuning.share for tuning in every if tuning.share is not None}
    note += f"; each with {100 * max(shares):.3g}\u00a0% of the steps" if len(shares) == 1 else ""
    failed = any(value is None for tuning in every for value in tuning.curve.values())
    note += "; crosses: failed" if failed else ""
    edges = dict.fromkeys(names[series] for mine in at.values() for series, tuning in mine.items() if tuning.edge)
    if edges:
        who = human.listing(list(edges), 4)
        note += f". The best lies at the edge of the grid, so that a better one may lie beyond it, of {who}"
    return Chart(
        f"Tuning of {knob}", f"{note}.", panes, picks, ["", "length", f"best {knob}", metric, "at the edge"], lines
    )


def _tried(series: int, name: str, knob: str, tuning: _Tuning, bottom: float) -> list[Mark]:
    """A point for each value of the knob; one that failed is a cross at the worse end of the axis."""
    dots: list[Mark] = []
    for x, value in sorted(tuning.curve.items()):
        words = f"{name}\n{knob} {human.significant(x)}: "
        if value is None:
            dots.append(Dot(series, x, bottom, f"{words}failed", cross=True))
            continue
        best = x == tuning.best
        more = "" if not best else " (best, at the edge of the grid)" if tuning.edge else " (best)"
        dots.append(Dot(series, x, value, f"{words}{tuning.metric} {human.score(value)}{more}", ring=best))
    return dots


def _sweep(tuning: Mapping, knob: str, better: int) -> dict[float, float | None]:
    """Value of the knob -> the best metric with it, over the other knobs; None where all failed."""
    curve: dict[float, float | None] = {}
    for point in mappings(tuning.get("points")):
        x, metric = number(point.get(knob)), number(point.get("metric"))
        if x is not None:
            metric = metric if point.get("status", "ok") == "ok" else None
            both = [value for value in (curve.get(x), metric) if value is not None]
            curve[x] = (max(both) if better > 0 else min(both)) if both else None
    return curve


def _knob_axis(knob: str, xs: Sequence[float]) -> Axis:
    marks = [(x, human.significant(x)) for x in xs]
    if xs[0] > 0:
        return Axis(knob, xs[0] / 1.15, xs[-1] * 1.15, marks, log=True)
    room = 0.04 * (xs[-1] - xs[0]) or 0.5
    return Axis(knob, xs[0] - room, xs[-1] + room, marks)
