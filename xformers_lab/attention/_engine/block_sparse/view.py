"""Arrays in blocks, in the order of positions that one part of a pattern asks for."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from xformers_lab.attention._engine.block_sparse.layout import Group, Part
from xformers_lab.attention._engine.order import PAD
from xformers_lab.attention._engine.softmax import on_data


class View:
    """One part's arrays in blocks, in the part's order of positions.

    A row of a group is one block of queries, or several that see the same keys; m of its scores are one query's. Rows
    are named by an index: a number, or numbers (R,) of neighbours, whose arrays have an axis R in front.
    """

    def __init__(self, part: Part, q, k, v, valid, documents, bias, pair_values, blocks: tuple[int, int]):
        self.pair_values = pair_values
        self.part, self.bias, self.T, self.S = part, bias, len(q), len(k)
        self.blocks, (self.block_q, self.block_k) = blocks, blocks
        self.shift, self.lead = self.S - self.T, part.lead * self.block_k
        self.q = self.block_queries(q)
        # Positions and padding hang on the data through this zero.
        self.zero = on_data(jnp.zeros((), jnp.int32), q)
        self.k, self.v = self._keys_in_order(k), self._keys_in_order(v)
        # Which keys count where a block is wholly live, and where it is not, as at the padding of blocks; None: all.
        self.valid = None if valid is None else self._keys_in_order(valid) & (self.zero == 0)
        padded = bool((part.keys == PAD).any())
        self.known = jnp.asarray(part.keys != PAD) & (self.zero == 0) if padded and valid is None else self.valid
        self.documents = None
        if documents is not None:
            of_queries = documents[np.maximum(np.arange(self.T) + self.shift, 0)]
            self.documents = self.block_queries(of_queries) + self.zero, self._keys_in_order(documents)
        self.query_at = None if part.natural_queries else jnp.asarray(part.queries).reshape(-1, self.block_q)
        self.key_at = None if part.natural_keys else jnp.asarray(part.keys)

    def _keys_in_order(self, x):
        """x by key positions; zeros (False) where a position is padding."""
        if self.part.natural_keys:
            return jnp.pad(x, [(self.lead, len(self.part.keys) - x.shape[0] - self.lead)] + [(0, 0)] * (x.ndim - 1))
        return taken(x, self.part.keys)

    def block_queries(self, x, fill: float = 0):
        """(T, ...) -> (query blocks, block, ...), with `fill` where a block is padded."""
        if self.part.natural_queries:
            padding = [(0, len(self.part.queries) - x.shape[0])] + [(0, 0)] * (x.ndim - 1)
            x = jnp.pad(x, padding, constant_values=fill)
        else:
            x = taken(x, np.where(self.part.queries == PAD, PAD, self.part.queries - self.shift), fill)
        return x.reshape(-1, self.block_q, *x.shape[1:])

    def unblock_queries(self, x):
        x = x.reshape(-1, *x.shape[2:])
        return x[: self.T] if self.part.natural_queries else x[places(self.part.queries, self.shift, self.T)]

    def unblock_keys(self, x):
        if self.part.natural_keys:
            return x[self.lead : self.lead + self.S]
        return taken(x, places(self.part.keys, 0, self.S))

    def blocked(self, x):
        return x.reshape(-1, self.block_k, *x.shape[1:])

    # ---- of rows -------------------------------------------------------------------------------------------------

    def of_queries(self, tree, group: Group, index):
        """Leaves (query blocks, block, ...) -> (*index, n, ...)."""
        if index.ndim and neighbours(group.rows):
            first = int(group.rows[0]) + index[0]
            return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, first, len(index)), tree)
        rows = _rows(group, index)
        return jax.tree.map(lambda x: x[rows].reshape(*index.shape, -1, *x.shape[2:]), tree)

    def columns(self, group: Group, index):
        """Where rows' keys are: block numbers (*index, M), or (start, size) of a single row whose blocks are a run."""
        first = group.columns[:: group.together]
        if index.ndim or not group.run:
            return jnp.asarray(first)[index]
        same = (first[:, 0] == first[0, 0]).all()
        start = int(first[0, 0]) if same else jnp.asarray(first[:, 0])[index]
        return start * self.block_k, group.width * self.block_k

    def stretches(self, group: Group, index) -> list:
        """The keys of rows, as `columns` has them, in one piece or in two, each with whether it needs no predicate."""
        columns, cut = self.columns(group, index), group.unmasked
        if not cut:
            return [(columns, group.whole)]
        if not isinstance(columns, tuple):
            return [(columns[..., :cut], True), (columns[..., cut:], False)]
        (start, size), cut = columns, cut * self.block_k
        return [((start, cut), True), ((start + cut, size - cut), False)]

    def of_keys(self, x, columns):
        """(keys, ...) -> (*index, m, ...)."""
        if isinstance(columns, tuple):
            start, size = columns
            return x if size == x.shape[0] else lax.dynamic_slice_in_dim(x, start, size, 0)
        return self.blocked(x)[columns].reshape(*columns.shape[:-1], -1, *x.shape[1:])

    def positions(self, group: Group, index, columns):
        """Natural positions of the queries (*index, n, 1) and the keys (*index, 1, m)."""
        rows = _rows(group, index)
        if self.query_at is not None:
            q = self.query_at[rows]
        else:
            q = self.shift + rows[..., None] * self.block_q + jnp.arange(self.block_q)
        if self.key_at is not None:
            k = self.of_keys(self.key_at, columns)
        elif isinstance(columns, tuple):
            k = columns[0] + jnp.arange(columns[1]) - self.lead
        else:
            k = columns[..., None] * self.block_k + jnp.arange(self.block_k) - self.lead
        return q.reshape(*index.shape, -1, 1) + self.zero, k.reshape(*index.shape, 1, -1)

    def masks(self, group: Group, index, columns, positions, whole: bool) -> list:
        """Which scores count, those that all of these booleans say, which broadcast to (*index, n, m). whole: the
        pattern has all of them."""
        masks = [] if whole else [self.part.pattern(*positions)]
        known = self.valid if whole else self.known
        if known is not None:
            masks.append(self.of_keys(known, columns)[..., None, :])
        if self.documents is not None:
            queries, keys = self.documents
            of_keys = self.of_keys(keys, columns)
            masks.append(self.of_queries(queries, group, index)[..., None] == of_keys[..., None, :])
        if group.live is not None:
            live = jnp.repeat(jnp.asarray(group.live[:: group.together])[index], self.block_k, -1)
            masks.append(live[..., None, :] & (self.zero == 0))
        return masks

    def pull_bias(self, positions, ds):
        """The gradient of the bias's leaves from the gradient of scores at these positions."""
        if self.bias is None:
            return None
        return jax.vjp(lambda bias: bias(*positions) + jnp.zeros_like(ds), self.bias)[1](ds)[0]

    def pull_pair_values(self, positions, p, grad):
        """Of what weights p (n, m) at these positions make of vectors of pairs: the gradients of its leaves and of p,
        or None."""
        if self.pair_values is None:
            return None, None
        return jax.vjp(lambda pairs, p: pairs(p, *positions), self.pair_values, p)[1](grad.astype(jnp.float32))


def neighbours(rows: np.ndarray) -> bool:
    return bool((np.diff(rows) == 1).all())


def _rows(group: Group, index):
    """The blocks of queries (*index, together) of rows."""
    return jnp.asarray(group.rows.reshape(-1, group.together))[index]


def taken(x, index: np.ndarray, fill: float = 0, axis: int = 0):
    """x[index], `fill` (zeros, False) where the index is negative."""
    return jnp.take(x, np.where(index < 0, x.shape[axis], index), axis=axis, mode="fill", fill_value=fill)


def places(positions: np.ndarray, shift: int, length: int) -> np.ndarray:
    """Where in a list of positions those from `shift` on are; PAD where one is missing."""
    real = np.nonzero(positions != PAD)[0]
    back = np.full(length, PAD, np.int32)
    back[positions[real] - shift] = real
    return back
