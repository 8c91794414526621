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
from xformers_lab.attention._engine.block_sparse.view import View
from xformers_lab.attention._engine.softmax import hiding


def forward(view: View, group: Group):
    """The rows of a group: outputs (R, block, H) and log-sum-exps (R, block)."""

    def chunk(carry, rows):
        (k, v), _, added = _looked_at(view, group, rows)
        return carry, batch.forward(view.of_queries(view.q, group, rows), k, v, added)

    return scan_chunks(chunk, None, len(group.rows), rows_at_once(group, view.blocks))[1]


def backward(view: View, group: Group, incoming, carry):
    """dq (R, block, H) of a group, and the carry, to which its gradients of keys, values and bias are added.

    incoming: as of looped rows; the log-sum-exps may be missing, and are then computed again.
    """

    def chunk(carry, rows):
        (dk, dv), db = carry
        q, grad, delta, lse = view.of_queries((view.q, *incoming), group, rows)
        (k, v), positions, added = _looked_at(view, group, rows)
        ds, p = batch.backward(q, k, v, added, lse, delta, grad)
        db = jax.tree.map(jnp.add, db, (view.pull_bias(positions, ds), None))
        totals = _collected(dk, group, rows, q, ds), _collected(dv, group, rows, grad, p)
        return (totals, db), batch.weighed(ds, k)

    return scan_chunks(chunk, carry, len(group.rows), rows_at_once(group, view.blocks))


def start(view: View):
    """Totals of the gradients of keys and values, (blocks, H, block) each."""
    shape = lambda x: (x.shape[0] // view.block_k, x.shape[1], view.block_k)
    return tuple(jnp.zeros(shape(x), jnp.float32) for x in (view.k, view.v))


def joined(totals):
    """(S, H) each."""
    return tuple(x.swapaxes(1, 2).reshape(-1, x.shape[1]) for x in totals)


def _looked_at(view: View, group: Group, rows):
    """Keys and values (R, m, H) that rows (R,) look at, positions, and what is added to scores, if anything."""
    columns = view.columns(group, rows)
    # Kept as they are, so that no index is computed again for every score.
    positions = lax.optimization_barrier(view.positions(group, rows, columns))
    added = None if view.bias is None else view.bias(*positions)
    masks = view.masks(group, rows, columns, positions, group.whole)
    if masks:
        hidden = hiding(functools.reduce(jnp.logical_and, masks))
        added = hidden if added is None else hidden + added
    return [view.of_keys(x, columns) for x in (view.k, view.v)], positions, added


def _collected(into, group: Group, rows, x, p):
    """into (blocks, H, block), with x^T p of x (R, block, H) and p (R, block, m) added at the rows' keys."""
    H, block = into.shape[1:]
    unshared, near = group.width - group.shared, len(group.offsets)
    added = batch.returned(x, p)
    for place, offset in enumerate(group.offsets):
        first = int(group.rows[0]) + offset + rows[0]
        more = lax.dynamic_slice_in_dim(into, first, len(rows)) + added[..., place * block : (place + 1) * block]
        into = lax.dynamic_update_slice_in_dim(into, more, first, 0)
    if unshared > near:
        others = added[..., near * block : unshared * block].reshape(len(rows), H, -1, block).swapaxes(1, 2)
        into = into.at[jnp.asarray(group.columns[:, near:unshared])[rows]].add(others)
    if group.shared:
        total = added[..., unshared * block :].sum(0).reshape(H, -1, block)
        into = into.at[group.columns[0, unshared:]].add(total.swapaxes(0, 1))
    return into
