"""Which key a query may see: predicates on (query index, key index); `algebra.py` combines them.

A pattern is called with integer arrays that broadcast (numpy or jax) and gives booleans: the dense mask of `reference`,
the drawing of `xlab show`, and the mask inside a partly live block all come from this one call. `extent` answers for
whole rectangles of indices at once, so that a layout never evaluates what is wholly live or wholly dead, and `spans`
says which keys come into question at all, so that it never looks at the others.
"""

import dataclasses
import functools
import operator

import numpy as np

from xformers_lab.attention._engine.algebra import (
    DEAD,
    FAR,
    MIXED,
    WHOLE,
    Both,
    Either,
    Not,
    Pattern,
    Spans,
    everything,
    settled,
)
from xformers_lab.attention._engine.order import NATURAL, Chosen, Order, Remainders, Runs, Tiles

__all__ = ["DEAD", "MIXED", "WHOLE", "Both", "Either", "Not", "Pattern"]
# No two positions are so far apart.
FARTHEST = 1 << 29


@dataclasses.dataclass(frozen=True)
class Measured(Pattern):
    """A pattern of sizes and distances: beyond the farthest position they count as that far, for predicates are
    computed in int32."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, min(getattr(self, field.name), FARTHEST))


@dataclasses.dataclass(frozen=True)
class All(Pattern):
    """Every query sees every key."""

    def __call__(self, q, k):
        return (q == q) & (k == k)

    def extent(self, q_low, q_high, k_low, k_high):
        return super().extent(q_low, q_high, k_low, k_high) * 0 + WHOLE


@dataclasses.dataclass(frozen=True)
class Causal(Pattern):
    """No query sees a later key."""

    def __call__(self, q, k):
        return k <= q

    def extent(self, q_low, q_high, k_low, k_high):
        return settled(k_low <= q_high, k_high <= q_low)

    def spans(self, low, high):
        return [(everything(low)[0], high)]


@dataclasses.dataclass(frozen=True)
class Band(Measured):
    """Keys at most `width` positions away, on both sides."""

    width: int

    def __call__(self, q, k):
        return abs(q - k) <= self.width

    def extent(self, q_low, q_high, k_low, k_high):
        return _apart(q_low, q_high, k_low, k_high, self.width, self.width)

    def spans(self, low, high):
        return [(low - self.width, high + self.width)]


@dataclasses.dataclass(frozen=True)
class Blocks(Measured):
    """Keys whose run of `size` positions is at most `before` runs before the query's, or `after` runs after it."""

    size: int
    before: int
    after: int

    def __call__(self, q, k):
        ahead = k // self.size - q // self.size
        return (ahead <= self.after) & (-ahead <= self.before)

    def extent(self, q_low, q_high, k_low, k_high):
        return _apart(
            q_low // self.size, q_high // self.size, k_low // self.size, k_high // self.size, self.before, self.after
        )

    def spans(self, low, high):
        return [((low // self.size - self.before) * self.size, (high // self.size + self.after + 1) * self.size - 1)]


@dataclasses.dataclass(frozen=True)
class BlockLocal(Measured):
    """Keys in the same run of `size` consecutive positions."""

    size: int

    def __call__(self, q, k):
        return q // self.size == k // self.size

    def extent(self, q_low, q_high, k_low, k_high):
        return Blocks(self.size, 0, 0).extent(q_low, q_high, k_low, k_high)

    def spans(self, low, high):
        return Blocks(self.size, 0, 0).spans(low, high)


@dataclasses.dataclass(frozen=True)
class Residue(Measured):
    """Keys a whole multiple of `stride` away."""

    stride: int

    @property
    def order(self):
        return _remainders(self.stride)

    def __call__(self, q, k):
        return (q - k) % self.stride == 0

    def extent(self, q_low, q_high, k_low, k_high):
        least, most = q_low - k_high, q_high - k_low
        possible = most // self.stride * self.stride >= least
        return settled(possible, possible & ((least == most) | (self.stride == 1)))

    def state(self, q, k):
        if q.order == k.order == self.order != NATURAL:
            return np.where((q.low - k.low) % self.stride == 0, WHOLE, DEAD).astype(np.int8)
        return super().state(q, k)


@dataclasses.dataclass(frozen=True)
class Global(Measured):
    """The `tokens` positions from `start` on see every key (queries) and are seen by every query (keys)."""

    tokens: int
    queries: bool = True
    keys: bool = True
    start: int = 0

    def _chosen(self, at):
        return (at >= self.start) & (at < self.start + self.tokens)

    def __call__(self, q, k):
        seeing = self._chosen(q) if self.queries else q != q
        seen = self._chosen(k) if self.keys else k != k
        return seeing | seen

    def extent(self, q_low, q_high, k_low, k_high):
        stop = self.start + self.tokens
        shape = np.broadcast_shapes(*map(np.shape, (q_low, q_high, k_low, k_high)))
        possible, certain = np.zeros(shape, bool), np.zeros(shape, bool)
        for wanted, low, high in ((self.queries, q_low, q_high), (self.keys, k_low, k_high)):
            if wanted:
                possible = possible | (low < stop) & (high >= self.start)
                certain = certain | (low >= self.start) & (high < stop)
        return settled(possible, certain)

    def spans(self, low, high):
        stop = self.start + self.tokens
        first, last = everything(low)
        all_keys = self.queries & (low < stop) & (high >= self.start)
        few = (self.start, stop - 1) if self.keys else (FAR, -FAR)
        return [(np.where(all_keys, first, few[0]), np.where(all_keys, last, few[1]))]


@dataclasses.dataclass(frozen=True)
class Random(Pattern):
    """For each run of `size` queries, `count` random runs of `size` keys out of the first `blocks` runs.

    The runs are cut into `count` shares of (nearly) equal size and one is drawn from each, so that the draws differ.
    before: only runs up to the query's own are drawn from, as causal attention wants. A draw is a hash of indices.
    """

    size: int
    count: int
    blocks: int
    seed: int = 0
    before: bool = False

    def __call__(self, q, k):
        run, drawn = q // self.size, k // self.size
        among = self._among(run)
        return (drawn == self._draw(run, drawn * self.count // among)) & (drawn >= 0) & (drawn < among)

    def _among(self, run):
        """From how many runs those of a query's run are drawn."""
        return (run + 1).clip(1, self.blocks) if self.before else run * 0 + self.blocks

    def _draw(self, run, share):
        """The run of keys drawn from a share; where the share is empty, one that belongs to another."""
        among = self._among(run)
        first, stop = -(-share * among // self.count), -(-(share + 1) * among // self.count)
        return first + hashed(run, share, self.seed, stop - first)

    def extent(self, q_low, q_high, k_low, k_high):
        single = (q_low // self.size == q_high // self.size) & (k_low // self.size == k_high // self.size)
        possible = (k_high >= 0) & (k_low < self.size * self.blocks)
        if self.before:
            possible = possible & (k_low // self.size <= self._among(q_high // self.size))
        drawn = single & self(q_low, k_low)
        return settled(possible & (drawn | ~single), drawn)

    def spans(self, low, high):
        first, last = low // self.size, high // self.size
        most = int((last - first).max(initial=0)) + 1
        if most * self.count >= self.blocks:
            return [everything(low)]
        found: Spans = []
        for further in range(most):
            run = np.minimum(first + further, last)
            for share in range(self.count):
                drawn = self._draw(run, run * 0 + share) * self.size
                found.append((drawn, drawn + self.size - 1))
        return found


def hashed(a, b, seed: int, below):
    """A number from 0 to below - 1 (0 where below < 1) for every pair of integers: the same with numpy and with jax."""
    word = lambda x: x.astype(np.uint32)
    with np.errstate(over="ignore"):  # numpy warns where numbers without axes wrap around
        mixed = word(a) * np.uint32(0x9E3779B1) ^ word(b) * np.uint32(0x85EBCA6B) ^ np.uint32(seed * 0xC2B2AE35 % 2**32)
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            mixed = (mixed ^ mixed >> np.uint32(shift)) * np.uint32(factor)
        mixed = mixed ^ mixed >> np.uint32(16)
    return (mixed % word(below.clip(1))).astype(below.dtype)


@dataclasses.dataclass(frozen=True)
class Summaries(Measured):
    """The last `count` positions of every run of `stride`, seen by every query."""

    stride: int
    count: int

    @property
    def order(self):
        return Chosen(self.stride, self.count) if self.count < self.stride else NATURAL

    def __call__(self, q, k):
        return (k % self.stride >= self.stride - self.count) & (q == q)

    def extent(self, q_low, q_high, k_low, k_high):
        start, least = k_low // self.stride * self.stride, self.stride - self.count
        certain = (k_low >= start + least) & (k_high < start + self.stride) | (self.count >= self.stride)
        return settled((k_high >= start + least) & (q_low == q_low), certain & (q_low == q_low))

    def state(self, q, k):
        found = super().state(q, k)
        return found * 0 + WHOLE if k.order == self.order else found


@dataclasses.dataclass(frozen=True)
class Local2D(Measured):
    """On a grid of `columns`, row by row: keys at most `height` rows and `width` columns away."""

    columns: int
    height: int
    width: int

    @property
    def order(self):
        """Tiles of 8 x 8 where so many fewer keys come with the blocks that are live, as on a wide grid."""
        tiles = 64 * (1 + 2 * -(-self.height // 8)) * (1 + 2 * -(-self.width // 8))
        rows = 2 * self.height + max(1, -(-64 // self.columns))
        natural = rows * min(self.columns, 64 * (1 + 2 * -(-self.width // 64)))
        return Tiles(self.columns, 8, 8) if tiles < natural and self.columns >= 8 else NATURAL

    def __call__(self, q, k):
        rows, columns = q // self.columns - k // self.columns, q % self.columns - k % self.columns
        return (abs(rows) <= self.height) & (abs(columns) <= self.width)

    def extent(self, q_low, q_high, k_low, k_high):
        return self.state(Runs(NATURAL, q_low, q_high), Runs(NATURAL, k_low, k_high))

    def state(self, q, k):
        return _on_grid(q, k, self.columns, (1, 1), (self.height, self.width))

    def spans(self, low, high):
        away = self.height * self.columns + min(self.width, self.columns)
        return [(low - away, high + away)]


class Composed(Pattern):
    """A pattern that is another one under its own name: `same()`."""

    def same(self) -> Pattern:
        raise NotImplementedError

    @property
    def order(self) -> Order:
        return self.same().order

    def __call__(self, q, k):
        return self.same()(q, k)

    def extent(self, *bounds):
        return self.same().extent(*bounds)

    def state(self, q, k):
        return self.same().state(q, k)

    def spans(self, low, high):
        return self.same().spans(low, high)

    def parts(self):
        return self.same().parts()


@dataclasses.dataclass(frozen=True)
class Dilated(Composed):
    """Keys a multiple of `dilation` away, at most `width` of them on each side."""

    width: int
    dilation: int

    def same(self):
        reach = Band(self.width * self.dilation)
        return reach & Residue(self.dilation) if self.dilation > 1 else reach


@dataclasses.dataclass(frozen=True)
class Fixed(Composed):
    """Keys in the query's own run of `stride` positions, and the last `summary` positions of every run."""

    stride: int
    summary: int

    def same(self):
        return BlockLocal(self.stride) | Summaries(self.stride, self.summary)


@dataclasses.dataclass(frozen=True)
class Tree(Composed):
    """Keys at most `width` away, and beyond that the last position of every span of 2, 4, 8, ... positions.

    Spans double where the distance does, `levels` times: the view a query of BP-Transformer has, one position for a
    span.
    """

    width: int
    levels: int

    def _levels(self) -> list[Pattern]:
        rings = [
            Band(self.width * 2**level) & ~Band(self.width * 2 ** (level - 1)) & Summaries(2**level, 1)
            for level in range(1, min(self.levels, FARTHEST.bit_length()) + 1)
        ]
        return [Band(self.width), *rings]

    def same(self):
        return functools.reduce(operator.or_, self._levels())

    def parts(self):
        return self._levels()  # distances differ, so they are disjoint


def _remainders(step: int) -> Order:
    return Remainders(step) if step > 1 else NATURAL


def _apart(q_low, q_high, k_low, k_high, before: int, after: int):
    """The extent of key - query between -before and after."""
    possible = (k_low - q_high <= after) & (q_low - k_high <= before)
    certain = (k_high - q_low <= after) & (q_high - k_low <= before)
    return settled(possible, certain)


def _on_grid(q: Runs, k: Runs, columns: int, tile: tuple[int, int], reach: tuple[int, int]):
    """The extent of tiles at most reach[0] apart vertically and reach[1] horizontally."""
    bounds = [(run.low // columns // tile[0], run.high // columns // tile[0]) for run in (q, k)]
    sides = [(low // tile[1], high // tile[1]) for low, high in (_sides(run, columns) for run in (q, k))]
    vertical, horizontal = (
        _apart(*q_bounds, *k_bounds, most, most)
        for (q_bounds, k_bounds), most in zip((bounds, sides), reach, strict=True)
    )
    return np.minimum(vertical, horizontal)


def _sides(run: Runs, columns: int):
    """The first and the last column that a run of positions touches."""
    inside = isinstance(run.order, Tiles) and run.order.columns == columns
    if inside and run.left is not None and run.right is not None:
        return run.left, run.right
    one_row = run.low // columns == run.high // columns
    return np.where(one_row, run.low % columns, 0), np.where(one_row, run.high % columns, columns - 1)
