"""The pattern of runs that look at random runs, beside their neighbours and the runs at both ends."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

from xformers_lab.attention._engine.algebra import Pattern, everything, settled


@dataclasses.dataclass(frozen=True)
class RandomBlocks(Pattern):
    """`blocks` runs of `size` positions: a run sees itself, `near` neighbours on each side, `count` random ones out of
    all others, and, of the first and the last `ends` runs, all see and are seen by all."""

    size: int
    blocks: int
    near: int
    ends: int
    count: int
    seed: int
    head: int = 0

    def __call__(self, q, k):
        return self._linked(q // self.size, k // self.size)

    def _linked(self, row, column):
        seen = abs(row - column) <= self.near
        if self.ends:
            for one in (row, column):
                seen = seen | ((one >= 0) & (one < self.ends)) | (one >= self.blocks - self.ends)
        # A layout asks on the host, a loop over blocks on the device, where a table of the host would not index.
        library = np if isinstance(row, np.ndarray) and isinstance(column, np.ndarray) else jnp
        drawn = library.asarray(_drawn(self))[library.clip(row, 0, self.blocks - 1)]
        for draw in range(self.count):
            seen = seen | (drawn[..., draw] == column)
        return seen

    def extent(self, q_low, q_high, k_low, k_high):
        row, column = q_low // self.size, k_low // self.size
        single = (row == q_high // self.size) & (column == k_high // self.size)
        linked = self._linked(row, column)
        return settled(linked | ~single, linked & single)

    def spans(self, low, high):
        first, last = low // self.size, high // self.size
        most = int((last - first).max(initial=0)) + 1
        if most * self.count >= self.blocks:
            return [everything(low)]
        found = [(first - self.near, last + self.near)]
        for further in range(most):
            drawn = _drawn(self)[np.clip(np.minimum(first + further, last), 0, self.blocks - 1)]
            found += [(drawn[..., draw], drawn[..., draw]) for draw in range(self.count)]
        if self.ends:
            tail, (least, most) = self.blocks - self.ends, everything(low)
            sees_all = (first < self.ends) | (last >= tail)
            found += [(least, least * 0 + self.ends - 1), (np.where(sees_all, least, tail), most)]
        return [(begin * self.size, (end + 1) * self.size - 1) for begin, end in found]


@functools.lru_cache(maxsize=256)
def _drawn(pattern: RandomBlocks) -> np.ndarray:
    """(blocks, count): different random runs for each run, none that it sees anyway; itself where no others are
    left."""
    blocks, ends = pattern.blocks, pattern.ends
    random = np.random.default_rng((pattern.seed, pattern.head))
    found = np.repeat(np.arange(blocks, dtype=np.int32)[:, None], pattern.count, 1)
    middle = np.arange(ends, blocks - ends)
    for row in middle:
        others = middle[abs(middle - row) > pattern.near]
        chosen = random.choice(others, min(pattern.count, len(others)), replace=False)
        found[row, : len(chosen)] = chosen
    return found
