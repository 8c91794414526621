"""Arrays in blocks, in the order of positions that one part of a pattern asks for."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from xformers_lab.attention._engine.block_sparse.layout import Group, Part
from xformers_lab.attention._engine.order import PAD
from xformers_lab.attention._engine.softmax import MASKED


class View:
    """One part's arrays in blocks, in the part's order of positions."""

    def __init__(self, part: Part, q, k, v, valid, bias, T, S, blocks):
        self.part, self.bias, self.T, self.S = part, bias, T, S
        self.blocks, (self.block_q, self.block_k) = blocks, blocks
        self.shift, self.lead = S - T, part.lead * self.block_k
        self.q = self.block_queries(q)
        # Positions and padding hang on the data through this zero: else differentiation sees that masks do not, and
        # stores every one of them for the backward, a T x S array in all.
        self.zero = lax.optimization_barrier((jnp.zeros((), jnp.int32), q[:1, :1]))[0]
        self.k, self.v = self._keys_in_order(k), self._keys_in_order(v)
        # Which keys there are: known also says where a block is padded, which is asked where one is not wholly live.
        self.valid = None if valid is None else self._keys_in_order(valid) & (self.zero == 0)
        there = part.keys != PAD
        self.known = self.valid if self.valid is not None or there.all() else jnp.asarray(there) & (self.zero == 0)
        self.query_at = None if part.natural_queries else jnp.asarray(part.queries).reshape(-1, self.block_q)
        self.key_at = None if part.natural_keys else jnp.asarray(part.keys).reshape(-1, self.block_k)

    def _keys_in_order(self, x):
        """x by key positions; zeros (False) where a position is padding."""
        if self.part.natural_keys:
            return jnp.pad(x, [(self.lead, len(self.part.keys) - x.shape[0] - self.lead)] + [(0, 0)] * (x.ndim - 1))
        return _taken(x, self.part.keys)

    def block_queries(self, x, fill: float = 0):
        """(T, ...) -> (query blocks, block, ...), with `fill` where a block is padded."""
        if self.part.natural_queries:
            padding = [(0, len(self.part.queries) - x.shape[0])] + [(0, 0)] * (x.ndim - 1)
            x = jnp.pad(x, padding, constant_values=fill)
        else:
            x = _taken(x, np.where(self.part.queries == PAD, PAD, self.part.queries - self.shift), fill)
        return x.reshape(-1, self.block_q, *x.shape[1:])

    def unblock_queries(self, x):
        x = x.reshape(-1, *x.shape[2:])
        return x[: self.T] if self.part.natural_queries else x[_places(self.part.queries, self.shift, self.T)]

    def unblock_keys(self, x):
        if self.part.natural_keys:
            return x[self.lead : self.lead + self.S]
        return _taken(x, _places(self.part.keys, 0, self.S))

    def blocked(self, x):
        return x.reshape(-1, self.block_k, *x.shape[1:])

    # Rows in a loop: each is one block of queries, or several that see the same keys.

    def of_row(self, x, group: Group, index):
        """(query blocks, block, ...) -> (queries of the row, ...)."""
        blocks = x[jnp.asarray(group.rows.reshape(-1, group.together))[index]]
        return blocks.reshape(-1, *blocks.shape[2:])

    def columns(self, group: Group, index):
        """Where a row's keys are: (start, size) of a run, or (M,) block numbers."""
        first = group.columns[:: group.together]
        if not group.run:
            return jnp.asarray(first)[index]
        size = group.width * self.block_k
        same = (first[:, 0] == first[0, 0]).all()
        start = int(first[0, 0]) if same else jnp.asarray(first[:, 0])[index]
        return start * self.block_k, size

    def _at(self, x, cols):
        if isinstance(cols, tuple):
            start, size = cols
            return x if size == x.shape[0] else lax.dynamic_slice_in_dim(x, start, size, 0)
        return self.blocked(x)[cols].reshape(-1, *x.shape[1:])

    def keys(self, cols):
        return self._at(self.k, cols)

    def values(self, cols):
        return self._at(self.v, cols)

    def positions(self, group: Group, index, cols):
        """Natural positions of the queries (n, 1) and keys (1, M * block) of a row."""
        rows = group.rows.reshape(-1, group.together)
        if self.query_at is None:
            first = self.shift + jnp.asarray(rows)[index] * self.block_q
            q = (first[:, None] + jnp.arange(self.block_q)).reshape(-1)
        else:
            q = self.of_row(self.query_at, group, index)
        if not isinstance(cols, tuple):
            k = self.key_positions(cols)
        elif self.key_at is None:
            k = cols[0] + jnp.arange(cols[1]) - self.lead
        else:
            k = self._at(self.key_at.reshape(-1), cols)
        return q[:, None] + self.zero, k[None]

    def scores(self, group: Group, index):
        """Masked scores (n, M * block) of a row, and its columns."""
        cols = self.columns(group, index)
        positions = self.positions(group, index, cols)
        s = jnp.dot(self.of_row(self.q, group, index), self.keys(cols).T, preferred_element_type=jnp.float32)
        if self.bias is not None:
            s = s + self.bias(*positions)
        if not group.whole:
            s = jnp.where(self.part.pattern(*positions), s, MASKED)
        known = self.valid if group.whole else self.known
        if known is not None:
            s = jnp.where(self._at(known, cols)[None], s, MASKED)
        if group.live is not None:
            live = jnp.repeat(jnp.asarray(group.live[:: group.together])[index], self.block_k) & (self.zero == 0)
            s = jnp.where(live[None], s, MASKED)
        return s, cols

    # Rows in a batch; rows are R neighbouring numbers within a group.

    def of_rows(self, tree, group: Group, rows):
        """(query blocks, ...) -> (R, ...)."""
        if neighbours(group.rows):
            first = int(group.rows[0]) + rows[0]
            return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, first, len(rows)), tree)
        chosen = jnp.asarray(group.rows)[rows]
        return jax.tree.map(lambda x: x[chosen], tree)

    def query_positions(self, group: Group, rows):
        """(R, block, 1)."""
        if self.query_at is not None:
            return self.of_rows(self.query_at, group, rows)[..., None] + self.zero
        first = self.shift + jnp.asarray(group.rows)[rows] * self.block_q
        return (first[:, None] + jnp.arange(self.block_q))[..., None] + self.zero

    def key_positions(self, columns):
        """(..., M) key blocks -> (..., M * block)."""
        if self.key_at is not None:
            at = self.key_at[columns]
        else:
            at = columns[..., None] * self.block_k + jnp.arange(self.block_k) - self.lead
        return at.reshape(*columns.shape[:-1], -1)

    def known_of(self, columns):
        """Which keys of key blocks (..., M) there are, (..., M * block); None: all."""
        if self.known is None:
            return None
        return self.blocked(self.known)[columns].reshape(*columns.shape[:-1], -1)

    def pull_bias(self, positions, ds):
        """The gradient of the bias's leaves from the gradient of scores at these positions."""
        if self.bias is None:
            return None
        return jax.vjp(lambda bias: bias(*positions) + jnp.zeros_like(ds), self.bias)[1](ds)[0]


def neighbours(rows: np.ndarray) -> bool:
    return bool((np.diff(rows) == 1).all())


def _taken(x, index: np.ndarray, fill: float = 0):
    """x[index], `fill` (zeros, False) where the index is negative."""
    return jnp.take(x, np.where(index < 0, x.shape[0], index), axis=0, mode="fill", fill_value=fill)


def _places(positions: np.ndarray, shift: int, length: int) -> np.ndarray:
    """Where in a list of positions those from `shift` on are; PAD where one is missing."""
    there = np.nonzero(positions != PAD)[0]
    back = np.full(length, PAD, np.int32)
    back[positions[there] - shift] = there
    return back
