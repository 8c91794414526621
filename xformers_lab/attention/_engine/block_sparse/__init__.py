"""One engine for every position-based pattern: softmax attention that touches only live blocks.

A row is one block of queries against its live key blocks: two matrix products and a softmax over the whole row. The
backward recomputes the row from the saved log-sum-exp. Rows are looped over or batched (looped_rows.py,
batched_rows.py), as the layout says of each group of them.

Patterns whose parts need different orders of positions (a band and a residue, say) are run part by part and merged
exactly by their log-sum-exps.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from xformers_lab.attention._engine.algebra import Pattern
from xformers_lab.attention._engine.block_sparse import batched_rows, layout, looped_rows
from xformers_lab.attention._engine.block_sparse.layout import SIZES, Group, Sizes
from xformers_lab.attention._engine.block_sparse.view import View, neighbours
from xformers_lab.attention._engine.softmax import EMPTY


def block_sparse(
    q,
    k,
    v,
    *,
    pattern: Pattern,
    valid=None,
    documents=None,
    bias=None,
    pair_values=None,
    blocks: tuple[int, int],
    sizes: Sizes = SIZES,
):
    """Softmax attention over the keys that `pattern` allows and `valid` marks; zeros where there is none.

    q (T, H), k and v (S, H), valid (S,) bool or None, documents (S,) int32 or None, of which a query sees its own.
    Query t stands at position S - T + t. bias is a pytree that is called with (T', 1) and (1, S') position arrays and
    gives scores to add, differentiable in its leaves; pair_values is one that is called with weights (T', S') and these
    positions and gives what they make of vectors of pairs, (T', H), which is added to the mean. blocks is (queries,
    keys) per block, sizes decide how rows of them are run. Returns (T, H) in v's type; scores and sums are float32.
    """
    if pair_values is not None:  # rows one at a time: of a batch no weights are at one place
        sizes = dataclasses.replace(sizes, narrow=0, padded=0)
    return _attend(q, k, v, valid, documents, bias, pair_values, pattern, blocks, sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8, 9))
def _attend(q, k, v, valid, documents, bias, pair_values, pattern, blocks, sizes):
    return _forward(q, k, v, valid, documents, bias, pair_values, pattern, blocks, sizes)[0]


def _forward(q, k, v, valid, documents, bias, pair_values, pattern, blocks, sizes):
    H = v.shape[1]
    scaled = (q * q.shape[-1] ** -0.5).astype(q.dtype)
    total, lse = None, None
    parts = layout.layout(pattern, len(q), len(k), *blocks, sizes)
    for part in parts:
        view = View(part, scaled, k, v, valid, documents, bias, pair_values, blocks)
        out = jnp.zeros((len(part.queries) // blocks[0], blocks[0], H), jnp.float32)
        stat = jnp.full(out.shape[:2], EMPTY, jnp.float32)
        for group in part.groups:
            of_rows, stat_of_rows = _runner(group).forward(view, group)
            out = _placed(out, group.rows, of_rows)
            stat = stat if _computed_again(group, parts) else _placed(stat, group.rows, stat_of_rows)
        out, stat = view.unblock_queries(out), view.unblock_queries(stat)
        if total is None or lse is None:
            total, lse = out, stat
        else:
            both = jnp.logaddexp(lse, stat)
            total = total * jnp.exp(lse - both)[:, None] + out * jnp.exp(stat - both)[:, None]
            lse = both
    assert total is not None and lse is not None
    total = total.astype(v.dtype)
    return total, (q, k, v, valid, documents, bias, pair_values, total, lse)


def _backward(pattern, blocks, sizes, residuals, grad):
    q, k, v, valid, documents, bias, pair_values, out, lse = residuals
    scale = q.shape[-1] ** -0.5
    scaled = (q * scale).astype(q.dtype)
    delta = (out.astype(jnp.float32) * grad).sum(-1)
    dq, dk, dv = (jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    dadded = jax.tree.map(jnp.zeros_like, (bias, pair_values))
    parts = layout.layout(pattern, len(q), len(k), *blocks, sizes)
    for part in parts:
        view = View(part, scaled, k, v, valid, documents, bias, pair_values, blocks)
        grads, deltas = view.block_queries(grad), view.block_queries(delta)
        # A query that pads a block has no weights, however large a bias is at its place.
        lses = view.block_queries(lse, fill=jnp.inf)
        dq_part = jnp.zeros((len(part.queries) // blocks[0], blocks[0], q.shape[1]), jnp.float32)
        totals: dict = {}  # gradients of keys and values, in the form of each way to run rows that there is
        for group in part.groups:
            run, incoming = _runner(group), (grads, deltas, None if _computed_again(group, parts) else lses)
            carry = totals.get(run) or run.start(view), dadded
            (totals[run], dadded), of_rows = run.backward(view, group, incoming, carry)
            dq_part = _placed(dq_part, group.rows, of_rows)
        dq += view.unblock_queries(dq_part)
        if totals:
            both = (run.joined(total) for run, total in totals.items())
            of_keys, of_values = functools.reduce(functools.partial(jax.tree.map, jnp.add), both)
            dk, dv = dk + view.unblock_keys(of_keys), dv + view.unblock_keys(of_values)
    return (dq * scale).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None, *dadded


_attend.defvjp(_forward, _backward)


def _runner(group: Group):
    """The module that runs a group's rows."""
    return batched_rows if group.batched else looped_rows


def _computed_again(group: Group, parts) -> bool:
    """Whether the backward computes a group's log-sum-exps again, where no other part needs them.

    To have them from the forward as well, XLA:CPU would run a batch of rows as several kernels instead of one.
    """
    return group.batched and len(parts) == 1


def _placed(into, rows: np.ndarray, x):
    """x (R, ...) in the place of these rows."""
    if len(rows) == into.shape[0]:
        return x
    if neighbours(rows):
        return lax.dynamic_update_slice_in_dim(into, x, int(rows[0]), 0)
    return into.at[rows].set(x)
