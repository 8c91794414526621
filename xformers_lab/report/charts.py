"""Which charts a comparison has, from its rows: plots to draw, the choices a reader has, and the numbers in a table."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from xformers_lab.measure import exponent
from xformers_lab.record import FIGURES, SPEED, Figure, Form
from xformers_lab.report import crossover, findings, human, intervals, rows
from xformers_lab.report.plot import Axis, Band, Dot, Front, Line, Look, Mark, Plot, Rule, log_ticks, look, ticks
from xformers_lab.report.saved import LARGEST

# Points of all training curves of a chart together.
CURVE_POINTS = 12_000
# A curve is smoothed by an exponential mean whose weights halve every 1/30 of it.
SMOOTHED = 30
# What the metric is set against, by the figure's name: cost figures, the first that is there of each tuple.
COSTS = (("seconds_median",), ("memory",), ("flops_per_token", "flops"), ("computation",))
# How the axis of a figure writes its numbers; what spans orders of magnitude has a logarithmic one.
LOGARITHMIC: tuple[Form, ...] = ("count", "duration", "size")
ROLES = ("variant", "baseline", "range")
# What a guess does, by the name of its score.
GUESSES = {
    "chance": "chance",
    "majority": "always the most frequent class",
    "unigram": "tokens by how often each comes in the training texts",
}
DIRECTIONS = {1: "higher is better", 0: "", -1: "less is better"}


# An efficiency length, and the ends of its interval where they are known.
Ends = tuple[float, float | None, float | None]


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


def looks(cells: Sequence[dict], varied: Sequence[str]) -> list[Look]:
    """Colour and shape of each series on the whole page: variants first, in order of appearance, then baselines and
    windows, which are drawn hollow and dashed."""
    roles: dict[str, str] = {}
    for row in cells:
        roles.setdefault(rows.series(row, varied), rows.role(row))
    ranked = sorted(roles, key=lambda name: ROLES.index(roles[name]))
    return look(ranked, [name for name in ranked if roles[name] != "variant"])


def of_group(
    group: rows.Group,
    names: Sequence[str],
    varied: Sequence[str],
    figures: Iterable[Figure] = FIGURES.values(),
) -> list[Chart]:
    """Every chart that the rows of a group have numbers for: the metric, what it costs, each of the figures that is
    charted (of the two that say how fast, the one of this kind of rows), and what training and tuning were like."""
    quality = _metric(group)
    direction = "higher is better" if group.better("metric") > 0 else "lower is better"
    charts = [] if group.bench else [_pareto(group, names, quality)]
    charts.append(_by_length(group, names, quality, _capital(quality.title), direction, group.guess))
    for figure in figures:
        if figure.chart and (figure.name == group.speed or figure.name not in SPEED.values()):
            title = _memory_title(group) if figure.name == "memory" else figure.chart
            marked = crossover.marks(group) if figure.name == group.speed else {}
            axis = of_figure(figure)
            charts.append(_by_length(group, names, axis, title, DIRECTIONS[figure.better], None, marked))
    if not group.bench:
        charts += [
            _beyond(group, names, varied, quality, direction),
            _windows(group, names, quality, direction),
            *_tuning(group, names, varied, quality),
            *_curves(group, names, varied, quality.title),
        ]
    return [chart for chart in charts if chart is not None]


def _metric(group: rows.Group) -> Measure:
    name = human.plain(group.first("metric_name", "metric"))
    return Measure("metric", name, human.score)


def _memory_title(group: rows.Group) -> str:
    return "Peak memory" if any(row.get("peak_bytes") is not None for row in group.rows) else "Temporary memory"


# ---- over lengths -----------------------------------------------------------------------------------------------


def _by_length(
    group: rows.Group,
    names: Sequence[str],
    measure: Measure,
    title: str,
    note: str,
    guess: float | None,
    crossings: Mapping[str, Ends] = MappingProxyType({}),
) -> Chart | None:
    """A line for each series over the sequence lengths; with a single length, a point for each series."""
    points = [point for point in group.points if point.role != "range"]
    data = _data(points, names, measure)
    if not data:
        return None
    # A row that does not tell its length has no place beside those that do; the table of all cells has it.
    data = [item for item in data if item.length] or data
    lengths = sorted({item.length for item in data})
    if lengths[-1] == 0:
        title = f"{title}, {measure.title}"
    elif len(lengths) == 1:
        title = f"{title} at {lengths[0]:,} tokens"
    else:
        title = f"{title} by length"
    near, words = _chance(group, data, guess)
    if measure.log:
        logarithmic = f"{'both axes' if len(lengths) > 1 else 'the axis'} logarithmic"
        note = f"{note}; {logarithmic}" if note else logarithmic
        means = ((point.series, point.estimate(measure.name)) for point in points)
        zeros = [series for series, estimate in means if estimate and estimate.mean <= 0]
        note += f", where 0 has no place: {human.listing(list(dict.fromkeys(zeros)))}" if zeros else ""
    several = len(lengths) > 1
    spread = f"; {'bands' if several else 'bars'}: 95\u00a0% interval" if any(item.ends for item in data) else ""
    axis = _axis(measure, _ends(data, near), near)
    rule = [] if near is None else [Rule("y" if several else "x", near, _guess_words(group, near))]
    if not several:
        return Chart(title, f"{_capital(note)}{words}{spread}.", [Pane((), [_dots(data, axis, rule)])], *_lists(data))
    crossed = _crossings(crossings, names, {item.series for item in data})
    rule += [Rule("x", at, f"{names[series]}\nefficiency length {text}", series) for series, at, text in crossed]
    note = f"{_capital(note)}{words}{spread}."
    if crossed:
        note += " Upright: the efficiency length, from which on a variant is faster than full attention."
    powers = _powers(data) if measure.log else {}
    note += f" {_growth(powers)}" if powers and not group.bench else ""
    plot = Plot(_length_axis(lengths), axis, [*rule, *_lines(data)])
    heads, lines = _table(data, powers)
    if crossed:
        known = {names[series]: text for series, _, text in crossed}
        heads, lines = [*heads, "efficiency length"], [[*line, known.get(line[0], human.NONE)] for line in lines]
    return Chart(title, note, [Pane((), [plot])], [], heads, lines)


def _lines(data: Sequence[Item]) -> list[Mark]:
    """Bands at the bottom, then lines, then points."""
    bands, lines, dots = [], [], []
    for series in dict.fromkeys(item.series for item in data):
        mine = sorted((item for item in data if item.series == series), key=lambda item: item.length)
        xs = [float(item.length) for item in mine]
        lines.append(Line(series, xs, [item.value for item in mine]))
        if any(item.ends for item in mine):
            ends = [item.ends or (item.value, item.value) for item in mine]
            if len(mine) > 1:
                bands.append(Band(series, xs, [low for low, _ in ends], [high for _, high in ends]))
        alone = len(mine) == 1
        dots += [Dot(series, one.length, one.value, _tip(one), upright=one.ends if alone else None) for one in mine]
    return [*bands, *lines, *dots]


def _dots(data: Sequence[Item], x: Axis, rule: Sequence[Mark]) -> Plot:
    """A row for each series, the first on top."""
    last = len(data) - 1
    y = Axis("", -0.5, last + 0.5, [(last - at, item.name) for at, item in enumerate(data)], grid=True)
    dots = [Dot(item.series, item.value, last - at, _tip(item), across=item.ends) for at, item in enumerate(data)]
    return Plot(dataclasses.replace(x, grid=False), y, [*rule, *dots], 26 * len(data) + 34)


def _lists(data: Sequence[Item]) -> tuple[list[Pick], list[str], list[list[str]]]:
    return [], ["", "value"], [[item.name, item.text] for item in data]


def _table(data: Sequence[Item], powers: Mapping[str, float]) -> tuple[list[str], list[list[str]]]:
    """The numbers over lengths: a line for each series, a column for each length."""
    lengths = sorted({item.length for item in data})
    texts = {(item.name, item.length): item.text for item in data}
    heads = ["", *(f"{length:,} tokens" for length in lengths), *(["goes as"] if powers else [])]
    lines = []
    for name in dict.fromkeys(item.name for item in data):
        line = [name, *(texts.get((name, length), human.NONE) for length in lengths)]
        lines.append(line + ([human.power(powers.get(name))] if powers else []))
    return heads, lines


def _powers(data: Sequence[Item]) -> dict[str, float]:
    """How each series grows with the length, where it has lengths enough to tell."""
    powers = {}
    for name in dict.fromkeys(item.name for item in data):
        mine = [item for item in data if item.name == name and item.length > 0]
        if len({item.length for item in mine}) >= exponent.LEAST:
            powers[name] = exponent.fit([item.length for item in mine], [item.value for item in mine])
    return powers


def _growth(powers: Mapping[str, float]) -> str:
    """How the series grow with the length, in a sentence; the table has them all."""
    least, most = min(powers.values()), max(powers.values())
    if most - least < 0.02:
        return f"Goes with the length N as {human.power(most)}."
    ranked = sorted(powers, key=lambda name: -powers[name])
    first, last = (f"{human.power(powers[name])} ({name})" for name in (ranked[0], ranked[-1]))
    return f"Goes with the length N from {last} to {first}."


def _crossings(crossings: Mapping[str, Ends], names: Sequence[str], drawn: set[int]) -> list[tuple[int, float, str]]:
    """Series, length and words of each efficiency length."""
    marks = []
    for name, found in crossings.items():
        if name in names and names.index(name) in drawn:
            at, low, high = found
            ends = "" if low is None or high is None else f" [{low:,.0f}, {high:,.0f}]"
            marks.append((names.index(name), float(at), f"{at:,.0f}{ends} tokens"))
    return marks


def _beyond(
    group: rows.Group, names: Sequence[str], varied: Sequence[str], quality: Measure, direction: str
) -> Chart | None:
    """The metric at other lengths than the one that was trained, which is marked."""
    found: dict[int, dict[tuple[int, int], list[float]]] = {}
    for row in group.rows:
        scored = [(_number(one.get("seq_len")), _number(one.get("metric"))) for one in _mappings(row.get("by_length"))]
        own = rows.length(row), rows.measure(row, "metric")
        if not scored or not rows.ok(row) or own[0] is None or rows.role(row) == "range":
            continue
        series = names.index(rows.series(row, varied))
        mine = found.setdefault(own[0], {})
        for length, metric in dict([*scored, own]).items():
            if length and length >= 1 and metric is not None:
                mine.setdefault((series, int(length)), []).append(metric)
    if not found:
        return None
    trained, panes, lines = sorted(found), [], []
    for at, length in enumerate(trained):
        data = []
        for (series, tested), values in sorted(found[length].items()):
            data.append(_item(series, names, tested, intervals.estimate(values), quality))
        near, _ = _chance(group, data, group.guess)
        rule = [] if near is None else [Rule("y", near, _guess_words(group, near))]
        rule.append(Rule("x", length, f"trained at {length:,} tokens"))
        axis = _axis(quality, _ends(data, near), near)
        over = _length_axis(sorted({item.length for item in data}))
        panes.append(Pane((at,), [Plot(over, axis, [*rule, *_lines(data)])]))
        lines += [[item.name, f"{length:,}", f"{item.length:,}", item.text] for item in data]
    note = f"{_capital(direction)}; the upright line is the length that was trained."
    picks, panes = _picked("trained at", [f"{length:,} tokens" for length in trained], panes)
    heads = ["", "trained at", "tested at", quality.title]
    return Chart(f"{_capital(quality.title)} beyond the trained length", note, panes, picks, heads, lines)


def _windows(group: rows.Group, names: Sequence[str], quality: Measure, direction: str) -> Chart | None:
    """The same task under windows of several sizes: whether it needs long range at all."""
    data = _data([point for point in group.points if point.role == "range"], names, quality)
    if not data:
        return None
    near, words = _chance(group, data, group.guess)
    rule = [] if near is None else [Rule("x", near, _guess_words(group, near))]
    axis = _axis(quality, _ends(data, near), near)
    lengths = sorted({item.length for item in data})
    panes = [
        Pane((at,), [_dots([item for item in data if item.length == length], axis, rule)])
        for at, length in enumerate(lengths)
    ]
    picks, panes = _picked("at", [f"{length:,} tokens" for length in lengths], panes)
    title = f"{_capital(quality.title)} under windows"
    needs = "Where a small window scores what a large one does, the task needs no long range"
    note = f"{_capital(direction)}{words}. {needs}."
    heads, lines = _table(data, {})
    return Chart(title, note, panes, picks, heads, lines)


# ---- what it costs ----------------------------------------------------------------------------------------------


def front(points: Sequence[tuple[float, float]], better: int) -> list[tuple[float, float]]:
    """Of (cost, value) points those that no other is at least as good as in both and better in one, by rising cost."""
    kept: list[tuple[float, float]] = []
    for cost, value in sorted(set(points), key=lambda point: (point[0], -better * point[1])):
        if not kept or better * value > better * kept[-1][1]:
            kept.append((cost, value))
    return kept


def _pareto(group: rows.Group, names: Sequence[str], quality: Measure) -> Chart | None:
    """The metric against time, memory and FLOPs at one length, which the reader chooses, with the front of each."""
    points = [point for point in group.points if point.role != "range"]
    scored = {(item.series, item.length): item for item in _data(points, names, quality)}
    against = []
    for candidates in COSTS:
        for measure in (of_figure(FIGURES[name]) for name in candidates if name in FIGURES):
            spent = {
                (item.series, item.length): item
                for item in _data(points, names, measure)
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
    near, words = _chance(group, list(scored.values()), group.guess)
    for at, length in enumerate(lengths):
        plots, leading = [], {}
        for measure, spent in against:
            here = [(item, scored[key]) for key, item in spent.items() if key[1] == length]
            if not here:
                continue
            y = _axis(quality, _ends([score for _, score in here], near), near)
            x = dataclasses.replace(_axis(measure, _ends([cost for cost, _ in here], None), None), title=_cost(measure))
            edge = front([(cost.value, score.value) for cost, score in here], better)
            leading[measure.name] = {cost.name for cost, score in here if (cost.value, score.value) in edge}
            marks: list[Mark] = [] if near is None else [Rule("y", near, _guess_words(group, near))]
            marks += [_stairs(edge, x)] if edge else []
            marks += [
                Dot(
                    cost.series, cost.value, score.value, f"{_tip(score)}; {_cost(measure)} {cost.text}",
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
    picks, panes = _picked("at", options, panes)
    heads = ["", "length", quality.title, *(_cost(measure) for measure, _ in against), "on the front of"]
    side = "high" if better > 0 else "low"
    note = f"The best are far left and {side}; the stairs join what no other beats in both{words}"
    note += "; whiskers: 95\u00a0% interval" if any(item.ends for item in scored.values()) else ""
    title = f"{_capital(quality.title)} against its cost"
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


# ---- tuning -----------------------------------------------------------------------------------------------------


class _Tuning(NamedTuple):
    """How one knob of a series was tuned at a length; curve: value of the knob -> metric, None where it failed."""

    best: float | None
    edge: bool
    widened: bool
    curve: dict[float, float | None]
    metric: str
    share: float | None


def _tuning(group: rows.Group, names: Sequence[str], varied: Sequence[str], quality: Measure) -> list[Chart]:
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
                _number(best.get(str(knob))),
                bool(tuning.get("edge")),
                bool(tuning.get("widened")),
                _sweep(tuning, str(knob), group.better("metric") if better is None else 1 if better else -1),
                human.plain(tuning.get("metric_name") or quality.title),
                _number(tuning.get("share")),
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
    picks, panes = _picked("at", [f"{length:,} tokens" for length in lengths], panes)
    note = f"{_capital(DIRECTIONS[better])}; on validation data; ringed: the best, with which the row was trained"
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
    for point in _mappings(tuning.get("points")):
        x, metric = _number(point.get(knob)), _number(point.get("metric"))
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


# ---- while training went on -------------------------------------------------------------------------------------


class _Curve(NamedTuple):
    """Values of a cell over steps, with the tokens and seconds that each step is after, where they are known."""

    series: int
    ok: bool
    xs: dict[str, list[float]]
    ys: list[float]


def _curves(group: rows.Group, names: Sequence[str], varied: Sequence[str], metric: str) -> list[Chart | None]:
    """What was measured while training went on: the training loss, and loss and metric of validation where it took
    place more than once."""
    training = [(row, [tuple(point) for point in row.get("curve") or []]) for row in group.rows]
    better = _capital(DIRECTIONS[group.better("metric")])
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
    picks, panes = _needed(picks, panes)
    lines = [
        [names[series], f"{length:,}" if length else "", human.score(statistics.fmean(last))]
        for length in lengths
        for series in dict.fromkeys(curve.series for curve in found[length])
        if (last := [curve.ys[-1] for curve in found[length] if curve.series == series and curve.ok])
    ]
    return Chart(title, f"{note}.", panes, picks, ["", "length", "at the last point"], lines)


def _curve(row: dict, points: Sequence[tuple], most: int, series: int) -> _Curve | None:
    known = [point for point in points if len(point) > 1 and None not in map(_number, point[:2])]
    if not known:
        return None
    known = [*known[: -1 : max(1, math.ceil(len(known) / most))], known[-1]]
    xs = {"steps": [float(point[0]) for point in known]}
    batch, length = human.number(rows.value(row, "batch")), rows.length(row)
    if batch and length:
        xs["tokens"] = [step * batch * length for step in xs["steps"]]
    if all(len(point) > 2 and _number(point[2]) is not None for point in known):
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


# ---- their parts ------------------------------------------------------------------------------------------------


def _picked(label: str, options: list[str], panes: list[Pane]) -> tuple[list[Pick], list[Pane]]:
    """One choice, the last first."""
    return _needed([Pick(label, options, len(options) - 1)], panes)


def _needed(picks: list[Pick], panes: list[Pane]) -> tuple[list[Pick], list[Pane]]:
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


def _mappings(value: object) -> list[Mapping]:
    """The mappings in what is to be a list of them."""
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list | tuple) else []


def _number(value: object) -> float | None:
    """A number that can be drawn."""
    number = human.number(value)
    return None if number is None or abs(number) > LARGEST else number


def _data(points: Sequence[rows.Point], names: Sequence[str], measure: Measure) -> list[Item]:
    """An item for each point that has the measure; a logarithmic axis has no place for zero."""
    data = []
    for point in points:
        estimate = point.estimate(measure.name)
        if estimate is None or (measure.log and estimate.mean <= 0):
            continue
        data.append(_item(names.index(point.series), names, point.seq_len or 0, estimate, measure))
    return data


def _item(series: int, names: Sequence[str], length: int, estimate: intervals.Estimate, measure: Measure) -> Item:
    # What is planned or counted has the same value for every seed, and no interval.
    text = findings.with_interval(estimate, measure.written) if estimate.half else measure.written(estimate.mean)
    ends = None
    if estimate.half is not None and estimate.half > 0:
        ends = (max(estimate.low, estimate.mean / 10) if measure.log else estimate.low), estimate.high
    title = measure.title if measure.name == "metric" else ""
    return Item(series, names[series], length, estimate.mean, ends, text, title)


def _tip(item: Item) -> str:
    words = f"{item.name}\n{item.title} {item.text}" if item.title else f"{item.name}\n{item.text}"
    return words + (f"\nat {item.length:,} tokens" if item.length else "")


def _guess_words(group: rows.Group, level: float) -> str:
    what = next((GUESSES[name] for name, score in group.guesses.items() if score == level), "chance")
    return f"{what}, {human.score(level)}"


def _length_axis(lengths: Sequence[int]) -> Axis:
    marks = [(float(length), str(length)) for length in lengths]
    return Axis("sequence length, tokens", lengths[0] / 1.12, lengths[-1] * 1.12, marks, log=True)


def _chance(group: rows.Group, data: Sequence[Item], level: float | None) -> tuple[float | None, str]:
    """What a guess scores, to draw, and words for it; where that is far from all values, which it would flatten, words
    alone."""
    if level is None or not data:
        return None, ""
    drawn = f"; dashed: {_guess_words(group, level)}"
    low, high = min(item.value for item in data), max(item.value for item in data)
    if low >= 0 and high <= 1 and 0 <= level <= 1:
        return level, drawn
    if max(high, level) - min(low, level) > 4 * max(high - low, 1e-9):
        return None, f"; {_guess_words(group, level)}, lies {'above' if level > high else 'below'} the picture"
    return level, drawn


def _ends(data: Sequence[Item], chance: float | None) -> tuple[float, float]:
    values = [value for item in data for value in (item.value, *(item.ends or ()))]
    values += [] if chance is None else [chance]
    return min(values), max(values)


def _axis(measure: Measure, ends: tuple[float, float], chance: float | None) -> Axis:
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


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
