"""Many rows of blocks at once, where they are narrow and a loop over them would cost more than it computes.

Key blocks at the same distance from every row are shifted views of the keys, those that all rows share take one wide
product, others are gathered.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from xformers_lab.attention._engine.chunks import rows_at_once, scan_chunks
from xformers_lab.attention._engine.dense import EMPTY, MASKED
from xformers_lab.attention._engine.layout import Group
from xformers_lab.attention._engine.totals import Totals
from xformers_lab.attention._engine.view import View, across


def forward(view: View, group: Group):
    """The rows of a group: outputs (R, block, H) and log-sum-exps (R, block)."""
    queries = view.q, across(view.q)

    def chunk(carry, rows):
        pieces, q = _pieces(view, group, rows), view.of_rows(queries, group, rows)
        scores = [piece.scores(q) for piece in pieces]
        m = jnp.maximum(_joined(jnp.maximum, [s.max(-1, keepdims=True) for s in scores]), EMPTY)
        weights = [jnp.exp(s - m) for s in scores]
        l = jnp.maximum(_joined(jnp.add, [p.sum(-1, keepdims=True) for p in weights]), 1e-30)
        o = _joined(jnp.add, [piece.weighed(p, view.v) for piece, p in zip(pieces, weights, strict=True)])
        return carry, (o / l, (m + jnp.log(l))[..., 0])

    return scan_chunks(chunk, None, len(group.rows), rows_at_once(group, view.blocks))[1]


def backward(view: View, group: Group, incoming, totals: Totals):
    """dq (R, block, H) of a group; what it gives to keys, values and bias is added to the totals."""
    grads, deltas, lses = incoming
    queries, grads = (view.q, across(view.q)), (grads, across(grads))

    def chunk(carry, rows):
        dk, dv, db = carry
        pieces, given = _pieces(view, group, rows), (queries, grads, deltas, lses)
        q, g, delta, lse = view.of_rows(given, group, rows)
        dq = []
        for piece in pieces:
            p = jnp.exp(piece.scores(q) - lse[..., None])
            ds = p * (piece.dots(g, piece.values) - delta[..., None])
            db = jax.tree.map(jnp.add, db, view.pull_bias(piece.positions, ds))
            dk, dv = piece.added(dk, q[0], ds), piece.added(dv, g[0], p)
            dq.append(piece.weighed(ds, view.k))
        return (dk, dv, db), _joined(jnp.add, dq)

    carry = (*totals.start_blocked(), totals.bias)
    carry, dq = scan_chunks(chunk, carry, len(group.rows), rows_at_once(group, view.blocks))
    totals.blocked, totals.bias = carry[:2], carry[2]
    return dq


def _pieces(view: View, group: Group, rows) -> list["_Piece"]:
    """Of rows that are R neighbouring numbers within a group."""
    own: list[_Piece] = [_Own(view, group, rows)] if group.own.shape[1] else []
    return [*own, _Shared(view, group, rows)] if len(group.shared) else own


def _joined(function, arrays):
    return functools.reduce(function, arrays)


class _Piece:
    """Key blocks of some rows that are computed together: keys and values, positions, and what masks their scores."""

    def __init__(self, view: View, positions, mask, whole: bool):
        self.view, self.whole = view, whole
        # Kept as they are, so that no index is computed again for every score.
        self.positions, self.mask = lax.optimization_barrier((positions, mask))
        self.keys, self.values = self.taken(view.keys_across), self.taken(view.values_across)

    def scores(self, q):
        """Masked scores (R, block, n)."""
        s = self.dots(q, self.keys)
        if self.view.bias is not None:
            s = s + self.view.bias(*self.positions)
        if not self.whole:
            s = jnp.where(self.view.part.pattern(*self.positions), s, MASKED)
        s = s if self.mask is None else jnp.where(self.mask, s, MASKED)
        return lax.optimization_barrier(s)

    def taken(self, blocks):
        """From (blocks, H, block) what the piece has of keys."""
        raise NotImplementedError

    def dots(self, x, keys):
        """Queries, (R, block, H) and (R, H, block), times keys -> (R, block, n)."""
        raise NotImplementedError

    def weighed(self, p, x):
        """(R, block, n) times the piece's rows of x (S, H), keys or values -> (R, block, H)."""
        raise NotImplementedError

    def added(self, into, x, p):
        """into (blocks, H, block), with x^T p of x (R, block, H) and p (R, block, n) added at the piece's keys."""
        raise NotImplementedError


class _Own(_Piece):
    """Every row's own key blocks, (R, H, n): at the group's offsets, and others."""

    def __init__(self, view: View, group: Group, rows):
        self.offsets, self.rows, self.first = group.offsets, rows, int(group.rows[0]) + rows[0]
        self.others = jnp.asarray(group.own[:, len(group.offsets) :])[rows]
        columns = jnp.asarray(group.own)[rows]
        mask = view.known_of(columns) if not group.whole or view.real is not None else None
        if group.own_live is not None:
            live = jnp.repeat(jnp.asarray(group.own_live)[rows], view.block_k, axis=1)
            mask = live if mask is None else mask & live
        queries, keys = view.query_positions(group, rows), view.key_positions(columns)
        mask = None if mask is None else (mask & (view.zero == 0))[:, None]
        super().__init__(view, (queries, keys[:, None]), mask, group.whole)

    def taken(self, blocks):
        return self._joined(blocks, 2)

    def _joined(self, blocks, axis: int):
        found = [lax.dynamic_slice_in_dim(blocks, self.first + offset, len(self.rows)) for offset in self.offsets]
        others = [blocks[self.others[:, place]] for place in range(self.others.shape[1])]
        return jnp.concatenate([*found, *others], axis)

    def dots(self, x, keys):
        return jnp.einsum("rhq,rhk->rqk", x[1], keys, preferred_element_type=jnp.float32)

    def weighed(self, p, x):
        rows = self._joined(self.view.blocked(x), 1)
        return jnp.einsum("rqk,rkh->rqh", p.astype(x.dtype), rows, preferred_element_type=jnp.float32)

    def added(self, into, x, p):
        R, H, block, O = len(self.rows), into.shape[1], into.shape[2], len(self.offsets)
        found = jnp.einsum("rqh,rqk->rhk", x, p.astype(x.dtype), preferred_element_type=jnp.float32)
        for place, offset in enumerate(self.offsets):
            more = found[..., place * block : (place + 1) * block]
            more = more + lax.dynamic_slice_in_dim(into, self.first + offset, R)
            into = lax.dynamic_update_slice_in_dim(into, more, self.first + offset, 0)
        if self.others.shape[1]:
            into = into.at[self.others].add(found[..., O * block :].reshape(R, H, -1, block).swapaxes(1, 2))
        return into


class _Shared(_Piece):
    """Key blocks that all rows share, (H, n)."""

    def __init__(self, view: View, group: Group, rows):
        self.columns = group.shared
        mask = view.known_of(group.shared) if not group.shared_whole or view.real is not None else None
        if group.shared_live is not None:
            live = jnp.repeat(jnp.asarray(group.shared_live)[rows], view.block_k, axis=1)[:, None]
            mask = live if mask is None else mask & live
        queries, keys = view.query_positions(group, rows), view.key_positions(group.shared)
        mask = None if mask is None else mask & (view.zero == 0)
        super().__init__(view, (queries, keys[None, None]), mask, group.shared_whole)

    def taken(self, blocks):
        return blocks[self.columns].swapaxes(0, 1).reshape(blocks.shape[1], -1)

    def dots(self, x, keys):
        return self._product(x[0], keys)

    def weighed(self, p, x):
        rows = self.view.blocked(x)[self.columns].reshape(-1, x.shape[1])
        return self._product(p.astype(x.dtype), rows)

    def _product(self, x, keys):
        flat = jnp.dot(x.reshape(-1, x.shape[2]), keys, preferred_element_type=jnp.float32)
        return flat.reshape(*x.shape[:2], -1)

    def added(self, into, x, p):
        x, p = (y.reshape(-1, y.shape[2]) for y in (x, p.astype(x.dtype)))
        found = jnp.dot(x.T, p, preferred_element_type=jnp.float32).reshape(into.shape[1], -1, into.shape[2])
        return into.at[self.columns].add(found.swapaxes(0, 1))
