"""Charts over lengths: a figure by the trained length, the metric beyond it, and under windows of several sizes."""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from xformers_lab.measure import exponent
from xformers_lab.report import human, intervals, rows
from xformers_lab.report.charts.parts import (
    Chart,
    Item,
    Measure,
    Pane,
    Pick,
    axis_of,
    capital,
    ends_of,
    guess_drawn,
    guess_words,
    item_of,
    items,
    length_axis,
    mappings,
    number,
    picked,
    tip,
)
from xformers_lab.report.plot import Axis, Band, Dot, Line, Mark, Plot, Rule

# An efficiency length, and the ends of its interval where they are known.
Ends = tuple[float, float | None, float | None]


def by_length(
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
    data = items(points, names, measure)
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
    near, words = guess_drawn(group, data, guess)
    if measure.log:
        logarithmic = f"{'both axes' if len(lengths) > 1 else 'the axis'} logarithmic"
        note = f"{note}; {logarithmic}" if note else logarithmic
        means = ((point.series, point.estimate(measure.name)) for point in points)
        zeros = [series for series, estimate in means if estimate and estimate.mean <= 0]
        note += f", where 0 has no place: {human.listing(list(dict.fromkeys(zeros)))}" if zeros else ""
    several = len(lengths) > 1
    spread = f"; {'bands' if several else 'bars'}: 95\u00a0% interval" if any(item.ends for item in data) else ""
    axis = axis_of(measure, ends_of(data, near), near)
    rule = [] if near is None else [Rule("y" if several else "x", near, guess_words(group, near))]
    if not several:
        return Chart(title, f"{capital(note)}{words}{spread}.", [Pane((), [_dots(data, axis, rule)])], *_lists(data))
    crossed = _crossings(crossings, names, {item.series for item in data})
    rule += [Rule("x", at, f"{names[series]}\nefficiency length {text}", series) for series, at, text in crossed]
    note = f"{capital(note)}{words}{spread}."
    if crossed:
        note += " Upright: the efficiency length, from which on a variant is faster than full attention."
    powers = _powers(data) if measure.log else {}
    note += f" {_growth(powers)}" if powers and not group.bench else ""
    plot = Plot(length_axis(lengths), axis, [*rule, *_lines(data)])
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
        dots += [Dot(series, one.length, one.value, tip(one), upright=one.ends if alone else None) for one in mine]
    return [*bands, *lines, *dots]


def _dots(data: Sequence[Item], x: Axis, rule: Sequence[Mark]) -> Plot:
    """A row for each series, the first on top."""
    last = len(data) - 1
    y = Axis("", -0.5, last + 0.5, [(last - at, item.name) for at, item in enumerate(data)], grid=True)
    dots = [Dot(item.series, item.value, last - at, tip(item), across=item.ends) for at, item in enumerate(data)]
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


def beyond(
    group: rows.Group, names: Sequence[str], varied: Sequence[str], quality: Measure, direction: str
) -> Chart | None:
    """The metric at other lengths than the one that was trained, which is marked."""
    found: dict[int, dict[tuple[int, int], list[float]]] = {}
    for row in group.rows:
        scored = [(number(one.get("seq_len")), number(one.get("metric"))) for one in mappings(row.get("by_length"))]
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
            data.append(item_of(series, names, tested, intervals.estimate(values), quality))
        near, _ = guess_drawn(group, data, group.guess)
        rule = [] if near is None else [Rule("y", near, guess_words(group, near))]
        rule.append(Rule("x", length, f"trained at {length:,} tokens"))
        axis = axis_of(quality, ends_of(data, near), near)
        over = length_axis(sorted({item.length for item in data}))
        panes.append(Pane((at,), [Plot(over, axis, [*rule, *_lines(data)])]))
        lines += [[item.name, f"{length:,}", f"{item.length:,}", item.text] for item in data]
    note = f"{capital(direction)}; the upright line is the length that was trained."
    picks, panes = picked("trained at", [f"{length:,} tokens" for length in trained], panes)
    heads = ["", "trained at", "tested at", quality.title]
    return Chart(f"{capital(quality.title)} beyond the trained length", note, panes, picks, heads, lines)


def windows(group: rows.Group, names: Sequence[str], quality: Measure, direction: str) -> Chart | None:
    """The same task under windows of several sizes: whether it needs long range at all."""
    data = items([point for point in group.points if point.role == "range"], names, quality)
    if not data:
        return None
    near, words = guess_drawn(group, data, group.guess)
    rule = [] if near is None else [Rule("x", near, guess_words(group, near))]
    axis = axis_of(quality, ends_of(data, near), near)
    lengths = sorted({item.length for item in data})
    panes = [
        Pane((at,), [_dots([item for item in data if item.length == length], axis, rule)])
        for at, length in enumerate(lengths)
    ]
    picks, panes = picked("at", [f"{length:,} tokens" for length in lengths], panes)
    title = f"{capital(quality.title)} under windows"
    needs = "Where a small window scores what a large one does, the task needs no long range"
    note = f"{capital(direction)}{words}. {needs}."
    heads, lines = _table(data, {})
    return Chart(title, note, panes, picks, heads, lines)
