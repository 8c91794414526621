"""Patterns of runs of positions that look at random runs."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

from xformers_lab.attention._engine.algebra import Pattern, Spans, everything, settled


class OfRuns(Pattern):
    """Positions fall into `blocks` runs of `size`; a run sees `count` that are drawn for it, and others by rule."""

    size: int
    count: int
    blocks: int

    @property
    def drawn_among(self):
        return self.blocks if self.count else 0

    def linked(self, run, other):
        """Which runs see which: booleans for arrays of their numbers that broadcast."""
        raise NotImplementedError

    def drawn(self, run: np.ndarray) -> np.ndarray:
        """The runs (..., count) that are drawn for runs (...)."""
        raise NotImplementedError

    def ruled(self, first, last) -> Spans:
        """Spans of runs that hold every other one that a run of first..last sees."""
        return []

    def __call__(self, q, k):
        return self.linked(q // self.size, k // self.size)

    def state(self, q, k):
        run, other = q.low // self.size, k.low // self.size
        single, linked = (run == q.high // self.size) & (other == k.high // self.size), self.linked(run, other)
        return settled(linked | ~single, linked & single)

    def spans(self, low, high):
        first, last = low // self.size, high // self.size
        most = int((last - first).max(initial=0)) + 1
        if most * self.count >= self.blocks:
            return [everything(low)]
        spans = self.ruled(first, last)
        for further in range(most):
            drawn = self.drawn(np.minimum(first + further, last))
            spans += [(drawn[..., draw], drawn[..., draw]) for draw in range(self.count)]
        return [(begin * self.size, (end + 1) * self.size - 1) for begin, end in spans]


@dataclasses.dataclass(frozen=True)
class RandomBlocks(OfRuns):
    """A run sees itself, `near` neighbours on each side, `count` random ones out of all others, and, of the first and
    the last `ends` runs, all see and are seen by all."""

    size: int
    blocks: int
    near: int
    ends: int
    count: int
    seed: int
    head: int = 0

    def linked(self, run, other):
        seen = abs(run - other) <= self.near
        if self.ends:
            for one in (run, other):
                seen = seen | ((one >= 0) & (one < self.ends)) | (one >= self.blocks - self.ends)
        # A layout asks on the host, a loop over blocks on the device, where a table of the host would not index.
        library = np if isinstance(run, np.ndarray) and isinstance(other, np.ndarray) else jnp
        drawn = library.asarray(_table(self))[library.clip(run, 0, self.blocks - 1)]
        for draw in range(self.count):
            seen = seen | (drawn[..., draw] == other)
        return seen

    def drawn(self, run):
        return _table(self)[np.clip(run, 0, self.blocks - 1)]

    def ruled(self, first, last):
        spans = [(first - self.near, last + self.near)]
        if self.ends:
            tail, (least, most) = self.blocks - self.ends, everything(first)
            sees_all = (first < self.ends) | (last >= tail)
            spans += [(least, least * 0 + self.ends - 1), (np.where(sees_all, least, tail), most)]
        return spans


@functools.lru_cache(maxsize=256)
def _table(pattern: RandomBlocks) -> np.ndarray:
    """(blocks, count): different random runs for each run, none that it sees anyway; itself where no others are
    left."""
    blocks, ends = pattern.blocks, pattern.ends
    random = np.random.default_rng((pattern.seed, pattern.head))
    table = np.repeat(np.arange(blocks, dtype=np.int32)[:, None], pattern.count, 1)
    middle = np.arange(ends, blocks - ends)
    for run in middle:
        others = middle[abs(middle - run) > pattern.near]
        chosen = random.choice(others, min(pattern.count, len(others)), replace=False)
        table[run, : len(chosen)] = chosen
    return table
