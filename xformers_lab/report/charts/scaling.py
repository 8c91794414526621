"""Losses over sizes with the curves through them, on logarithmic axes."""

from collections.abc import Sequence

import numpy as np

from xformers_lab.report import human
from xformers_lab.report.charts.parts import Chart, Pane, Pick, capital, needed
from xformers_lab.report.plot import Axis, Dot, Line, Mark, Plot, Rule, log_ticks
from xformers_lab.report.scaling import Curve, Scaling
from xformers_lab.report.scaling_words import exponent, law, size

CORNERS = 49  # of a curve, which is bent where it has a floor


def over_sizes(scalings: Sequence[Scaling], names: Sequence[str]) -> Chart | None:
    """The fits of a task, a choice for each length. names: of the series on the page, the variants among them."""
    drawn = [scaling for scaling in scalings if scaling.curves]
    if not drawn:
        return None
    panes = [Pane((at,), [_plot(scaling, names)]) for at, scaling in enumerate(drawn)]
    lengths = [f"{scaling.seq_len:,} tokens" if scaling.seq_len else "" for scaling in drawn]
    picks, panes = needed([Pick("at", lengths, len(lengths) - 1)], panes)
    first = drawn[0]
    note = f"{capital(first.scored)}; lower is better; both axes logarithmic; lines: {_laws(drawn)}"
    several = any(len(curve.seeds) > 1 for scaling in drawn for curve in scaling.curves)
    note += "; bars: 95\u00a0% interval over the seeds" if several else ""
    crossed = any(pair.crossings for scaling in drawn for pair in scaling.pairs)
    note += "; upright: where two curves cross, told by the seeds" if crossed else ""
    heads = ["", "length", "size", first.sized, first.scored, "curve misses by"]
    lines = [
        [curve.name, f"{scaling.seq_len:,}" if scaling.seq_len else "", scaling.said(at), size(scaling, x, False),
         human.score(mean), f"{100 * residual:+.2g} %"]
        for scaling in drawn
        for curve in scaling.curves
        for at, x, mean, residual in zip(
            curve.sizes, curve.fit.sizes, curve.fit.means, curve.fit.residuals, strict=True
        )
    ]  # fmt: skip
    return Chart(f"{first.scored.partition(' (')[0].capitalize()} by size", f"{note}.", panes, picks, heads, lines)


def _plot(scaling: Scaling, names: Sequence[str]) -> Plot:
    rules: list[Mark] = [
        Rule("x", one.at, f"{pair.names[0]} and {pair.names[1]} cross at {size(scaling, one.at)} "
             f"[{size(scaling, one.low, False)}, {size(scaling, one.high, False)}]")
        for pair in scaling.pairs
        for one in pair.crossings
    ]  # fmt: skip
    lines, dots, ends, xs = [], [], [], []
    for curve in scaling.curves:
        series = names.index(curve.name)
        along = np.geomspace(curve.fit.sizes[0], curve.fit.sizes[-1], CORNERS if curve.fit.floor else 2)
        drawn = curve.fit(along)[0]
        lines.append(Line(series, along.tolist(), drawn.tolist()))
        ends += [*drawn.tolist()]
        for at, x, estimate in zip(curve.sizes, curve.fit.sizes, curve.estimates, strict=True):
            low, high = max(estimate.low, estimate.mean / 2), min(estimate.high, estimate.mean * 2)
            words = f"{curve.name}\n{_score(estimate)} at {scaling.said(at)}, {size(scaling, x)}"
            dots.append(Dot(series, float(x), estimate.mean, words, upright=(low, high) if estimate.half else None))
            ends += [low, high]
            xs.append(float(x))
    low, high = min(ends) / 1.02, max(ends) * 1.02
    y = Axis("", low, high, [(mark, human.significant(mark)) for mark in log_ticks(low, high)], log=True, grid=True)
    left, right = min(xs) / 1.12, max(xs) * 1.12
    marks = [(mark, size(scaling, mark, False)) for mark in log_ticks(left, right)]
    return Plot(Axis(scaling.sized, left, right, marks, log=True), y, [*rules, *lines, *dots])


def _score(estimate) -> str:
    half = f" ± {human.score(estimate.half)}" if estimate.half else ""
    return f"{human.score(estimate.mean)}{half}"


def _laws(scalings: Sequence[Scaling]) -> str:
    said: dict[str, list[str]] = {}
    every: list[Curve] = [curve for scaling in scalings for curve in scaling.curves]
    for curve in every:
        said.setdefault(law(curve), []).append(f"{exponent(curve)} of {curve.name}")
    return "; ".join(f"{kind}, a {human.listing(list(dict.fromkeys(curves)))}" for kind, curves in said.items())
