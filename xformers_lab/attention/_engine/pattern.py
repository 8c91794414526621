"""Which key a query may see: predicates on (query index, key index); `algebra.py` combines them.

A pattern is called with integer arrays that broadcast (numpy or jax) and gives booleans: the dense mask of `reference`,
the drawing of `xlab show`, and the mask inside a partly live block all come from this one call. `state` answers for
whole blocks of indices at once, so that a layout never evaluates what is wholly live or wholly dead, and `spans` says
which keys come into question at all, so that it never looks at the others.
"""

import dataclasses

import numpy as np

from xformers_lab.attention._engine.algebra import DEAD, FAR, WHOLE, Both, Pattern, everything, settled
from xformers_lab.attention._engine.order import NATURAL, Remainders

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
        return apart((q.low, q.high), (k.low, k.high), self.width, self.width)

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
        return apart(q_run, k_run, self.before, self.after)

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


def block_local(size: int) -> Pattern:
    """Keys in the same run of `size` consecutive positions."""
    return Blocks(size, 0, 0)


def dilated_band(width: int, dilation: int) -> Pattern:
    """Keys a multiple of `dilation` away, at most `width` of them on each side."""
    reach = Band(width * dilation)
    return reach & Residue(dilation) if dilation > 1 else reach


def by_distance(pattern: Pattern) -> tuple[bool, int | None] | None:
    """Of a pattern that goes by distance alone, whether it is causal and how far it sees (None: however far): All,
    Causal, a Band, or a causal one. None of any other."""
    if isinstance(pattern, All | Causal):
        return isinstance(pattern, Causal), None
    if isinstance(pattern, Band):
        return False, pattern.width
    if isinstance(pattern, Both):
        band = next((part for part in (pattern.a, pattern.b) if isinstance(part, Band)), None)
        if band is not None and Causal() in (pattern.a, pattern.b):
            return True, band.width
    return None


def apart(q, k, before: int, after: int):
    """The state of key - query between -before and after, from the first and the last of both."""
    possible = (k[0] - q[1] <= after) & (q[0] - k[1] <= before)
    certain = (k[1] - q[0] <= after) & (q[1] - k[0] <= before)
    return settled(possible, certain)
