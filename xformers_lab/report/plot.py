"""One plot as SVG, drawn from numbers: axes, lines, bands, and points with whiskers.

Ink is "currentColor", so that a page's own light and dark colours hold in it. What belongs to a series carries its
number in `data-s`, by which the page makes it stand out, and a point its words in `<title>`. Text is escaped here, and
nowhere is a style or an address written: a strict Content-Security-Policy has nothing to forbid.
"""

import dataclasses
import html
import itertools
import math
from collections.abc import Sequence

from xformers_lab.report import human

# The units of a plot are pixels at its natural width; the page stretches it a little.
WIDTH = 380
HEIGHT = 250
# A name on an axis is cut after so many letters.
LETTERS = 22
# Okabe and Ito's colours for all kinds of colour vision ("Color Universal Design", 2008); yellow and black, which
# vanish on a light or a dark page, give way to a violet and a grey.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8b68c9", "#808080")
# Outlines in a square from -1 to 1, the same in the plots and in the legend. With 8 colours and 7 shapes no two of the
# first 56 series look alike.
SHAPES = (
    "M1,0A1,1,0,1,1,-1,0A1,1,0,1,1,1,0Z",
    "M-.9,-.9H.9V.9H-.9Z",
    "M0,-1.05L1.05,.85H-1.05Z",
    "M0,-1.2L1.1,0L0,1.2L-1.1,0Z",
    "M0,1.05L1.05,-.85H-1.05Z",
    "M-.4,-1H.4V-.4H1V.4H.4V1H-.4V.4H-1V-.4H-.4Z",
    "M-1,-.45H1V.45H-1Z",
)
# What stands for currentColor, for the page behind and for a panel on it, in a file of its own, and its font.
INK, PAPER, PANEL = "#1c2024", "#ffffff", "#f0f2f4"
SANS = "Helvetica, Arial, sans-serif"


@dataclasses.dataclass(frozen=True)
class Look:
    """How a series is drawn wherever it is: a baseline's lines are dashed and its shapes hollow."""

    name: str
    colour: str
    shape: str
    hollow: bool = False


@dataclasses.dataclass(frozen=True)
class Axis:
    """ticks: (value, label). log: whether equal steps are equal ratios; grid: whether its ticks draw lines across."""

    title: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    log: bool = False
    grid: bool = False

    def share(self, value: float) -> float:
        """Where a value lies between the ends, 0 to 1; what lies beyond them is put on the nearer one."""
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(max(value, self.low * 1e-3))
        return min(1.0, max(0.0, (at - low) / (high - low or 1.0)))


@dataclasses.dataclass(frozen=True)
class Line:
    """xs, ys: its corners. faint: one of the raw curves behind."""

    series: int
    xs: Sequence[float]
    ys: Sequence[float]
    faint: bool = False


@dataclasses.dataclass(frozen=True)
class Band:
    """What lies between two lines over the same xs."""

    series: int
    xs: Sequence[float]
    lows: Sequence[float]
    highs: Sequence[float]


@dataclasses.dataclass(frozen=True)
class Dot:
    """A point, its words, and the ends of its whiskers. ring: it is marked; cross: it has no value, only a place."""

    series: int
    x: float
    y: float
    words: str
    across: tuple[float, float] | None = None
    upright: tuple[float, float] | None = None
    ring: bool = False
    cross: bool = False


@dataclasses.dataclass(frozen=True)
class Rule:
    """A dashed line at a value of one axis; of a series, where it tells something of that alone."""

    axis: str
    at: float
    words: str
    series: int | None = None


@dataclasses.dataclass(frozen=True)
class Front:
    """The stairs of the points that no other is better than in both."""

    xs: Sequence[float]
    ys: Sequence[float]


Mark = Line | Band | Dot | Rule | Front


@dataclasses.dataclass(frozen=True)
class Plot:
    """Two axes and what is drawn between them, the first at the bottom of the heap."""

    x: Axis
    y: Axis
    marks: Sequence[Mark]
    height: int = HEIGHT

    def of(self, kind: type) -> list:
        """The marks of one kind."""
        return [mark for mark in self.marks if isinstance(mark, kind)]


def look(names: Sequence[str], aside: Sequence[str] = ()) -> list[Look]:
    """The colour and shape of each series, in order; those `aside` are the ones beside which the others stand."""
    return [
        Look(name, COLOURS[i % len(COLOURS)], SHAPES[(i + i // len(COLOURS)) % len(SHAPES)], name in aside)
        for i, name in enumerate(names)
    ]


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most `most` + 1 round numbers between two ends, equally far apart."""
    if not high > low:
        return [low]
    raw = (high - low) / most
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(digit * size for digit in (1, 2, 2.5, 5, 10) if digit * size >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [float(f"{at * step:.10g}") for at in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, binary: bool = False) -> list[float]:
    """At most six round numbers on a logarithmic axis: powers of two, quarters between them where there is but one, or
    as many of each decade as have room."""
    if binary:
        octaves = range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)
        marks = []
        for parts in ((1,), (1, 1.5), (1, 1.25, 1.5, 1.75)):
            marks = [mark for k in octaves for part in parts if low <= (mark := part * 2.0**k) <= high]
            if len(marks) > 1:
                break
        return marks[:: max(1, math.ceil(len(marks) / 6))]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = []
    for digits in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        marks = [mark for decade in decades for digit in digits if low <= (mark := float(f"{digit}e{decade}")) <= high]
        if len(marks) <= 6:
            break
    return marks[:: max(1, math.ceil(len(marks) / 6))]


def svg(plot: Plot, looks: Sequence[Look], label: str) -> str:
    """The plot as an element of a page, `label` for those who cannot see it."""
    name = html.escape(human.plain(label))
    size = f'viewBox="0 0 {WIDTH} {plot.height}"'
    return f'<svg class="plot" {size} role="img" aria-label="{name}" font-size="12">{_drawing(plot, looks)}</svg>'


def file(plot: Plot, looks: Sequence[Look], title: str) -> str:
    """The plot as a file of its own on white paper, with its title and a legend of the series in it."""
    there = sorted({mark.series for mark in plot.marks if not isinstance(mark, Front) and mark.series is not None})
    wide = max((len(_cut(looks[at].name, 44)) for at in there), default=0)
    columns = max(1, min(3, (WIDTH - 16) // (7 * wide + 22 or 1)))
    legend = []
    for i, at in enumerate(there):
        x = 14 + (i % columns) * (WIDTH - 16) // columns
        y = plot.height + 10 + 17 * (i // columns)
        legend.append(_shape(looks[at], x, y - 4, 4.5) + _text(x + 10, y, _cut(looks[at].name, 44), "start"))
    height = plot.height + 6 + 17 * math.ceil(len(there) / columns)
    return paper(WIDTH, height, title, f"{_drawing(plot, looks)}{''.join(legend)}")


def paper(width: float, height: float, title: str, body: str) -> str:
    """A drawing of this size with a title above it, as a file of its own on white paper."""
    wide, high = math.ceil(max(width, WIDTH)), math.ceil(height) + 24
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" width="{wide}" height="{high}"'
    lines = _text(8, 15, _cut(human.plain(title), int(wide / 6.3)), "start", more=' font-weight="600"')
    sheet = f'<rect width="{wide}" height="{high}" fill="{PAPER}"/>{lines}<g transform="translate(0 24)">{body}</g>'
    page = f'{head} font-family="{SANS}" font-size="12">{sheet}</svg>\n'
    return page.replace("currentColor", INK).replace("var(--page)", PAPER).replace("var(--panel)", PANEL)


def swatch(look: Look) -> str:
    """The shape of a series, as the legend shows it."""
    return f'<svg viewBox="-1.5 -1.5 3 3" aria-hidden="true">{_outline(look, 1.0)}</svg>'


def whisker(mean: float, ends: tuple[float, float] | None, axis: Axis, chance: float | None, look: Look) -> str:
    """A value with its interval on the axis that all rows of a table share, 120 x 16; `chance` is a dashed line."""
    place = lambda value: f"{6 + 108 * axis.share(value):.1f}"
    parts = ['<path d="M6 8H114" stroke="currentColor" stroke-opacity=".15"/>']
    if chance is not None and axis.low <= chance <= axis.high:
        at = place(chance)
        parts.append(f'<path d="M{at} 1V15" stroke="currentColor" stroke-opacity=".5" stroke-dasharray="2 2"/>')
    if ends:
        low, high = map(place, ends)
        parts.append(f'<path d="M{low} 8H{high}M{low} 4.5V11.5M{high} 4.5V11.5" stroke="{look.colour}" fill="none"/>')
    parts.append(_shape(look, float(place(mean)), 8, 4))
    return f'<svg class="whisker" viewBox="0 0 120 16" aria-hidden="true">{"".join(parts)}</svg>'


# ---- the drawing ------------------------------------------------------------------------------------------------


class _Frame:
    """Where the values of a plot's axes lie on its paper."""

    def __init__(self, plot: Plot) -> None:
        widest = max((len(_cut(label, LETTERS)) for _, label in plot.y.ticks), default=0)
        self.left, self.right = 14 + 6.6 * widest, WIDTH - 14
        self.top, self.bottom = 8.0, plot.height - (40 if plot.x.title else 24)
        self.plot = plot

    def x(self, value: float) -> float:
        return self.left + (self.right - self.left) * self.plot.x.share(value)

    def y(self, value: float) -> float:
        return self.bottom - (self.bottom - self.top) * self.plot.y.share(value)


def _drawing(plot: Plot, looks: Sequence[Look]) -> str:
    frame = _Frame(plot)
    return "".join([*_axes(plot, frame), *(_mark(mark, frame, looks) for mark in plot.marks)])


def _axes(plot: Plot, frame: _Frame) -> list[str]:
    parts = []
    for value, label in plot.y.ticks:
        y = frame.y(value)
        parts.append(_text(frame.left - 7, y + 4, _cut(label, LETTERS), "end"))
        if plot.y.grid:
            parts.append(_stroke(f"M{frame.left:.1f} {y:.1f}H{frame.right:.1f}", 0.13))
    after = -math.inf
    for value, label in sorted(plot.x.ticks):
        x, half = frame.x(value), 3.3 * len(label)
        if x - half < after:  # it would lie on its neighbour
            continue
        after = x + half + 6
        parts.append(_text(min(x, WIDTH - half - 1), frame.bottom + 17, label, "middle"))
        parts.append(_stroke(f"M{x:.1f} {frame.bottom:.1f}v4", 0.4))
    parts.append(_stroke(f"M{frame.left:.1f} {frame.bottom:.1f}H{frame.right:.1f}", 0.4))
    if plot.x.title:
        parts.append(_text((frame.left + frame.right) / 2, plot.height - 5, plot.x.title, "middle"))
    return parts


def _mark(mark: Mark, frame: _Frame, looks: Sequence[Look]) -> str:
    match mark:
        case Line(series, xs, ys, faint):
            dash = ' stroke-dasharray="5 3"' if looks[series].hollow and not faint else ""
            how = 'stroke-width="1" stroke-opacity=".22"' if faint else f'stroke-width="2"{dash}'
            colour = looks[series].colour
            return f'<path data-s="{series}" d="{_path(frame, xs, ys)}" fill="none" stroke="{colour}" {how}/>'
        case Band(series, xs, lows, highs):
            path = _path(frame, [*xs, *xs[::-1]], [*highs, *lows[::-1]])
            return f'<path data-s="{series}" d="{path}Z" fill="{looks[series].colour}" fill-opacity=".13"/>'
        case Front(xs, ys):
            return (
                f'<path d="{_path(frame, xs, ys)}" fill="none" stroke="currentColor" stroke-opacity=".45" '
                'stroke-width="1.2"/>'
            )
        case Rule():
            return _rule(mark, frame, looks)
        case Dot():
            return _dot(mark, frame, looks[mark.series])


def _rule(mark: Rule, frame: _Frame, looks: Sequence[Look]) -> str:
    if mark.axis == "x":
        path = f"M{frame.x(mark.at):.1f} {frame.top:.1f}V{frame.bottom:.1f}"
    else:
        path = f"M{frame.left:.1f} {frame.y(mark.at):.1f}H{frame.right:.1f}"
    colour = "currentColor" if mark.series is None else looks[mark.series].colour
    whose = "" if mark.series is None else f' data-s="{mark.series}"'
    words = f"<title>{_words(mark.words)}</title>" if mark.words else ""
    return (
        f'<g class="point"{whose}>{words}<path d="{path}" stroke="{colour}" stroke-opacity=".7" stroke-width="1.2" '
        'stroke-dasharray="4 4"/></g>'
    )


def _dot(mark: Dot, frame: _Frame, look: Look) -> str:
    x, y, parts = frame.x(mark.x), frame.y(mark.y), []
    if mark.upright:
        low, high = frame.y(mark.upright[0]), frame.y(mark.upright[1])
        parts.append(f"M{x:.1f} {low:.1f}V{high:.1f}M{x - 3:.1f} {low:.1f}h6M{x - 3:.1f} {high:.1f}h6")
    if mark.across:
        low, high = frame.x(mark.across[0]), frame.x(mark.across[1])
        parts.append(f"M{low:.1f} {y:.1f}H{high:.1f}M{low:.1f} {y - 3:.1f}v6M{high:.1f} {y - 3:.1f}v6")
    drawn = f'<path d="{"".join(parts)}" stroke="{look.colour}" stroke-width="1.5"/>' if parts else ""
    if mark.cross:
        drawn += f'<path d="M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8" stroke="{look.colour}" stroke-width="1.8"/>'
    else:
        drawn += _shape(look, x, y, 5)
    if mark.ring:
        drawn += f'<circle cx="{x:.1f}" cy="{y:.1f}" r="9" fill="none" stroke="{look.colour}" stroke-width="1.5"/>'
    # The finger of a reader is wider than a point.
    drawn += f'<circle cx="{x:.1f}" cy="{y:.1f}" r="11" fill="transparent"/>'
    return f'<g class="point" data-s="{mark.series}"><title>{_words(mark.words)}</title>{drawn}</g>'


def _shape(look: Look, x: float, y: float, size: float) -> str:
    return f'<g transform="translate({x:.1f} {y:.1f}) scale({size})">{_outline(look, size)}</g>'


def _outline(look: Look, size: float) -> str:
    """A filled shape has a rim, so that of two on each other both can be seen."""
    fill, rim, wide = ("var(--page)", look.colour, 0.36) if look.hollow else (look.colour, "var(--page)", 1 / size)
    return f'<path d="{look.shape}" fill="{fill}" stroke="{rim}" stroke-width="{min(wide, 0.36):.2g}"/>'


def _path(frame: _Frame, xs: Sequence[float], ys: Sequence[float]) -> str:
    """A line through points, in steps of a tenth of a pixel; each but the first is told from the one before it, which
    makes half as many letters."""
    points = [(round(10 * frame.x(x)), round(10 * frame.y(y))) for x, y in zip(xs, ys, strict=True)]
    steps = [(x - before_x, y - before_y) for (before_x, before_y), (x, y) in itertools.pairwise(points)]
    (x, y), between = points[0], lambda at: "" if at < 0 else " "
    return f"M{x / 10:g} {y / 10:g}" + "".join(f"l{across / 10:g}{between(up)}{up / 10:g}" for across, up in steps)


def _words(text: str) -> str:
    """Lines of text, each harmless."""
    return html.escape("\n".join(map(human.plain, text.split("\n"))))


def _stroke(path: str, opacity: float) -> str:
    return f'<path d="{path}" stroke="currentColor" stroke-opacity="{opacity}" fill="none"/>'


def _text(x: float, y: float, words: str, anchor: str, more: str = "") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="currentColor" fill-opacity=".85"{more}>'
        f"{html.escape(human.plain(words))}</text>"
    )


def _cut(words: str, most: int) -> str:
    return words if len(words) <= most else words[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"
