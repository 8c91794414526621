"""Many rows of blocks at once, where they are narrow and a loop over them would cost more than it computes.

What most rows see at the same distance, or at the same place, has its gradients added up by shifted views and by sums
over the rows.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from xformers_lab.attention._engine.block_sparse import batch
from xformers_lab.attention._engine.block_sparse.chunks import rows_at_once, scan_chunks
from xformers_lab.attention._engine.block_sparse.layout import Group
from xformers_lab.attention._engine.block_sparse.totals import Totals
from xformers_lab.attention._engine.block_sparse.view import View


def forward(view: View, group: Group):
    """The rows of a group: outputs (R, block, H) and log-sum-exps (R, block)."""

    def chunk(carry, rows):
        q, (k, v) = view.of_rows(view.q, group, rows), (_taken(view, group, rows, x) for x in (view.k, view.v))
        return carry, batch.forward(q, k, v, _added_to_scores(view, group, rows, _positions(view, group, rows)))

    return scan_chunks(chunk, None, len(group.rows), rows_at_once(group, view.blocks))[1]


def backward(view: View, group: Group, incoming, totals: Totals):
    """dq (R, block, H) of a group; what it gives to keys, values and bias is added to the totals.

    Log-sum-exps may be missing: they are then computed again.
    """

    def chunk(carry, rows):
        dk, dv, db = carry
        q, grad, delta, lse = view.of_rows((view.q, *incoming), group, rows)
        k, v = (_taken(view, group, rows, x) for x in (view.k, view.v))
        positions = _positions(view, group, rows)
        ds, p = batch.backward(q, k, v, _added_to_scores(view, group, rows, positions), lse, delta, grad)
        db = jax.tree.map(jnp.add, db, view.pull_bias(positions, ds))
        return (_collected(dk, group, rows, q, ds), _collected(dv, group, rows, grad, p), db), batch.weighed(ds, k)

    carry = (*totals.start_blocked(), totals.bias)
    carry, dq = scan_chunks(chunk, carry, len(group.rows), rows_at_once(group, view.blocks))
    totals.blocked, totals.bias = carry[:2], carry[2]
    return dq


# Rows are R neighbouring numbers within a group; each has M key blocks, n = M * block keys.


def _taken(view: View, group: Group, rows, x):
    """Of x (S, H) what each row looks at, (R, n, H)."""
    return view.blocked(x)[jnp.asarray(group.columns)[rows]].reshape(len(rows), -1, x.shape[1])


def _positions(view: View, group: Group, rows):
    """Of queries (R, block, 1) and keys (R, 1, n)."""
    queries, keys = view.query_positions(group, rows), view.key_positions(jnp.asarray(group.columns)[rows])
    # Kept as they are, so that no index is computed again for every score.
    return lax.optimization_barrier((queries, keys[:, None]))


def _added_to_scores(view: View, group: Group, rows, positions):
    """The bias, and what hides scores, broadcasting to (R, block, n); None where there is neither."""
    bias = None if view.bias is None else view.bias(*positions)
    seen = []
    if group.live is not None:
        seen.append(jnp.repeat(jnp.asarray(group.live)[rows], view.block_k, axis=1)[:, None])
    if not group.whole or view.valid is not None:
        known = view.known_of(jnp.asarray(group.columns)[rows])
        seen += [] if known is None else [known[:, None]]
    if not group.whole:
        seen.append(view.part.pattern(*positions))
    if not seen:
        return bias
    hidden = batch.hiding(functools.reduce(jnp.logical_and, [*seen, view.zero == 0]))
    return hidden if bias is None else hidden + bias


def _collected(into, group: Group, rows, x, p):
    """into (blocks, H, block), with x^T p of x (R, block, H) and p (R, block, n) added at the rows' keys."""
    H, block = into.shape[1:]
    own, near = group.width - group.shared, len(group.offsets)
    found = batch.returned(x, p)
    for place, offset in enumerate(group.offsets):
        first = int(group.rows[0]) + offset + rows[0]
        more = lax.dynamic_slice_in_dim(into, first, len(rows)) + found[..., place * block : (place + 1) * block]
        into = lax.dynamic_update_slice_in_dim(into, more, first, 0)
    if own > near:
        others = found[..., near * block : own * block].reshape(len(rows), H, -1, block).swapaxes(1, 2)
        into = into.at[jnp.asarray(group.columns[:, near:own])[rows]].add(others)
    if group.shared:
        total = found[..., own * block :].sum(0).reshape(H, -1, block)
        into = into.at[group.columns[0, own:]].add(total.swapaxes(0, 1))
    return into
