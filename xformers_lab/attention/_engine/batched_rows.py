"""Many rows of blocks at once, where they are narrow and a loop over them would cost more than it computes.

The forward is written so that XLA:CPU runs all of it as one kernel, whose scores never leave the caches: scores are
masked by adding, and nothing but the outputs is taken from it. What most rows see at the same distance, or at the same
place, has its gradients added up by shifted views and by one wide product.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from xformers_lab.attention._engine.chunks import rows_at_once, scan_chunks
from xformers_lab.attention._engine.dense import EMPTY, MASKED
from xformers_lab.attention._engine.layout import Group
from xformers_lab.attention._engine.totals import Totals
from xformers_lab.attention._engine.view import View


def forward(view: View, group: Group):
    """The rows of a group: outputs (R, block, H) and log-sum-exps (R, block)."""

    def chunk(carry, rows):
        s, hidden = _scores(view, group, rows, view.of_rows(view.q, group, rows))
        p, m, l = _softmax(s)
        o, lse = _weighed(p, _taken(view, group, rows, view.v)) / l, (m + jnp.log(l))[..., 0]
        if hidden is not None:
            seeing = hidden.max(-1) > EMPTY
            o, lse = o * seeing[..., None], jnp.where(seeing, lse, EMPTY)
        return carry, (o, lse)

    return scan_chunks(chunk, None, len(group.rows), rows_at_once(group, view.blocks, forward=True))[1]


def backward(view: View, group: Group, incoming, totals: Totals):
    """dq (R, block, H) of a group; what it gives to keys, values and bias is added to the totals.

    Log-sum-exps may be missing: they are then computed again.
    """

    def chunk(carry, rows):
        dk, dv, db = carry
        q, g, delta, lse = view.of_rows((view.q, *incoming), group, rows)
        s, hidden = _scores(view, group, rows, q)
        if lse is not None:
            p = jnp.exp(s - lse[..., None])
        else:
            p, _, l = _softmax(s)
            p = p / l if hidden is None else p * ((hidden.max(-1, keepdims=True) > EMPTY) / l)
        ds = p * (_dots(g, _taken(view, group, rows, view.v)) - delta[..., None])
        db = jax.tree.map(jnp.add, db, view.pull_bias(_positions(view, group, rows), ds))
        dk, dv = (_added(into, group, rows, x, y) for into, x, y in ((dk, q, ds), (dv, g, p)))
        return (dk, dv, db), _weighed(ds, _taken(view, group, rows, view.k))

    carry = (*totals.start_blocked(), totals.bias)
    carry, dq = scan_chunks(chunk, carry, len(group.rows), rows_at_once(group, view.blocks))
    totals.blocked, totals.bias = carry[:2], carry[2]
    return dq


# Rows are R neighbouring numbers within a group; each has M key blocks, n = M * block keys.


def _scores(view: View, group: Group, rows, q):
    """Scores (R, block, n) of queries (R, block, H), and what of it hides some of them: 0 or MASKED, or None."""
    s = _dots(q, _taken(view, group, rows, view.k))
    if view.bias is not None:
        s = s + view.bias(*_positions(view, group, rows))
    hidden = _hidden(view, group, rows)
    return (s if hidden is None else s + hidden), hidden


def _softmax(s):
    """exp(s - m), the rows' maxima m and sums l: of a row that sees nothing, of scores that are all MASKED."""
    m = s.max(-1, keepdims=True)
    p = jnp.exp(s - m)
    return p, m, p.sum(-1, keepdims=True)


def _dots(x, keys):
    """(R, block, H) (R, n, H) -> (R, block, n)."""
    return jnp.einsum("rqh,rkh->rqk", x, keys, preferred_element_type=jnp.float32)


def _weighed(p, values):
    """(R, block, n) (R, n, H) -> (R, block, H)."""
    return jnp.einsum("rqk,rkh->rqh", p.astype(values.dtype), values, preferred_element_type=jnp.float32)


def _taken(view: View, group: Group, rows, x):
    """Of x (S, H) what each row looks at, (R, n, H)."""
    return view.blocked(x)[jnp.asarray(group.columns)[rows]].reshape(len(rows), -1, x.shape[1])


def _positions(view: View, group: Group, rows):
    """Of queries (R, block, 1) and keys (R, 1, n)."""
    queries, keys = view.query_positions(group, rows), view.key_positions(jnp.asarray(group.columns)[rows])
    # Kept as they are, so that no index is computed again for every score.
    return lax.optimization_barrier((queries, keys[:, None]))


def _hidden(view: View, group: Group, rows):
    """What hides scores, added to them: 0 or MASKED, broadcasting to (R, block, n); None where all are seen."""
    seen = []
    if group.live is not None:
        seen.append(jnp.repeat(jnp.asarray(group.live)[rows], view.block_k, axis=1)[:, None])
    if (view.real if group.whole else view.known) is not None:
        seen.append(view.known_of(jnp.asarray(group.columns)[rows])[:, None])
    if not group.whole:
        seen.append(view.part.pattern(*_positions(view, group, rows)))
    if not seen:
        return None
    seen.append(view.zero == 0)
    return lax.optimization_barrier(jnp.where(functools.reduce(jnp.logical_and, seen), 0.0, MASKED))


def _added(into, group: Group, rows, x, p):
    """into (blocks, H, block), with x^T p of x (R, block, H) and p (R, block, n) added at the rows' keys."""
    H, block = into.shape[1:]
    own, near = group.width - group.shared, len(group.offsets)
    p = p.astype(x.dtype)
    found = jnp.einsum("rqh,rqk->rhk", x, p[..., : own * block], preferred_element_type=jnp.float32)
    for place, offset in enumerate(group.offsets):
        first = int(group.rows[0]) + offset + rows[0]
        more = lax.dynamic_slice_in_dim(into, first, len(rows)) + found[..., place * block : (place + 1) * block]
        into = lax.dynamic_update_slice_in_dim(into, more, first, 0)
    if own > near:
        others = found[..., near * block :].reshape(len(rows), H, -1, block).swapaxes(1, 2)
        into = into.at[jnp.asarray(group.columns[:, near:own])[rows]].add(others)
    if group.shared:
        x, p = x.reshape(-1, H), p[..., own * block :].reshape(-1, group.shared * block)
        found = jnp.dot(x.T, p, preferred_element_type=jnp.float32).reshape(H, -1, block)
        into = into.at[group.columns[0, own:]].add(found.swapaxes(0, 1))
    return into
