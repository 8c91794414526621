"""Pictures of what the compared mechanisms look at, where a fixed pattern of positions says it.

A row only names what ran. Nothing is imported that its names point to outside of the package: a report draws what the
laboratory itself has, and what this process had imported before.
"""

import html
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from xformers_lab import drawing, shelves, spec
from xformers_lab.errors import LabError
from xformers_lab.nn.size import Size
from xformers_lab.report import human, plot, rows

# Pictures on one page; each has some kilobytes.
MOST = 24
MOST_HEADS, GREATEST = 256, 2**20
SIDE = 360  # of a picture in a file of its own
# Lengths to try where those of the rows show no difference: first such of which every position is drawn.
LENGTHS = (64, 32, 16, 128, 256, 512, 1024, 2048, 4096)


class Figure(NamedTuple):
    """The picture of one mechanism: an SVG path in a square of `side` units."""

    name: str
    note: str
    side: int
    path: str


class _Kind(NamedTuple):
    """What is drawn once: a mechanism, which way it looks, its heads, and rows and columns of an image."""

    name: str
    causal: bool
    heads: int
    plane: tuple[int, int] | None


def figures(cells: Sequence[dict]) -> list[Figure]:
    """A picture for each mechanism of the rows: all at one length, the shortest at which
    as many as can be look different. An image has the length of its rows."""
    ran: dict[_Kind, set[int]] = {}
    first: dict[_Kind, _Kind] = {}  # of those that differ in their heads alone
    for row in cells:
        for kind, length in _kinds(row):
            ran.setdefault(first.setdefault(kind._replace(heads=0), kind), set()).add(length)
    kinds = list(ran)[:MOST]
    common = _length([kind for kind in kinds if kind.plane is None], ran)
    drawn = []
    for kind in kinds:
        length = min(ran[kind]) if kind.plane is not None or common is None else common
        seen = _seen(kind, length)
        if seen is not None:
            drawn.append(_figure(kind, seen, length, length in ran[kind]))
    return drawn


def left_out(cells: Sequence[dict]) -> list[str]:
    """The mechanisms that are not drawn since they stand outside of the package."""
    names = [name for row in cells for name in _mechanisms(row) if not spec.at_hand("attention", name)]
    return list(dict.fromkeys(map(human.plain, names)))


def _mechanisms(row: dict) -> list[str]:
    attention = rows.value(row, "attention")
    return spec.split(attention, "+") if isinstance(attention, str) and len(attention) < 10_000 else []


def _kinds(row: dict) -> list[tuple[_Kind, int]]:
    """What a row ran, and at which length; empty where it does not tell, or ran on patches of an image, say."""
    length, heads, plane = rows.length(row), human.number(rows.value(row, "heads")), row.get("plane")
    known = [name for name in _mechanisms(row) if spec.at_hand("attention", name)]
    if not known or not length or not heads or not (1 <= heads <= MOST_HEADS and 1 <= length <= GREATEST):
        return []
    model = _model(row)
    if model is not None and not getattr(model, "of_tokens", True):
        return []
    causal = getattr(model, "causal", True)
    grid = None
    if plane is not None:
        sides = [int(side) for side in map(human.number, plane) if side is not None and side >= 1]
        if len(sides) != 2 or sides[0] * sides[1] > GREATEST:
            return []
        grid = sides[0], sides[1]
    return [(_Kind(name, causal, int(heads), grid), length) for name in known]


def _model(row: dict) -> type | None:
    """The class of a row's model: for `auto` the one that its task is made for. None where it is none of the
    package's."""
    kind, task = rows.value(row, "model") or "auto", rows.value(row, "task")
    try:
        if kind == "auto":
            kind = spec.entry("task", spec.parse(task).name).kinds[0] if spec.at_hand("task", str(task)) else "decoder"
        return spec.entry("model", spec.parse(kind).name) if spec.at_hand("model", str(kind)) else None
    except (LabError, AttributeError, IndexError):  # an older task or model
        return None


def _length(kinds: Sequence[_Kind], ran: Mapping[_Kind, set[int]]) -> int | None:
    """The length at which the most pictures differ: the shortest of the rows', or where another tells more apart, the
    first of LENGTHS that does; None where nothing has a picture."""
    lengths = sorted({length for kind in kinds for length in ran[kind]})
    if not lengths:
        return None
    best, most = None, 0
    drawable = [kind for kind in kinds if _seen(kind, lengths[0]) is not None]
    for length in dict.fromkeys([*lengths, *LENGTHS]):
        pictures = [seen for kind in drawable if (seen := _seen(kind, length)) is not None]
        different = len({tuple(one.tobytes() for one in seen) for seen in pictures})
        if len(pictures) == len(drawable) and different > most:
            best, most = length, different
        if most == len({kind.name for kind in drawable}):
            break
    return best


def _seen(kind: _Kind, length: int) -> list[np.ndarray] | None:
    try:
        size = Size(length, dim=kind.heads, heads=kind.heads, plane=kind.plane)
        return shelves.sampled(spec.build("attention", kind.name, size), kind.causal)
    except (LabError, ValueError):
        return None


def file(figure: Figure) -> str:
    """A picture as a file of its own."""
    square = f'<rect width="{figure.side}" height="{figure.side}" fill="var(--panel)"/>'
    drawn = f'{square}<path d="{figure.path}" fill="currentColor"/>'
    scaled = f'<g transform="translate(10 24) scale({SIDE / figure.side:.4g})" shape-rendering="crispEdges">{drawn}</g>'
    note = f'<text x="10" y="14">{html.escape(figure.note)}</text>'
    return plot.paper(SIDE + 20, SIDE + 34, figure.name, f"{note}{scaled}")


def _figure(kind: _Kind, seen: list[np.ndarray], length: int, is_of_rows: bool) -> Figure:
    n, words = len(seen[0]), "causal" if kind.causal else "both sides"
    note = f"{words}, {length:,} positions" + (f", {n} of them drawn" if n < length else "")
    note += "" if is_of_rows else ", a length that did not run"
    note += f", head 1 of {len(seen)}" if len(seen) > 1 else ""
    return Figure(human.plain(kind.name), note, n, drawing.path(seen[0]))
