"""Rows of blocks, one at a time (on accelerators, many): 2-D products, which XLA:CPU runs best where a row is wide.

Blocks of queries that see the same keys may be one row together.

dK and dV are accumulated transposed, (H, S), because p.T @ do runs three times slower there than do.T @ p.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from xformers_lab.attention._engine.block_sparse.chunks import rows_at_once, scan_chunks
from xformers_lab.attention._engine.block_sparse.layout import Group
from xformers_lab.attention._engine.block_sparse.totals import Totals
from xformers_lab.attention._engine.block_sparse.view import View
from xformers_lab.attention._engine.softmax import EMPTY


def forward(view: View, group: Group):
    """The rows of a group: outputs (R, block, H) and log-sum-exps (R, block)."""

    def row(index):
        s, cols = view.scores(group, index)
        m = jnp.maximum(s.max(-1, keepdims=True), EMPTY)
        p = jnp.exp(s - m)
        l = jnp.maximum(p.sum(-1, keepdims=True), 1e-30)
        o = jnp.dot(p.astype(view.v.dtype), view.values(cols), preferred_element_type=jnp.float32)
        return o / l, (m + jnp.log(l))[:, 0]

    at_once = rows_at_once(group, view.blocks)
    found = lax.map(row, _numbers(group), batch_size=at_once if at_once > 1 else None)
    return jax.tree.map(lambda x: x.reshape(len(group.rows), view.block_q, *x.shape[2:]), found)


def backward(view: View, group: Group, incoming, totals: Totals):
    """dq (R, block, H) of a group; what it gives to keys, values and bias is added to the totals."""
    grads, deltas, lses = incoming

    def row(index):
        s, cols = view.scores(group, index)
        qi, g, delta, lse = (view.of_row(x, group, index) for x in (view.q, grads, deltas, lses))
        keys, values = view.keys(cols), view.values(cols)
        p = jnp.exp(s - lse[:, None])
        dp = jnp.dot(g, values.T, preferred_element_type=jnp.float32)
        ds = p * (dp - delta[:, None])
        dbias = view.pull_bias(view.positions(group, index, cols), ds)
        p, ds = p.astype(values.dtype), ds.astype(keys.dtype)
        dkT = jnp.dot(qi.T, ds, preferred_element_type=jnp.float32)
        dvT = jnp.dot(g.T, p, preferred_element_type=jnp.float32)
        return jnp.dot(ds, keys, preferred_element_type=jnp.float32), dkT, dvT, dbias, cols

    def add(into, x, cols):
        if isinstance(cols, tuple):  # a run: one window of columns
            start, size = cols
            if size == into.shape[1]:
                return into + x
            window = lax.dynamic_slice_in_dim(into, start, size, 1) + x
            return lax.dynamic_update_slice_in_dim(into, window, start, 1)
        H, block = into.shape[0], view.block_k
        return into.reshape(H, -1, block).at[:, cols].add(x.reshape(H, -1, block)).reshape(into.shape)

    def one(carry, index):
        dk, dv, db = carry
        dq, dkT, dvT, dbias, cols = row(index)
        return (add(dk, dkT, cols), add(dv, dvT, cols), jax.tree.map(jnp.add, db, dbias)), dq

    def many(carry, rows):
        dk, dv, db = carry
        dq, dkT, dvT, dbias = jax.vmap(lambda index: row(index)[:4])(rows)
        columns = jnp.asarray(group.columns[:: group.together])[rows]
        scatter = lambda into, x: _scatter(into, x, columns, view.block_k)
        return (scatter(dk, dkT), scatter(dv, dvT), jax.tree.map(lambda a, b: a + b.sum(0), db, dbias)), dq

    carry, at_once = (*totals.start_transposed(), totals.bias), rows_at_once(group, view.blocks)
    if at_once == 1:
        carry, dq = lax.scan(one, carry, _numbers(group))
    else:
        carry, dq = scan_chunks(many, carry, len(_numbers(group)), at_once)
    totals.transposed, totals.bias = carry[:2], carry[2]
    return dq.reshape(len(group.rows), view.block_q, -1)


def _numbers(group: Group):
    """Of the rows that are run."""
    return np.arange(len(group.rows) // group.together)


def _scatter(into, x, columns, block):
    """Add (R, H, M * block) at key blocks columns (R, M) of (H, S)."""
    H = into.shape[0]
    x = x.reshape(x.shape[0], H, -1, block).transpose(1, 0, 2, 3).reshape(H, -1, block)
    return into.reshape(H, -1, block).at[:, columns.reshape(-1)].add(x).reshape(into.shape)
