"""Feature maps of the linear family, and the sums over keys whose weights are dot products of features.

A map takes q or k (T, H) to features (T, F); the weight of key s for query t is phi(q_t) . phi(k_s). Maps that are
exponentials give their features relative to the position's largest, with its logarithm apart: where a key's size is
compared with that of other keys, it is with keys the query sees, so that no later key is felt, not even by rounding.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from xformers_lab.attention._engine.blocks import in_blocks, joined
from xformers_lab.attention._engine.linear.recurrence import before_each, continued, linear_recurrence
from xformers_lab.attention._engine.products import EXACT
from xformers_lab.attention._engine.softmax import MASKED

# Sums of weights below this are none: features that all but miss each other.
TINY = 1e-28


# ---- maps --------------------------------------------------------------------------------------------------------


def elu(x):
    return jax.nn.elu(x) + 1


def exponential(e):
    """exp(e) as features of at most 1 and the logarithm (T,) of what they are to be multiplied by."""
    log = lax.stop_gradient(e.max(-1))
    return jnp.exp(e - log[:, None]), log


# ---- sums --------------------------------------------------------------------------------------------------------


def sums(q, k, v, *, valid, causal: bool, chunk: int, log=None):
    """sum_s w_ts v_s and sum_s w_ts in float32, over all valid keys or those up to the query's position S - T + t.

    w_ts = q_t . k_s, or where `log` (S,) is given q_t . k_s exp(log_s - c_t) with c_t the largest log that t sees.
    """
    if valid is not None:
        k = jnp.where(valid[:, None], k, 0)
    if log is not None:
        log = log if valid is None else jnp.where(valid, log, MASKED)
        if causal:
            return scaled_recurrence(q, k, v, log, chunk=chunk)
        k = k * jnp.exp(log - log.max())[:, None]
    if causal:
        return linear_recurrence(q, k, v, chunk=chunk)
    # The state as (H, F): XLA:CPU contracts the narrower of two tall matrices faster on the left.
    state = jnp.dot(v.T, k, **EXACT).astype(q.dtype)
    return jnp.dot(q, state.T, **EXACT), jnp.dot(q, k.sum(0, dtype=jnp.float32).astype(q.dtype), **EXACT)


def scaled_recurrence(q, k, v, log, *, chunk: int):
    """`linear_recurrence` with keys of very different size: weights q_t . k_s exp(log_s - c_t), c_t = max_(s<=t) log_s.

    k must be zero where log is MASKED. The scale c_t cancels where the two sums are divided.
    """
    T, S = q.shape[0], k.shape[0]
    if T > S:  # queries that stand before the first key
        out, total = scaled_recurrence(q[T - S :], k, v, log, chunk=chunk)
        return jnp.pad(out, ((T - S, 0), (0, 0))), jnp.pad(total, (T - S, 0))
    before = S - T
    state = added(k[:before], v[:before], log[:before])
    return scaled_behind(q, k[before:], v[before:], log[before:], state, chunk=chunk)[:2]


def scaled_behind(q, k, v, log, state, *, chunk: int):
    """`scaled_recurrence` of as many queries as keys behind a state as `added` gives it -> (T, H), (T,), the state."""
    T, chunk = len(q), min(chunk, len(q))
    q, k, v = (in_blocks(x, chunk) for x in (q, k, v))
    log = in_blocks(log, chunk, fill=MASKED)
    (states, norms, tops), end = before_each(merged, state, jax.vmap(added)(k, v, log))
    seen = np.tril(np.ones((chunk, chunk), bool))
    top = jnp.maximum(tops[:, None], jnp.where(seen, log[:, None, :], MASKED).max(-1))
    scale = jnp.where(seen, jnp.exp(jnp.minimum(log[:, None, :] - top[:, :, None], 0)), 0)
    weights = jnp.einsum("mcf,mdf->mcd", q, k, **EXACT) * scale
    past = jnp.exp(tops[:, None] - top)
    out = jnp.einsum("mcd,mdh->mch", weights.astype(v.dtype), v, **EXACT)
    out += jnp.einsum("mcf,mhf->mch", q, states, **EXACT) * past[..., None]
    total = weights.sum(-1) + jnp.einsum("mcf,mf->mc", q, norms, **EXACT) * past
    return joined(out, T), joined(total, T), end


def added(k, v, log):
    """What keys (C, F) add to the state: (H, F), (F,), both to be multiplied by exp of the third."""
    top = log.max(initial=MASKED)
    k = k * jnp.exp(log - top)[:, None]
    return jnp.dot(v.T, k, **EXACT), k.sum(0, dtype=jnp.float32), top


def merged(state, new):
    """Two states of keys as that of all of them."""
    top = jnp.maximum(state[2], new[2])
    kept, weight = jnp.exp(state[2] - top), jnp.exp(new[2] - top)
    return state[0] * kept + new[0] * weight, state[1] * kept + new[1] * weight, top


def divided(out, total):
    """out / total by rows, 0 where total is 0 or as good as 0. Scaled first: a derivative divides by total squared."""
    seen = total > TINY
    scale = lax.stop_gradient(jnp.where(seen, 1 / jnp.where(seen, total, 1), 0))
    return out * scale[:, None] / jnp.where(seen, total * scale, 1)[:, None]


# ---- decoding ----------------------------------------------------------------------------------------------------


def empty_state(F: int, H: int):
    """No key yet: the sum of v k^T (H, F), that of k (F,), and the logarithm of what both are to be multiplied by."""
    return jnp.zeros((H, F), jnp.float32), jnp.zeros(F, jnp.float32), jnp.asarray(MASKED, jnp.float32)


def one_more(state, q, k, v, log=None):
    """The state with one more key (F,), and the two sums for the query (F,)."""
    log = jnp.zeros(1) if log is None else log
    state = merged(state, added(k[None], v[None], log))
    return state, state[0] @ q, state[1] @ q


def several_more(state, q, k, v, log=None, *, chunk: int):
    """`one_more` of T queries and keys (T, F) -> the state and the two sums (T, H) and (T,) of every query."""
    if log is not None:
        out, total, state = scaled_behind(q, k, v, log, state, chunk=chunk)
        return state, out, total
    # Without scales the logarithm is 0, or MASKED before the first key, where the sums are zeros.
    out, total, end = continued(q, k, v, (state[0].T, state[1]), chunk=chunk)
    assert end is not None, "there was a state"
    return (end[0].T, end[1], jnp.zeros_like(state[2])), out, total
