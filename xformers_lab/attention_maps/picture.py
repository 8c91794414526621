"""Heads as heat maps: a row is a query, a column a key. What a query may not look at is left blank.

A shade is the square root of a weight over the greatest of its head, so that weak ones show; of queries that may look
at one key alone, whose weight is always the whole, none counts as the greatest. A map is one path for each shade of
each sign, so that a page of them stays small.
"""

import html

import numpy as np

from xformers_lab import drawing
from xformers_lab.attention_maps import table
from xformers_lab.attention_maps.maps import AttentionMaps
from xformers_lab.report import human
from xformers_lab.report.plot import INK, PAPER

# Shades beside blank; weights below half a shade are not drawn.
SHADES = 8
# Rows and columns of a head in a file, and in a notebook.
SIDE, INLINE = 256, 64
# Weights below 0, in a file and on a page.
NEGATIVE = "#a8321a"
# What a query may look at.
GROUND = 0.08
# How a token is cut, and the least height of a row that has room for one.
LETTERS, LEAST_LABEL = 8, 6.0
LETTER = 5.4
# Blanks that a label would not show.
BLANKS = str.maketrans({" ": "\N{OPEN BOX}", "\n": "\N{RETURN SYMBOL}", "\t": "\N{RIGHTWARDS ARROW TO BAR}"})


def label(token: str) -> str:
    """The text of a token as it is shown: blanks as signs, nothing that steers a terminal or a page."""
    return human.plain(token.translate(BLANKS)) or "\N{EMPTY SET}"


def paths(weights: np.ndarray, seen: np.ndarray) -> str:
    """Weights (T, S) as SVG paths, one unit for a pair, in shades; seen (T, S): the ground."""
    most = greatest(weights, seen) or 1.0
    shades = np.rint(SHADES * np.sign(weights) * np.sqrt(np.minimum(np.abs(weights) / most, 1))).astype(int)
    parts = [f'<path class="ground" fill-opacity="{GROUND}" d="{drawing.path(seen)}"/>']
    for sign, name in ((1, ""), (-1, ' class="negative"')):
        for shade in range(1, SHADES + 1):
            live = shades == sign * shade
            if live.any():
                parts.append(f'<path{name} fill-opacity="{shade / SHADES:.3g}" d="{drawing.path(live)}"/>')
    return "".join(parts)


def greatest(weights: np.ndarray, seen: np.ndarray) -> float:
    """The greatest size of weights (T, S) among queries that have a choice; of all where none has."""
    choosing = seen.sum(-1) > 1
    return float(np.abs(weights[choosing] if choosing.any() else weights).max(initial=0))


def small(weights: np.ndarray, seen: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Both with at most `side` rows and columns: of the pairs that fall together the weight of the greatest size."""
    T, S = weights.shape
    rows, columns = (np.arange(n) * min(n, side) // n for n in (T, S))
    shape = (min(T, side), min(S, side))
    place = (rows[:, None] * shape[1] + columns[None]).ravel()
    high, low, any_seen = np.zeros(shape).ravel(), np.zeros(shape).ravel(), np.zeros(shape, bool).ravel()
    np.maximum.at(high, place, weights.ravel())
    np.minimum.at(low, place, weights.ravel())
    np.logical_or.at(any_seen, place, seen.ravel())
    return np.where(high >= -low, high, low).reshape(shape), any_seen.reshape(shape)


def svg(maps: AttentionMaps, side: int = SIDE) -> str:
    """All heads as a file of its own on white paper, a row of them for each layer, tokens where they have room. Of more
    than `side` rows or columns those that fall together are one, the greatest of them."""
    L, N, T, S = maps.weights.shape
    cell = max(0.8, min(12.0, 260 / max(T, S)))
    labelled = cell >= LEAST_LABEL and max(T, S) <= side
    queries, keys = (list(map(_cut, texts)) for texts in (maps.queries, maps.keys))
    left = 14 + LETTER * (max(map(len, queries)) if labelled else 0)
    above = 8 + LETTER * (max(map(len, keys)) if labelled else 0)
    wide, high, gap = S * cell, T * cell, 16
    width = left + N * (wide + gap)
    top = 30 + above
    height = top + L * (high + 34)
    parts = [_text(left, 16, human.plain(maps.title), "start", 12, ' font-weight="600"')]
    for row, layer in enumerate(maps.layers):
        for place, head in enumerate(maps.heads):
            x, y = left + place * (wide + gap), top + row * (high + 34) + 14
            dead = str(maps.figures.reason[row, place])
            words = f"layer {layer}, head {head}" + (f": {dead}" if dead else "")
            parts.append(_text(x, y - 5 - (above - 8 if labelled and row == 0 else 0), words, "start", 10))
            weights, seen = small(maps.drawn[row, place], maps.seen, side)
            scale = f"{wide / weights.shape[1]:.4g} {high / weights.shape[0]:.4g}"
            drawn = paths(weights, seen)
            parts.append(f'<g transform="translate({x:.1f} {y:.1f}) scale({scale})">{drawn}</g>')
            if labelled and place == 0:
                parts += [_text(x - 4, y + (at + 0.5) * cell + 3, text, "end", 9) for at, text in enumerate(queries)]
            if labelled and row == 0:
                parts += [
                    f'<text transform="translate({x + (at + 0.5) * cell + 3:.1f} {y - 4:.1f}) rotate(-90)" '
                    f'font-size="9">{html.escape(text)}</text>'
                    for at, text in enumerate(keys)
                ]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}"'
    style = (
        f'height="{height:.0f}" fill="{INK}" font-family="Helvetica, Arial, sans-serif" shape-rendering="crispEdges"'
    )
    body = "".join(parts).replace('class="negative"', f'fill="{NEGATIVE}"').replace('class="ground" ', "")
    return f'{head} {style}><rect width="{width:.0f}" height="{height:.0f}" fill="{PAPER}"/>{body}</svg>\n'


def inline(maps: AttentionMaps) -> str:
    """What a notebook shows: the maps, and a table of what the heads do."""
    chosen = table.columns([maps])
    rows = table.texts(maps, chosen)
    cells = lambda texts, tag: "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts)
    heads, lines = cells(rows[0], "th"), "".join(f"<tr>{cells(row.values(), 'td')}</tr>" for row in rows)
    words = [table.summary(maps), *maps.notes, *([table.IMPLIED] if any(maps.implied) else [])]
    said = "".join(f"<p>{html.escape(human.plain(sentence))}</p>" for sentence in words)
    return f"<div>{svg(maps, INLINE)}{said}<table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>"


def _cut(token: str) -> str:
    text = label(token)
    return text if len(text) <= LETTERS else text[: LETTERS - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _text(x: float, y: float, words: str, anchor: str, size: int, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"{more}>{html.escape(words)}</text>'
