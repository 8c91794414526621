"""Rows of blocks, one at a time (on accelerators, many): 2-D products, which XLA:CPU runs best where a row is wide.

Blocks of queries that see the same keys may be one row together.

dK and dV are accumulated transposed, (H, S), because p.T @ do runs three times slower there than do.T @ p. Many keys
that all rows of a group see whole are a stretch of their own, for which no predicate is evaluated: of full causal
attention that is most of what is computed.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from xformers_lab.attention._engine.block_sparse.chunks import rows_at_once, scan_chunks
from xformers_lab.attention._engine.block_sparse.layout import Group
from xformers_lab.attention._engine.block_sparse.view import View
from xformers_lab.attention._engine.products import laid_transposed
from xformers_lab.attention._engine.softmax import MASKED, exponentials_apart


def forward(view: View, group: Group):
    """The rows of a group: outputs (R, block, H) and log-sum-exps (R, block)."""

    def row(index):
        stretches = view.stretches(group, index)
        scores, positions = zip(*(_scores(view, group, index, stretch) for stretch in stretches), strict=True)
        p, m, total = exponentials_apart(scores)
        values = [view.of_keys(view.v, columns) for columns, _ in stretches]
        out = sum(_product(p.astype(view.v.dtype), v) for p, v in zip(p, values, strict=True))
        if view.pair_values is not None:
            out = out + sum(view.pair_values(p, *at) for p, at in zip(p, positions, strict=True))
        return out / total, (m + jnp.log(total))[:, 0]

    at_once = rows_at_once(group, view.blocks)
    out = lax.map(row, _numbers(group), batch_size=at_once if at_once > 1 else None)
    return jax.tree.map(lambda x: x.reshape(len(group.rows), view.block_q, *x.shape[2:]), out)


def backward(view: View, group: Group, incoming, carry):
    """dq (R, block, H) of a group, and the carry, to which its gradients of keys, values and bias are added.

    incoming: of all queries' outputs the gradients, the products of these with the outputs, and the log-sum-exps.
    """

    def of_stretch(index, stretch):
        """Of the keys of a stretch: their share of dq, what their dk and dv grow by, and the gradients of the bias and
        of what is added to values."""
        s, positions = _scores(view, group, index, stretch)
        q, g, delta, lse = view.of_queries((view.q, *incoming), group, index)
        keys, values = view.of_keys(view.k, stretch[0]), view.of_keys(view.v, stretch[0])
        p = jnp.exp(s - lse[:, None])
        dpairs, of_pairs = view.pull_pair_values(positions, p, g)
        of_values = _product(g, values.T)
        ds = p * ((of_values if of_pairs is None else of_values + of_pairs) - delta[:, None])
        dadded = view.pull_bias(positions, ds), dpairs
        p, ds = p.astype(values.dtype), ds.astype(keys.dtype)
        return _product(ds, keys), (_product(laid_transposed(q), ds), _product(laid_transposed(g), p)), dadded

    def row(index):
        dq, added, dadded = zip(*(of_stretch(index, each) for each in view.stretches(group, index)), strict=True)
        return jnp.asarray(sum(dq)), added, jax.tree.map(lambda *x: sum(x), *dadded)

    at_once = rows_at_once(group, view.blocks)
    of_rows = row if at_once == 1 else jax.vmap(row)

    def step(carry, index):
        totals, db = carry
        dq, added, dadded = of_rows(index)
        for (columns, _), grown in zip(view.stretches(group, index), added, strict=True):
            totals = tuple(_added(into, x, columns, view.block_k) for into, x in zip(totals, grown, strict=True))
        dadded = jax.tree.map(lambda x: x.sum(tuple(range(index.ndim))), dadded)
        return (totals, jax.tree.map(jnp.add, db, dadded)), dq

    if at_once == 1:
        carry, dq = lax.scan(step, carry, _numbers(group))
    else:
        carry, dq = scan_chunks(step, carry, len(_numbers(group)), at_once)
    return carry, dq.reshape(len(group.rows), view.block_q, -1)


def start(view: View):
    """Totals of the gradients of keys and values, (H, S) each."""
    return tuple(jnp.zeros(x.shape[::-1], jnp.float32) for x in (view.k, view.v))


def joined(totals):
    """(S, H) each."""
    return tuple(laid_transposed(x) for x in totals)


def _scores(view: View, group: Group, index, stretch):
    """Masked scores (n, m) of a row and of the keys of a stretch, and positions."""
    columns, whole = stretch
    positions = view.positions(group, index, columns)
    s = _product(view.of_queries(view.q, group, index), view.of_keys(view.k, columns).T)
    if view.bias is not None:
        s = s + view.bias(*positions)
    for seen in view.masks(group, index, columns, positions, whole):
        s = jnp.where(seen, s, MASKED)
    return s, positions


def _numbers(group: Group):
    """Of the rows that are run."""
    return np.arange(len(group.rows) // group.together)


def _product(a, b):
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _added(into, x, columns, block: int):
    """into (H, S), with x (*index, H, m) added at the keys of rows."""
    if not isinstance(columns, tuple):
        H = into.shape[0]
        x = jnp.moveaxis(x.reshape(*x.shape[:-1], -1, block), -3, 0).reshape(H, -1, block)
        return into.reshape(H, -1, block).at[:, columns.reshape(-1)].add(x).reshape(into.shape)
    start, size = columns
    if size == into.shape[1]:
        return into + x
    window = lax.dynamic_slice_in_dim(into, start, size, 1) + x
    return lax.dynamic_update_slice_in_dim(into, window, start, 1)
