"""The chunked recurrence whose transition is a diagonal and one product of vectors: the delta rule of any two vectors.

    S_t = diag(a_t) S_(t-1) + w_t (r_t S_(t-1)) + k_t v_t^T,   out_t = q_t S_t

With w = -b k, r = a k and k scaled by b it is `delta_rule` with a decay of every channel, which has two products fewer.
Sums within a chunk are those of `gated`, and so is how decays are kept from overflowing.
"""

import jax.numpy as jnp
from jax import lax

from xformers_lab.attention._engine.blocks import in_blocks, joined
from xformers_lab.attention._engine.linear.gated import channel_weights, inverse, power_of_two, product


def low_rank(q, k, v, read, written, decay, *, chunk: int, state=None):
    """q, k, read r and written w (T, F), v (T, H), decay (T, F): log a_t, at most 0, and the state (F, H)
    before them, if it is not zeros -> (T, H) in float32 and the last state. The chunk is rounded up to a power of two.

    What a chunk's positions read, U with rows r_t S_(t-1), solves a unit triangular system: what is in the state before
    the chunk, what earlier positions of it add, and what these write of their own U.
    """
    T, C = len(q), power_of_two(min(chunk, len(q)))
    q, k, v, read, written, decay = (in_blocks(x.astype(jnp.float32), C) for x in (q, k, v, read, written, decay))
    fall = jnp.cumsum(decay, 1)
    reached, last = fall - decay, fall[:, -1:]  # the state is read before it fades
    solution = inverse(-channel_weights(read, written, fall, reached))
    right = jnp.concatenate([channel_weights(read, k, fall, reached) @ v, read * jnp.exp(reached)], -1)
    fresh, from_state = jnp.split(solution @ right, [v.shape[-1]], -1)
    inside = channel_weights(q, k, fall) @ v
    left = jnp.exp(last - fall)
    added = product("mcf,mch->mfh", k * left, v)

    def one(state, chunk):
        fresh, from_state, inside, weights, q, added, written, whole = chunk
        u = fresh + from_state @ state
        return whole * state + added + written.T @ u, q @ state + inside + weights @ u

    whole = jnp.exp(last).swapaxes(1, 2)
    of_queries = channel_weights(q, written, fall), q * jnp.exp(fall)
    chunks = fresh, from_state, inside, *of_queries, added, written * left, whole
    start = jnp.zeros((q.shape[-1], v.shape[-1])) if state is None else state
    end, out = lax.scan(one, start, chunks)
    return joined(out, T), end
