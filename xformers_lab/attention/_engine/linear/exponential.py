"""The chunked recurrence of exponential gates, kept relative to its largest weight so that no gate overflows.

    S_t = a_t S_(t-1) + exp(e_t) k_t v_t^T,   z_t = a_t z_(t-1) + exp(e_t) k_t

with a_t <= 1 given as logarithms and e_t of any size. What is given for a query is to be multiplied by exp of a
logarithm that comes with it, the largest weight that the query sees.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from xformers_lab.attention._engine.blocks import in_blocks, joined
from xformers_lab.attention._engine.linear.features import added, merged
from xformers_lab.attention._engine.linear.gated import product
from xformers_lab.attention._engine.linear.recurrence import before_each
from xformers_lab.attention._engine.softmax import MASKED


def exponential_gates(q, k, v, log, decay, state, *, chunk: int):
    """q and k (T, F), v (T, H), log e and decay (T,), and the state before them: S (F, H), z (F,) and the logarithm ()
    of what both are to be multiplied by -> q_t S_t (T, H) and q_t . z_t (T,), both to be multiplied by exp of the third
    (T,), in float32, and the last state.

    No derivative goes through the third: whoever uses all three must give something that does not depend on it.
    """
    T, C = len(q), min(chunk, len(q))
    q, k, v = (in_blocks(x, C) for x in (q, k, v))
    log = in_blocks(log.astype(jnp.float32), C, fill=MASKED)
    fall = jnp.cumsum(in_blocks(decay.astype(jnp.float32), C), 1)  # (M, C), from before the chunk
    last = fall[:, -1:]

    def faded(state, new):
        new, last = new
        return merged((*state[:2], state[2] + last), new)

    start = state[0].T, *state[1:]
    of_chunks = jax.vmap(added)(k, v, log + last - fall)
    (states, sums, tops), end = before_each(faded, start, (of_chunks, last[:, 0]))
    seen = np.tril(np.ones((C, C), bool))
    logs = jnp.where(seen, fall[:, :, None] - fall[:, None] + log[:, None], MASKED)
    past = tops[:, None] + fall
    top = lax.stop_gradient(jnp.maximum(past, logs.max(-1)))
    weights = product("mcf,mdf->mcd", q, k) * jnp.exp(logs - top[..., None])
    past = jnp.exp(past - top)
    out = product("mcd,mdh->mch", weights.astype(v.dtype), v)
    out += product("mcf,mhf->mch", q, states.astype(q.dtype)) * past[..., None]
    total = weights.sum(-1) + product("mcf,mf->mc", q, sums.astype(q.dtype)) * past
    return (joined(out, T), joined(total, T), joined(top, T)), (end[0].T, *end[1:])
