"""Vega-Lite specifications as plain dicts. A spec holds numbers, and names only as data: nothing in it is evaluated.

Ink is "currentColor", so that the page's own light and dark colours hold in the charts. Every chart has the parameter
`focus`, the number of the series that the reader picked in the legend (null: none); some have `at`, the length shown.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

from xformers_lab.record import FIGURES, SPEED, Figure, Form
from xformers_lab.report import findings, human, rows

# Okabe and Ito's colours for all kinds of colour vision ("Color Universal Design", 2008); yellow and black, which
# vanish on a light or a dark page, give way to a violet and a grey.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8b68c9", "#808080")
# Outlines in a square from -1 to 1, the same in the charts and in the page's legend. With 8 colours and 7 shapes no two
# of the first 56 series look alike.
SHAPES = (
    "M1,0A1,1,0,1,1,-1,0A1,1,0,1,1,1,0Z",
    "M-.9,-.9H.9V.9H-.9Z",
    "M0,-1.05L1.05,.85H-1.05Z",
    "M0,-1.2L1.1,0L0,1.2L-1.1,0Z",
    "M0,1.05L1.05,-.85H-1.05Z",
    "M-.4,-1H.4V-.4H1V.4H.4V1H-.4V.4H-1V-.4H-.4Z",
    "M-1,-.45H1V.45H-1Z",
)
CURVE_POINTS = 12_000


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart and the words around it; `lengths` are offered to choose from where the chart shows one at a time."""

    title: str
    note: str
    spec: dict
    lengths: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Measure:
    """What an axis shows: the name in a row, the words, how a number is written, and whether the axis is logarithmic,
    with powers of two on it."""

    name: str
    title: str
    written: Callable[[object], str]
    label: str = "format(datum.value, '~r')"
    log: bool = False
    binary: bool = False


# How Vega writes the numbers of an axis, by form; what spans orders of magnitude has a logarithmic one.
LABELS: dict[Form, str] = {
    "count": "format(datum.value, '~s')",
    "duration": "datum.value >= 0.999 ? format(datum.value, '~r') + ' s' : datum.value >= 0.000999 ? "
    "format(datum.value * 1e3, '~r') + ' ms' : format(datum.value * 1e6, '~r') + ' µs'",
    "size": "datum.value >= 1073741824 ? format(datum.value / 1073741824, '~r') + ' GiB' : datum.value >= 1048576 ? "
    "format(datum.value / 1048576, '~r') + ' MiB' : datum.value >= 1024 ? "
    "format(datum.value / 1024, '~r') + ' KiB' : datum.value + ' B'",
}
DIRECTIONS = {1: "higher is better", 0: "", -1: "less is better"}


def of_figure(figure: Figure) -> Measure:
    """The axis of a figure."""
    words = figure.name, figure.heading, lambda value: human.alone(figure, value)
    if figure.form not in LABELS:
        return Measure(*words)
    return Measure(*words, LABELS[figure.form], log=True, binary=figure.form == "size")


def look(names: Sequence[str]) -> list[dict]:
    """The colour and shape of each series, in order: what the legend shows."""
    return [
        {"name": name, "colour": COLOURS[i % len(COLOURS)], "shape": SHAPES[(i + i // len(COLOURS)) % len(SHAPES)]}
        for i, name in enumerate(names)
    ]


def of_group(
    group: rows.Group, names: Sequence[str], varied: Sequence[str], figures: Iterable[Figure] = FIGURES.values()
) -> list[Chart]:
    """Every chart that the rows of a group have numbers for: the metric, each of the figures that is charted (of the
    two that say how fast, the one of this kind of rows), and after training what the metric costs."""
    quality = _metric(group)
    direction = "higher is better" if group.better("metric") > 0 else "lower is better"
    charts = [_by_length(group, names, quality, _capital(quality.title), direction, group.guess)]
    for figure in figures:
        if figure.chart and (figure.name == group.speed or figure.name not in SPEED.values()):
            title = _memory_title(group) if figure.name == "memory" else figure.chart
            charts.append(_by_length(group, names, of_figure(figure), title, DIRECTIONS[figure.better], None))
    if not group.bench:
        speed = of_figure(FIGURES[group.speed])
        charts += [
            _trade(group, names, quality, speed, "speed", "training tokens/s", "right"),
            _spent(group, names, quality),
            *_curves(group, names, varied, quality.title),
        ]
    return [chart for chart in charts if chart is not None]


def _metric(group: rows.Group) -> Measure:
    name = human.plain(group.first("metric_name", "metric"))
    return Measure("metric", name, human.score)


def _memory_title(group: rows.Group) -> str:
    return "Peak memory" if any(row.get("peak_bytes") is not None for row in group.rows) else "Temporary memory"


# ---- the charts -------------------------------------------------------------------------------------------------


def _by_length(
    group: rows.Group, names: Sequence[str], measure: Measure, title: str, note: str, chance: float | None
) -> Chart | None:
    """A line for each series over the sequence lengths; with a single length, a point for each series."""
    data = _data(group, names, measure)
    if not data:
        return None
    lengths = sorted({item["length"] for item in data})
    if lengths[-1] == 0:
        title = f"{title}, {measure.title}"
    elif len(lengths) == 1:
        title = f"{title} at {lengths[0]:,} tokens"
    else:
        title = f"{title} by length"
    near, words = _chance(group, data, chance)
    if measure.log:
        logarithmic = f"{'both axes' if len(lengths) > 1 else 'the axis'} logarithmic"
        note = f"{note}; {logarithmic}" if note else logarithmic
        means = ((point.series, point.estimate(measure.name)) for point in group.points)
        zeros = [series for series, estimate in means if estimate and estimate.mean <= 0]
        note += f", where 0 has no place: {human.listing(list(dict.fromkeys(zeros)))}" if zeros else ""
    spread = "; bars: 95\u00a0% interval" if any("low" in item for item in data) else ""
    axis = _axis(measure, _ends(data, near), near)
    build = _lines if len(lengths) > 1 else _dots
    return Chart(title, f"{_capital(note)}{words}{spread}.", build(data, names, axis, lengths, near))


def _lines(data: list, names: Sequence[str], y: dict, lengths: list[int], chance: float | None) -> dict:
    x = _length_axis(lengths)
    # The lines of two series that agree lie on each other; the shapes are drawn with a rim so that both can be seen.
    layers = [
        {"mark": {"type": "line", "strokeWidth": 2}, "encoding": {"x": x, "y": y, **_ink(names, shape=False)}},
        _spread(data, {"x": x, "y": y | {"field": "low"}, "y2": {"field": "high"}}, names),
        _points({"x": x, "y": y}, names, "length"),
    ]
    return _chart([_rule(chance, "y"), *layers], data, 250)


def _dots(data: list, names: Sequence[str], x: dict, lengths: list[int], chance: float | None) -> dict:
    y = _names_axis()
    if "tickCount" in x["axis"]:
        x = x | {"axis": x["axis"] | {"tickCount": 4}}
    layers = [
        _spread(data, {"y": y, "x": x | {"field": "low"}, "x2": {"field": "high"}}, names),
        _points({"x": x, "y": y}, names),
    ]
    return _chart([_rule(chance, "x"), *layers], data, 26 * len(data) + 10)


def _spent(group: rows.Group, names: Sequence[str], quality: Measure) -> Chart | None:
    """Metric against the layers that a token passed through, where variants differ in them."""
    computation = of_figure(FIGURES["computation"])
    if len({item["value"] for item in _data(group, names, computation)}) < 2:
        return None
    return _trade(group, names, quality, computation, "computation per token", "layers per token, on average", "left")


def _trade(
    group: rows.Group, names: Sequence[str], quality: Measure, cost: Measure, against: str, axis: str, best: str
) -> Chart | None:
    """Metric against what it costs at one length, which the reader chooses; the best lie far to the `best` side."""
    costs = {(item["series"], item["length"]): item for item in _data(group, names, cost)}
    data = []
    for item in _data(group, names, quality):
        spent = costs.get((item["series"], item["length"]))
        if spent:
            data.append(item | {"cost": spent["value"], "cost_text": spent["text"]})
    if not data:
        return None
    lengths = sorted({item["length"] for item in data})
    low, high = min(item["cost"] for item in data), max(item["cost"] for item in data)
    x = _axis(cost, (low, high), None, title=axis, grid=False) | {"field": "cost"}
    chance, words = _chance(group, data, group.guess)
    y = _axis(quality, _ends(data, chance), chance)
    layers = [
        _spread(data, {"x": x, "y": y | {"field": "low"}, "y2": {"field": "high"}}, names),
        _points({"x": x, "y": y}, names, "cost"),
    ]
    spec = _chart([_rule(chance, "y"), *layers], data, 250)
    if len(lengths) > 1:
        spec["params"].append({"name": "at", "value": lengths[-1]})
        for layer in spec["layer"]:
            if "data" not in layer:
                layer["transform"] = [*layer.get("transform", []), {"filter": "datum.length === at"}]
    note = f"The best are far {best} and {'high' if group.better('metric') > 0 else 'low'}"
    title = f"{_capital(quality.title)} against {against}"
    return Chart(title, f"{note}{words}.", spec, lengths if len(lengths) > 1 else [])


def _curves(group: rows.Group, names: Sequence[str], varied: Sequence[str], metric: str) -> list[Chart | None]:
    """What was measured while training went on, over the steps at one length, a line for each cell: the training loss,
    and loss and metric of validation where it took place more than once."""
    training = [(row, [(step, loss) for step, loss, *_ in row.get("curve") or []]) for row in group.rows]
    better = _capital(DIRECTIONS[group.better("metric")])
    charts = [_over_steps(group, names, varied, training, "Training loss", "Cross-entropy in nats; lower is better")]
    if max((len(rows.validation(row)) for row in group.rows), default=0) > 1:
        losses = [(row, [(step, loss) for step, loss, _ in rows.validation(row)]) for row in group.rows]
        scores = [(row, [(step, score) for step, _, score in rows.validation(row)]) for row in group.rows]
        note = "On the validation split, at the steps that have a point"
        charts += [
            _over_steps(group, names, varied, losses, "Validation loss", f"{note}; lower is better", points=True),
            _over_steps(group, names, varied, scores, f"Validation {metric}", f"{better}; {note.lower()}", points=True),
        ]
    return charts


def _over_steps(
    group: rows.Group,
    names: Sequence[str],
    varied: Sequence[str],
    measured: list[tuple[dict, list[tuple]]],
    title: str,
    note: str,
    *,
    points: bool = False,
) -> Chart | None:
    """measured: each row with (step, value) pairs; points: whether each pair is marked."""
    curves = [(row, curve) for row, curve in measured if curve]
    if not curves:
        return None
    most = max(8, min(100, CURVE_POINTS // len(curves)))
    data = []
    for row, curve in curves:
        pairs = [pair for pair in curve if all(human.number(value) is not None for value in pair)]
        if pairs:
            pairs = [*pairs[: -1 : max(1, math.ceil(len(pairs) / most))], pairs[-1]]
            series = rows.series(row, varied)
            at = {"series": names.index(series), "name": series, "length": rows.length(row) or 0, "cell": len(data)}
            data.append(at | {"step": [step for step, _ in pairs], "loss": [_short(value) for _, value in pairs]})
    if not data:
        return None
    lengths = sorted({item["length"] for item in data})
    x = {
        "field": "step",
        "type": "quantitative",
        "scale": {"nice": False},
        "axis": {"title": "step", "grid": False, "tickCount": 5},
    }
    y = {"field": "loss", "type": "quantitative", "scale": {"zero": False}, "axis": {"title": None, "tickCount": 5}}
    line = {
        "mark": {"type": "line", "strokeWidth": 1.5, "clip": True, "point": points},
        "encoding": {"x": x, "y": y, "detail": {"field": "cell"}, "tooltip": _tip("name")} | _ink(names, shape=False),
    }
    spec = _chart([line], data, 250)
    chosen = [{"filter": "datum.length === at"}] if len(lengths) > 1 else []
    spec["transform"] = [*chosen, {"flatten": ["step", "loss"]}]
    if chosen:
        spec["params"].append({"name": "at", "value": lengths[-1]})
    stopped = "" if all(rows.ok(row) for row, _ in curves) else "; cells that failed are drawn as far as they came"
    return Chart(title, f"{note}{stopped}.", spec, lengths if chosen else [])


# ---- their parts ------------------------------------------------------------------------------------------------


def _data(group: rows.Group, names: Sequence[str], measure: Measure) -> list[dict]:
    """An object for each point that has the measure; a logarithmic axis has no place for zero."""
    data = []
    for point in group.points:
        estimate = point.estimate(measure.name)
        if estimate is None or (measure.log and estimate.mean <= 0):
            continue
        item = {"series": names.index(point.series), "name": point.series, "length": point.seq_len or 0}
        text = findings.with_interval(estimate, measure.written)
        text = f"{measure.title} {text}" if measure.name == "metric" else text
        item |= {"value": _short(estimate.mean), "text": text}
        if estimate.half is not None and estimate.half > 0:
            low = max(estimate.low, estimate.mean / 10) if measure.log else estimate.low
            item |= {"low": _short(low), "high": _short(estimate.high)}
        data.append(item)
    return data


def _chart(layers: list[dict | None], data: list[dict], height: int) -> dict:
    drawn = [layer for layer in layers if layer is not None]
    return {
        "data": {"values": data},
        "params": [{"name": "focus", "value": None}],
        "width": "container",
        "height": height,
        "layer": drawn,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "config": CONFIG,
    }


def _points(place: dict, names: Sequence[str], more: str = "") -> dict:
    shown = ["name", "text", *(["cost_text"] if more == "cost" else []), *(["length"] if more else [])]
    return {
        "mark": {"type": "point", "filled": True, "size": 80, "stroke": "var(--page)", "strokeWidth": 1, "opacity": 1},
        "encoding": place | {"tooltip": _tip(*shown)} | _ink(names, shape=True),
    }


def _spread(data: list[dict], place: dict, names: Sequence[str]) -> dict | None:
    """The bar of the 95 % interval, where some point has one."""
    if not any("low" in item for item in data):
        return None
    return {
        "mark": {"type": "rule", "strokeWidth": 1.5},
        "transform": [{"filter": "isValid(datum.low)"}],
        "encoding": place | _ink(names, shape=False),
    }


def _ink(names: Sequence[str], shape: bool) -> dict:
    """Colour, shape and focus of the series, numbered as in the legend; the page draws the legend, once for all."""
    looks, numbers = look(names), list(range(len(names)))
    ink: dict = {
        "color": {
            "field": "series",
            "type": "nominal",
            "legend": None,
            "scale": {"domain": numbers, "range": [item["colour"] for item in looks]},
        },
        "opacity": {"condition": {"test": "focus === null || datum.series === focus", "value": 1}, "value": 0.12},
    }
    if shape:
        scale = {"domain": numbers, "range": [item["shape"] for item in looks]}
        ink["shape"] = {"field": "series", "type": "nominal", "legend": None, "scale": scale}
    return ink


def _tip(*fields: str) -> list[dict]:
    """What the page shows at a point. The titles are ours: Vega-Lite writes them into an expression."""
    return [{"field": field, "type": "nominal", "title": field} for field in fields]


def _rule(chance: float | None, axis: str) -> dict | None:
    if chance is None:
        return None
    mark = {"type": "rule", "strokeDash": [4, 4], "color": "currentColor", "opacity": 0.6, "strokeWidth": 1.2}
    place = {axis: {"field": "value", "type": "quantitative"}}
    return {"data": {"values": [{"value": chance, "text": human.score(chance)}]}, "mark": mark, "encoding": place}


def _length_axis(lengths: list[int]) -> dict:
    scale = {"type": "log", "base": 2, "nice": False, "domain": [lengths[0] / 1.12, lengths[-1] * 1.12]}
    axis = {
        "title": "sequence length, tokens",
        "values": lengths,
        "format": "d",
        "grid": False,
        "labelOverlap": "greedy",
    }
    return {"field": "length", "type": "quantitative", "scale": scale, "axis": axis}


def _names_axis() -> dict:
    axis = {"title": None, "labelLimit": 130, "grid": True, "ticks": False, "domain": False, "labelPadding": 8}
    return {"field": "name", "type": "nominal", "sort": None, "axis": axis}


def _chance(group: rows.Group, data: list[dict], level: float | None) -> tuple[float | None, str]:
    """What a guess scores, to draw, and words for it; where that is far from all values, which it would flatten, words
    alone."""
    if level is None:
        return None, ""
    what = "chance" if level == human.number(group.first("chance")) else "always the most frequent class"
    drawn = f"; dashed: {what}, {human.score(level)}"
    low, high = min(item["value"] for item in data), max(item["value"] for item in data)
    if low >= 0 and high <= 1 and 0 <= level <= 1:
        return level, drawn
    if max(high, level) - min(low, level) > 4 * max(high - low, 1e-9):
        return None, f"; {what}, {human.score(level)}, lies {'above' if level > high else 'below'} the picture"
    return level, drawn


def _ends(data: list[dict], chance: float | None) -> tuple[float, float]:
    values = [item[key] for item in data for key in ("value", "low", "high") if key in item]
    values += [] if chance is None else [chance]
    return min(values), max(values)


def _axis(
    measure: Measure, ends: tuple[float, float], chance: float | None, title: str | None = None, grid: bool = True
) -> dict:
    """The axis of a measure: between 0 and 1 where chance and all values are (an accuracy), else around the values."""
    low, high = ends
    axis: dict = {"title": title, "grid": grid, "labelExpr": measure.label}
    if measure.log:
        low, high = low / 1.3, high * 1.3
        scale = {"type": "log", "domain": [low, high], "nice": False}
        axis["values"] = _ticks(low, high, measure.binary)
        return {"field": "value", "type": "quantitative", "scale": scale, "axis": axis}
    # Not on a logarithmic axis, whose values Vega would thin out to this count.
    axis["tickCount"] = 5
    if chance is not None and low >= 0 and high <= 1:
        scale = {"domain": [0, 1]}
    else:
        room = 0.08 * (high - low) or 0.05 * abs(high) or 0.1
        scale = {"domain": [low - room, high + room], "nice": True, "zero": False}
    return {"field": "value", "type": "quantitative", "scale": scale, "axis": axis}


def _ticks(low: float, high: float, binary: bool) -> list[float]:
    """At most six round numbers on a logarithmic axis: powers of two, or as many of each decade as have room."""
    if binary:
        marks = [2.0**k for k in range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)]
        marks = [mark for mark in marks if low <= mark <= high]
        return marks[:: max(1, math.ceil(len(marks) / 6))]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = []
    for digits in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        marks = [mark for decade in decades for digit in digits if low <= (mark := float(f"{digit}e{decade}")) <= high]
        if len(marks) <= 6:
            break
    return marks[:: max(1, math.ceil(len(marks) / 6))]


def _short(number: float) -> float:
    return float(f"{number:.5g}")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


CONFIG = {
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": "currentColor",
        "titleColor": "currentColor",
        "domainColor": "currentColor",
        "tickColor": "currentColor",
        "gridColor": "currentColor",
        "gridOpacity": 0.13,
        "domainOpacity": 0.4,
        "tickOpacity": 0.4,
        "labelOpacity": 0.8,
        "titleOpacity": 0.8,
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "titlePadding": 8,
    },
    "axisQuantitative": {"domain": False},
    "axisX": {"domain": True},
}
