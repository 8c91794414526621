"""A curve in text: each sign of braille is a grid of 2 x 4 dots."""

import itertools
from collections.abc import Sequence

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # by row and column of a sign
_BLANK = 0x2800


def curve(points: Sequence[tuple[float, float]], last: float, width: int, height: int) -> list[str]:
    """Points (x, y), y finite, as `height` lines of `width` signs, joined by lines.

    x goes from 0 to `last`, y from the least to the greatest; a curve that is level lies in the middle.
    """
    columns, rows = 2 * width, 4 * height
    ys = [y for _, y in points]
    low, high = min(ys, default=0.0), max(ys, default=0.0)
    across = lambda x: min(columns - 1, max(0, round(x / (last or 1) * (columns - 1))))
    down = lambda y: round((high - y) / (high - low) * (rows - 1)) if high > low else rows // 2
    places = [(across(x), down(y)) for x, y in points]
    signs = [[_BLANK] * width for _ in range(height)]
    for (x, y), (to_x, to_y) in itertools.pairwise([*places[:1], *places]):
        steps = max(abs(to_x - x), abs(to_y - y), 1)
        for step in range(steps + 1):
            column, row = round(x + (to_x - x) * step / steps), round(y + (to_y - y) * step / steps)
            signs[row // 4][column // 2] |= _DOTS[row % 4][column % 2]
    return ["".join(map(chr, line)) for line in signs]
