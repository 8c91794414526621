"""Pictures of a pattern, made by the predicate that runs: a row is a query, a column a key."""

from collections.abc import Callable

import numpy as np

# Rows and columns of a picture; longer sequences are sampled evenly, first and last position included.
SIDE = 64


def sampled(pattern: Callable, length: int, side: int = SIDE) -> np.ndarray:
    """(n, n) booleans, n = min(length, side): which keys the queries see, at evenly spaced positions, of a pattern or
    another function of query and key positions."""
    at = np.unique(np.linspace(0, length - 1, min(length, side)).round().astype(int))
    return np.broadcast_to(np.asarray(pattern(at[:, None], at[None])), (len(at), len(at)))


def lines(seen: np.ndarray) -> list[str]:
    """One text line for each query, full where it may look."""
    return ["".join("█" if one else "·" for one in row) for row in seen]


def path(seen: np.ndarray) -> str:
    """The live pairs as data of an SVG path, one unit for a pair: neighbours of a row are one rectangle."""
    rectangles = []
    for y, row in enumerate(seen):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(np.int8), [0]])))
        rectangles += [f"M{x} {y}h{stop - x}v1h{x - stop}z" for x, stop in edges.reshape(-1, 2)]
    return "".join(rectangles)


def svg(seen: np.ndarray) -> str:
    """A file of its own, which scales to any size."""
    n = len(seen)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-1 -1 {n + 2} {n + 2}" width="{8 * n}" height="{8 * n}">'
        f'<rect x="-1" y="-1" width="{n + 2}" height="{n + 2}" fill="white"/>'
        f'<rect width="{n}" height="{n}" fill="#e8ecf0"/><path d="{path(seen)}" fill="#0072b2"/></svg>\n'
    )
