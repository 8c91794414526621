"""Which key a query may see: predicates on (query index, key index); `algebra.py` combines them.

A pattern is called with integer arrays that broadcast (numpy or jax) and gives booleans: the dense mask of `reference`,
the drawing of `xlab show`, and the mask inside a partly live block all come from this one call. `state` answers for
whole blocks of indices at once, so that a layout never evaluates what is wholly live or wholly dead, and `spans` says
which keys come into question at all, so that it never looks at the others.
"""

import dataclasses
import functools
import operator

import numpy as np

from xformers_lab.attention._engine.algebra import DEAD, FAR, WHOLE, Pattern, everything, settled
from xformers_lab.attention._engine.order import NATURAL, Chosen, Order, Remainders, Runs, Tiles

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

    def state(self, q, k):
        return super().state(q, k) * 0 + WHOLE


@dataclasses.dataclass(frozen=True)
class Causal(Pattern):
    """No query sees a later key."""

    def __call__(self, q, k):
        return k <= q

    def state(self, q, k):
        return settled(k.low <= q.high, k.high <= q.low)

    def spans(self, low, high):
        return [(everything(low)[0], high)]


@dataclasses.dataclass(frozen=True)
class Band(Measured):
    """Keys at most `width` positions away, on both sides."""

    width: int

    def __call__(self, q, k):
        return abs(q - k) <= self.width

    def state(self, q, k):
        return _apart((q.low, q.high), (k.low, k.high), self.width, self.width)

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

    def state(self, q, k):
        q_run, k_run = ((at.low // self.size, at.high // self.size) for at in (q, k))
        return _apart(q_run, k_run, self.before, self.after)

    def spans(self, low, high):
        return [((low // self.size - self.before) * self.size, (high // self.size + self.after + 1) * self.size - 1)]


@dataclasses.dataclass(frozen=True)
class Residue(Measured):
    """Keys a whole multiple of `stride` away."""

    stride: int

    @property
    def order(self):
        return Remainders(self.stride) if self.stride > 1 else NATURAL

    def __call__(self, q, k):
        return (q - k) % self.stride == 0

    def state(self, q, k):
        if q.order == k.order == self.order != NATURAL:
            return np.where((q.low - k.low) % self.stride == 0, WHOLE, DEAD).astype(np.int8)
        least, most = q.low - k.high, q.high - k.low
        possible = most // self.stride * self.stride >= least
        return settled(possible, possible & ((least == most) | (self.stride == 1)))


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

    def state(self, q, k):
        possible = certain = (q.low != q.low) | (k.low != k.low)
        for counts, at in ((self.queries, q), (self.keys, k)):
            if counts:
                possible = possible | (at.low < self.start + self.tokens) & (at.high >= self.start)
                certain = certain | (at.low >= self.start) & (at.high < self.start + self.tokens)
        return settled(possible, certain)

    def spans(self, low, high):
        stop = self.start + self.tokens
        first, last = everything(low)
        all_keys = self.queries & (low < stop) & (high >= self.start)
        few = (self.start, stop - 1) if self.keys else (FAR, -FAR)
        return [(np.where(all_keys, first, few[0]), np.where(all_keys, last, few[1]))]


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

    def state(self, q, k):
        if k.order == self.order:  # of chosen keys alone, or where every key is one
            return super().state(q, k) * 0 + WHOLE
        start, least = k.low // self.stride * self.stride, self.stride - self.count
        certain = (k.low >= start + least) & (k.high < start + self.stride) | (self.count >= self.stride)
        return settled((k.high >= start + least) & (q.low == q.low), certain & (q.low == q.low))


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

    def state(self, q, k):
        q_rows, k_rows = ((at.low // self.columns, at.high // self.columns) for at in (q, k))
        rows = _apart(q_rows, k_rows, self.height, self.height)
        return np.minimum(rows, _apart(_sides(q, self.columns), _sides(k, self.columns), self.width, self.width))

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

    def state(self, q, k):
        return self.same().state(q, k)

    def spans(self, low, high):
        return self.same().spans(low, high)

    def parts(self):
        return self.same().parts()


@dataclasses.dataclass(frozen=True)
class BlockLocal(Composed):
    """Keys in the same run of `size` consecutive positions."""

    size: int

    def same(self):
        return Blocks(self.size, 0, 0)


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


def _apart(q, k, before: int, after: int):
    """The state of key - query between -before and after, from the first and the last of both."""
    possible = (k[0] - q[1] <= after) & (q[0] - k[1] <= before)
    certain = (k[1] - q[0] <= after) & (q[1] - k[0] <= before)
    return settled(possible, certain)


def _sides(run: Runs, columns: int):
    """The first and the last column that a run of positions touches."""
    inside = isinstance(run.order, Tiles) and run.order.columns == columns
    if inside and run.left is not None and run.right is not None:
        return run.left, run.right
    one_row = run.low // columns == run.high // columns
    return np.where(one_row, run.low % columns, 0), np.where(one_row, run.high % columns, columns - 1)
