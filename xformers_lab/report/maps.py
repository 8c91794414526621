"""Attention weights of one test example as heat maps: heads and layers side by side, full attention first.

A map is one path for each shade, so that a page of them stays small and needs no picture from outside.
"""

import html
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from xformers_lab import drawing
from xformers_lab.report import human, plot, rows

# Shades beside white; weights below half a shade are not drawn.
SHADES = 8
# What a record writes for a weight of 1.
WHOLE = 255
# Letters of all maps of a page, and tokens of the greatest that is drawn.
BUDGET = 450_000
MOST_TOKENS = 96
# Rows named beside one reason why they have no maps.
MOST_NAMES = 6
# How a label is cut, and the width of one letter of it in the map's own units.
LETTERS, LETTER = 8, 5.4


class Picture(NamedTuple):
    """The map of one head as the inside of an SVG of this size; layer, head: from 0."""

    layer: int
    head: int
    width: float
    height: float
    drawn: str

    @property
    def label(self) -> str:
        return f"layer {self.layer + 1}, head {self.head + 1}"


class Shown(NamedTuple):
    """The maps of one series: its number, and a picture for each layer and head."""

    series: int
    name: str
    note: str
    pictures: list[Picture]


class Maps(NamedTuple):
    """What a group shows of its maps, the names of those for which there was no room, and a sentence for each reason
    why rows have none."""

    note: str
    shown: list[Shown]
    left_out: list[str]
    missing: list[str]


def of_group(group: rows.Group, names: Sequence[str], varied: Sequence[str], budget: int = BUDGET) -> Maps | None:
    """The maps of each series at the shortest length that has any, of the first seed; full attention first. None where
    no row has one, or says why it has none."""
    kept = [(row, found) for row in group.rows if rows.ok(row) and (found := _read(row.get("maps"))) is not None]
    missing = _missing(group, varied)
    if not kept:
        return Maps("", [], [], missing) if missing else None
    length = min(rows.length(row) or 0 for row, _ in kept)
    first: dict[str, tuple[Mapping, dict]] = {}
    for row, found in kept:
        if (rows.length(row) or 0) == length:
            first.setdefault(rows.series(row, varied), (found, row))
    ranked = sorted(first, key=lambda name: (not _full(first[name][1]), names.index(name)))
    tokens = [found["tokens"] for found, _ in first.values()]
    shown, left_out = [], []
    for name in ranked:
        found = first[name][0]
        pictures = [
            _picture(layer, head, weights, found["queries"], found["tokens"])
            for layer, heads in enumerate(found["layers"])
            for head, weights in enumerate(heads)
        ]
        size = sum(len(picture.drawn) for picture in pictures)
        if size > budget:
            left_out.append(name)
            continue
        budget -= size
        note = "effective weights, since it has no scores" if found["implied"] else "its weights"
        shown.append(Shown(names.index(name), name, note, pictures))
    same = "one test example" if all(one == tokens[0] for one in tokens) else "a test example, not the same for all"
    at = f" of {length:,} tokens" if length else ""
    note = (
        f"Of {same}{at}. A row is a query, a column a key; the strongest shade is the greatest weight of its head, in "
        f"{SHADES} shades."
    )
    return Maps(note, shown, left_out, missing)


def svg(picture: Picture, name: str) -> str:
    """A map of the series of that name as an element of a page."""
    words = html.escape(f"Attention weights of {human.plain(name)}, {picture.label}")
    wide, high = f"{picture.width:.0f}", f"{picture.height:.0f}"
    return (
        f'<svg class="map" width="{wide}" height="{high}" viewBox="0 0 {wide} {high}" role="img" aria-label="{words}" '
        f'font-size="9">{picture.drawn}</svg>'
    )


def file(shown: Shown, title: str) -> str:
    """The maps of a series as a file of its own: a row for each layer, a column for each head."""
    wide, high = max(one.width for one in shown.pictures), max(one.height for one in shown.pictures)
    placed = []
    for one in shown.pictures:
        x, y = 10 + one.head * (wide + 14), one.layer * (high + 26)
        label = f'<text x="{x:.0f}" y="{y + 10:.0f}">{one.label}</text>'
        placed.append(f'{label}<g transform="translate({x:.0f} {y + 16:.0f})" font-size="9">{one.drawn}</g>')
    heads, layers = 1 + max(one.head for one in shown.pictures), 1 + max(one.layer for one in shown.pictures)
    return plot.paper(20 + heads * (wide + 14), layers * (high + 26), title, "".join(placed))


def _missing(group: rows.Group, varied: Sequence[str]) -> list[str]:
    """Which rows have no maps, by the reason that they give or that drawing them has."""
    reasons: dict[str, list[str]] = {}
    for row in group.rows:
        maps = row.get("maps")
        if not rows.ok(row) or not isinstance(maps, Mapping):
            continue
        tokens = maps.get("tokens")
        reason = maps.get("reason")
        if isinstance(tokens, list | tuple) and len(tokens) > MOST_TOKENS:
            reason = f"a page has room for maps of at most {MOST_TOKENS} tokens"
        if isinstance(reason, str) and reason:
            at = f" at {rows.length(row):,} tokens" if rows.length(row) else ""
            reasons.setdefault(human.plain(reason), []).append(f"{rows.series(row, varied)}{at}")
    return [f"{human.listing(list(dict.fromkeys(names)), MOST_NAMES)}: {reason}." for reason, names in reasons.items()]


def _full(row: dict) -> bool:
    return str(rows.value(row, "attention")).partition(":")[0] == "full" and rows.role(row) == "variant"


def _read(maps: object) -> dict | None:
    """The field of a row as arrays (heads, queries, keys) for each layer; None for what cannot be drawn."""
    if not isinstance(maps, Mapping) or not isinstance(maps.get("layers"), list | tuple):
        return None
    tokens = _texts(maps.get("tokens"))
    layers = []
    for layer in maps["layers"]:
        try:
            weights = np.asarray(layer, dtype=float)
        except (TypeError, ValueError, OverflowError):
            return None
        if weights.ndim != 3 or not ((weights >= 0) & (weights <= WHOLE)).all() or max(weights.shape[1:]) > MOST_TOKENS:
            return None
        if not weights.size or weights.shape[2] != len(tokens):
            return None
        layers.append(weights)
    if not layers:
        return None
    rows_of = layers[0].shape[1]
    queries = _texts(maps.get("queries"))
    if len(queries) != rows_of:
        queries = tokens if len(tokens) == rows_of else [str(at) for at in range(rows_of)]
    if any(layer.shape[1:] != layers[0].shape[1:] for layer in layers):
        return None
    return {"tokens": tokens, "queries": queries, "layers": layers, "implied": bool(maps.get("implied"))}


def _texts(value: object) -> list[str]:
    return [human.plain(word) for word in value] if isinstance(value, list | tuple) else []


def _picture(layer: int, head: int, weights: np.ndarray, queries: Sequence[str], keys: Sequence[str]) -> Picture:
    """(queries, keys) weights drawn, with as many labels of tokens as have room."""
    height, width = weights.shape
    cell = max(5.0, min(14.0, 300 / max(height, width)))
    shades = np.rint(SHADES * weights / (weights.max() or 1.0)).astype(int)
    label = lambda word: word if len(word) <= LETTERS else word[: LETTERS - 1] + "\N{HORIZONTAL ELLIPSIS}"
    left = 6 + LETTER * max((len(label(word)) for word in queries), default=0)
    top = 6 + LETTER * max((len(label(word)) for word in keys), default=0)
    step = max(1, round(10 / cell))
    size = f'width="{width * cell:.0f}" height="{height * cell:.0f}"'
    parts = [f'<g fill="currentColor"><rect x="{left:.0f}" y="{top:.0f}" {size} fill="var(--panel)"/>']
    parts.append(f'<g transform="translate({left:.0f} {top:.0f}) scale({cell:.4g})" shape-rendering="crispEdges">')
    for shade in range(1, SHADES + 1):
        seen = shades == shade
        if seen.any():
            parts.append(f'<path fill-opacity="{shade / SHADES:.3g}" d="{drawing.path(seen)}"/>')
    parts.append("</g>")
    for at in range(0, height, step):
        y = top + (at + 0.5) * cell + 3
        parts.append(f'<text x="{left - 4:.0f}" y="{y:.1f}" text-anchor="end">{html.escape(label(queries[at]))}</text>')
    for at in range(0, width, step):
        x = left + (at + 0.5) * cell + 3
        turn = f'transform="translate({x:.1f} {top - 4:.0f}) rotate(-90)"'
        parts.append(f"<text {turn}>{html.escape(label(keys[at]))}</text>")
    drawn = "".join([*parts, "</g>"])
    return Picture(layer, head, left + width * cell + 2, top + height * cell + 2, drawn)
