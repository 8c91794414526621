"""Spans of a binary partition: which of them a position sees, coarser with distance, and windows of them that the
queries of a block share (BP-Transformer: Ye et al., 2019, arXiv 1911.04070)."""

import dataclasses
import functools

import numpy as np

# Queries whose scores are computed together: they share most of the spans they see.
BLOCK = 64


@dataclasses.dataclass(frozen=True, eq=False)
class Window:
    """Spans of 2**level positions that a block of queries looks at: `width` of them from starts[block] on."""

    level: int
    starts: np.ndarray
    width: int
    left: bool
    right: bool


@functools.lru_cache(maxsize=256)
def windows(nodes: int, T: int, S: int, causal: bool) -> tuple[int, tuple[Window, ...]]:
    """Queries per block, and the windows of every level that has spans to see."""
    block, parts = min(BLOCK, T), []
    first = np.arange(S - T, S, block)
    last = np.minimum(first + block, S) - 1
    for level in range(S.bit_length() + 1):
        (low, _, after, _), (_, before, _, high) = reach(nodes, first, level), reach(nodes, last, level)
        whole = window_of(level, S, low, last + 1 if causal else high, left=True, right=not causal)
        left, right = window_of(level, S, low, before, left=True), window_of(level, S, after, high, right=True)
        if level == 0:
            parts.append(whole)
        elif causal:
            parts.append(left)
        else:
            parts += [whole] if whole.width <= left.width + right.width else [left, right]
    return block, tuple(window for window in parts if window.width > 0)


def window_of(level: int, S: int, low, high, *, left: bool = False, right: bool = False) -> Window:
    """Windows that hold spans low..high-1 of every block, as far as they exist, all as wide as the widest."""
    count = (S + (1 << level) - 1) >> level
    low, high = np.maximum(low, 0), np.minimum(high, count)
    width = max(0, int((high - low).max()))
    return Window(level, np.clip(low, 0, count - width).astype(np.int32), width, left, right)


def reach(nodes: int, at, level):
    """Spans of 2**level positions seen by the query at `at`: low..before-1 on its left, after..high-1 on its right.

    A level begins where the one below it ended, and ends where both halves of a coarser span are behind it, so one span
    more than `nodes` may be seen there and one fewer on the next level.
    """
    first = level == 0
    below = level - 1 + first
    left = lambda level: (((at - 1 + nodes) >> level) - 2 * nodes + 1) >> 1
    right = lambda level: (((at + 1 - nodes) >> level) + 2 * nodes + 1) >> 1
    before = first * at + (1 - first) * left(below)
    after = first * (at + 1) + (1 - first) * right(below)
    return 2 * left(level), before, after, 2 * right(level)


def sees(nodes: int, at, index, level, *, left: bool = True, right: bool = False):
    """Whether queries see spans by their index, on the given sides; on level 0 themselves too."""
    low, before, after, high = reach(nodes, at, level)
    seen = (level == 0) & (index == at)
    if left:
        seen |= (index >= low) & (index < before)
    if right:
        seen |= (index >= after) & (index < high)
    return seen
