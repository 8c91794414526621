"""The metric against what it costs: time, memory and FLOPs, with the front of what no other beats in both."""

import dataclasses
from collections.abc import Sequence

from xformers_lab.record import FIGURES
from xformers_lab.report import human, rows
from xformers_lab.report.charts.parts import (
    Chart,
    Measure,
    Pane,
    axis_of,
    capital,
    ends_of,
    guess_drawn,
    guess_words,
    items,
    of_figure,
    picked,
    tip,
)
from xformers_lab.report.plot import Axis, Dot, Front, Mark, Plot, Rule

# What the metric is set against, by the figure's name: cost figures, the first that is there of each tuple.
COSTS = (("seconds_median",), ("memory",), ("flops_per_token", "flops"), ("computation",))


def front(points: Sequence[tuple[float, float]], better: int) -> list[tuple[float, float]]:
    """Of (cost, value) points those that no other is at least as good as in both and better in one, by rising cost."""
    kept: list[tuple[float, float]] = []
    for cost, value in sorted(set(points), key=lambda point: (point[0], -better * point[1])):
        if not kept or better * value > better * kept[-1][1]:
            kept.append((cost, value))
    return kept


def against_cost(group: rows.Group, names: Sequence[str], quality: Measure) -> Chart | None:
    """The metric against time, memory and FLOPs at one length, which the reader chooses, with the front of each."""
    points = [point for point in group.points if point.role != "range"]
    scored = {(item.series, item.length): item for item in items(points, names, quality)}
    against = []
    for candidates in COSTS:
        for measure in (of_figure(FIGURES[name]) for name in candidates if name in FIGURES):
            spent = {
                (item.series, item.length): item
                for item in items(points, names, measure)
                if (item.series, item.length) in scored
            }
            # All spend the same number of layers, but for what chooses them by token.
            if spent and (measure.name != "computation" or len({item.value for item in spent.values()}) > 1):
                against.append((measure, spent))
                break
    if not against:
        return None
    lengths = sorted({length for _, spent in against for _, length in spent})
    panes, lines, best = [], [], []
    better = group.better("metric")
    near, words = guess_drawn(group, list(scored.values()), group.guess)
    for at, length in enumerate(lengths):
        plots, leading = [], {}
        for measure, spent in against:
            here = [(item, scored[key]) for key, item in spent.items() if key[1] == length]
            if not here:
                continue
            y = axis_of(quality, ends_of([score for _, score in here], near), near)
            x = dataclasses.replace(
                axis_of(measure, ends_of([cost for cost, _ in here], None), None), title=_cost(measure)
            )
            edge = front([(cost.value, score.value) for cost, score in here], better)
            leading[measure.name] = {cost.name for cost, score in here if (cost.value, score.value) in edge}
            marks: list[Mark] = [] if near is None else [Rule("y", near, guess_words(group, near))]
            marks += [_stairs(edge, x)] if edge else []
            marks += [
                Dot(
                    cost.series, cost.value, score.value, f"{tip(score)}; {_cost(measure)} {cost.text}",
                    across=cost.ends, upright=score.ends, ring=False,
                )
                for cost, score in here
            ]  # fmt: skip
            plots.append(Plot(dataclasses.replace(x, grid=False), y, marks, 240))
        panes.append(Pane((at,), plots))
        best.append({_cost(measure): leading.get(measure.name, set()) for measure, _ in against})
        for key, score in scored.items():
            if key[1] == length:
                costs = [spent[key].text if key in spent else human.NONE for _, spent in against]
                fronts = [_cost(measure) for measure, _ in against if score.name in leading.get(measure.name, ())]
                lines.append([score.name, f"{length:,}" if length else "", score.text, *costs, ", ".join(fronts)])
    options = [f"{length:,} tokens" for length in lengths]
    picks, panes = picked("at", options, panes)
    heads = ["", "length", quality.title, *(_cost(measure) for measure, _ in against), "on the front of"]
    side = "high" if better > 0 else "low"
    note = f"The best are far left and {side}; the stairs join what no other beats in both{words}"
    note += "; whiskers: 95\u00a0% interval" if any(item.ends for item in scored.values()) else ""
    title = f"{capital(quality.title)} against its cost"
    return Chart(title, f"{note}.", panes, picks, heads, lines)


def _cost(measure: Measure) -> str:
    words = {"seconds_median": "time of a training step", "flops": "FLOPs of a training step"}
    return words.get(measure.name, measure.title)


def _stairs(edge: Sequence[tuple[float, float]], x: Axis) -> Front:
    """From the cheapest point right and then to the next, on to the right end."""
    xs, ys = [edge[0][0]], [edge[0][1]]
    for cost, value in edge[1:]:
        xs += [cost, cost]
        ys += [ys[-1], value]
    return Front([*xs, x.high], [*ys, ys[-1]])
