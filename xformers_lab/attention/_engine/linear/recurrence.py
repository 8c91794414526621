"""The chunked linear recurrence S_t = S_(t-1) + k_t v_t^T, out_t = q_t S_t: the engine of the linear family.

Within a chunk of C positions the causal products are C x C matrices, between chunks only the state passes, so the cost
is linear in the length. One head's chunks are batched, which keeps the temporary arrays at the size of one head.

Callers wrap their whole head (features, recurrence, normalisation) in `jax.checkpoint`: the backward then recomputes it
from q, k and v, which is faster than reading back every intermediate array.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from xformers_lab.attention._engine.blocks import in_blocks, joined
from xformers_lab.attention._engine.products import EXACT


def linear_recurrence(q, k, v, *, chunk: int):
    """Causal sums: for the query at position p = S - T + t the sums over s <= p of (q_t . k_s) v_s and of (q_t . k_s).

    q (T, F), k (S, F), v (S, H) -> (T, H) and (T,), in float32. Queries before the first key get zeros.
    """
    T, S = q.shape[0], k.shape[0]
    if T > S:  # queries that stand before the first key
        out, total = linear_recurrence(q[T - S :], k, v, chunk=chunk)
        return jnp.pad(out, ((T - S, 0), (0, 0))), jnp.pad(total, (T - S, 0))
    before = S - T
    state = None
    if before:
        # Wide before the product: some batches of a product of halves that is wide XLA:CPU compiles, but cannot run.
        earlier, values = k[:before].astype(jnp.float32), v[:before].astype(jnp.float32)
        state = earlier.T @ values, earlier.sum(0)
    return continued(q, k[before:], v[before:], state, chunk=chunk)[:2]


def continued(q, k, v, state, *, chunk: int):
    """`linear_recurrence` of as many queries as keys behind a state, the sums (F, H) of k v^T and (F,) of k, or None
    for zeros -> (T, H), (T,) and the last state, which is not computed where there was none and one chunk is all."""
    T = len(q)
    q, k, v = (in_blocks(x, min(chunk, T)) for x in (q, k, v))
    out, total, end = _chunked(q, k, v, state)
    return joined(out, T), joined(total, T), end


def before_each(merge, start, new):
    """States (M, ...) before each of `new` (M, ...), from merge(state, new), and the last state."""
    last, states = lax.scan(lambda state, new: (merge(state, new), state), start, new)
    return states, last


def _chunked(q, k, v, state):
    """q, k (M, C, F), v (M, C, H), state (F, H) and (F,) before the first chunk, or None -> (M, C, H), (M, C) and
    the state behind the last."""
    weights = jnp.einsum("mcf,mdf->mcd", q, k, **EXACT) * jnp.tril(jnp.ones((q.shape[1],) * 2))
    out, total = jnp.einsum("mcd,mdh->mch", weights.astype(v.dtype), v, **EXACT), weights.sum(-1)
    if len(q) == 1 and state is None:
        return out, total, None
    if state is None:
        state = jnp.zeros((k.shape[2], v.shape[2]), jnp.float32), jnp.zeros(k.shape[2], jnp.float32)
    added = jnp.einsum("mcf,mch->mfh", k, v, **EXACT), k.astype(jnp.float32).sum(1)
    (states, sums), end = before_each(functools.partial(jax.tree.map, jnp.add), state, added)
    out += jnp.einsum("mcf,mfh->mch", q, states.astype(q.dtype), **EXACT)
    total += jnp.einsum("mcf,mf->mc", q, sums.astype(q.dtype), **EXACT)
    return out, total, end
