"""Recurrences that keep runs of positions apart: states at the nodes of a Fenwick tree, with a scale for every level.

    out_t = sum_(s <= t) l_t[level(t, s)] q_t T_t ... T_(s+1) k_s u_s^T,   level(t, s) = number of bits of t xor s

T_t = a_t and u_s = v_s, or under the delta rule T_t = a_t (I - b_t k_t k_t^T) and u_s = b_s v_s. Level 0 is the
position itself; each bit j of t that is 1 has a run of 2^j positions at level j + 1. Behind position 13, 1101 in bits,
these are 1, 4 and 8 positions, the nearest first. The last scale serves whatever lies beyond: with one scale alone all
of this is a recurrence of `gated`.

Within a chunk, levels are a mask of its products. Above it they pair up halves of 2, 4, 8, ... chunks: queries of a
second half, brought back to the border between the two, look at the state that the first half ends with. So a level is
products of matrices over half of the positions, and there is no loop over chunks.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax

from xformers_lab.attention._engine.linear.gated import falling, inverse, power_of_two, product


def level_of(query, key):
    """The level of a key for a query, integers or arrays of them that broadcast: how many bits t xor s has."""
    apart = query ^ key
    return sum((apart >> bit) > 0 for bit in range(31))


def level_count(length: int) -> int:
    """How many levels there are in `length` positions."""
    return 1 + (length - 1).bit_length()


def by_levels(q, scales, k, v, decay, beta=None, *, chunk: int):
    """q and k (T, F), v (T, H), scales (T, L), decay (T,): log a_t, at most 0, and for the delta rule beta (T,), the
    first of them at position 0 -> (T, H) in float32.

    The chunk is rounded up to a power of two, and so is the number of chunks.
    """
    T, last = len(q), scales.shape[1] - 1
    C = power_of_two(min(chunk, T))
    M = power_of_two(-(-T // C))
    in_chunks = lambda x: jnp.pad(x, ((0, M * C - T), (0, 0))).reshape(M, C, -1)
    q, scales, k, v = (in_chunks(x) for x in (q, scales, k, v))
    fall = jnp.cumsum(in_chunks(decay[:, None]).astype(jnp.float32), 1)  # (M, C, 1), from before the chunk
    if beta is None:
        weights, asked, kept, added = _fading(q, k, v, fall)
    else:
        weights, asked, kept, added = _correcting(q, k, v, fall, in_chunks(beta[:, None]).astype(jnp.float32))
    out = product("mcd,mdh->mch", (weights * _of_levels(scales)).astype(v.dtype), v)
    passed = jnp.multiply if beta is None else jnp.matmul
    for level in range(level_count(C), level_count(M * C)):
        (first, asks), (before, after) = _halves(asked), _halves(out)
        (state, more), (kept, keeps), scale = _halves(added), _halves(kept), _halves(scales)[1]
        seen = product("mcf,mfh->mch", asks.astype(q.dtype), state.astype(q.dtype))
        out = jnp.concatenate([before, after + seen * scale[..., min(level, last), None]], 1)
        asked, scales = jnp.concatenate([first, passed(asks, kept)], 1), scales.reshape(len(scale), -1, last + 1)
        added, kept = passed(keeps, state) + more, passed(keeps, kept)
    return out.reshape(M * C, -1)[:T]


def one_more(states, q, scales, k, v, decay, beta=None, *, at):
    """The position `at` () behind states (L, F, H), which hold a level each: q and k (F,), v (H,), scales (L,) -> (H,)
    and the states that the next position finds."""
    states = jnp.exp(decay) * states
    if beta is not None:
        k, states = beta * k, states - beta * k[:, None] * (k @ states)[:, None]
    states = states.at[0].add(jnp.outer(k, v))
    out = scales @ (q @ states)
    # The runs of one bits at the end of `at`, and the position itself, are one run for the next position.
    above = jnp.minimum(lax.population_count(at ^ (at + 1)), len(states) - 1)
    joins = (jnp.arange(len(states)) < above)[:, None, None]
    total = jnp.where(joins, states, 0).sum(0)
    return out, jnp.where(joins, 0, states).at[above].add(total)


def by_definition(q, scales, k, v, decay, beta=None):
    """What `by_levels` gives, from one source to the one before it: queries (T, F) are brought back through the
    transitions of all positions behind it, and its weight for each is their product with its key, times the scale of
    its level."""
    T = len(q)
    at = jnp.arange(T)

    def one(asked, source):
        s, k, decay, beta = source
        asked = jnp.where((at == s)[:, None], q, asked)
        seen = asked @ k
        weight = seen if beta is None else seen * beta
        of_level = jnp.minimum(level_of(at, s), scales.shape[1] - 1)
        weight = jnp.where(at >= s, weight * jnp.take_along_axis(scales, of_level[:, None], 1)[:, 0], 0)
        asked = asked if beta is None else asked - beta * jnp.outer(seen, k)
        return jnp.exp(decay) * asked, weight

    return lax.scan(one, jnp.zeros_like(q), (at, k, decay, beta), reverse=True)[1].T @ v


def _fading(q, k, v, fall):
    """Of chunks (M, C, ...) whose state only fades: the weights of their own keys (M, C, C), queries as they ask the
    state before the chunk (M, C, F), what is kept of that behind it (M, 1, 1), and what is added to it (M, F, H)."""
    last = fall[:, -1:]
    added = product("mcf,mch->mfh", (k * jnp.exp(last - fall)).astype(k.dtype), v)
    return product("mcf,mdf->mcd", q, k) * falling(fall[..., 0]), q * jnp.exp(fall), jnp.exp(last), added


def _correcting(q, k, v, fall, beta):
    """The same under the delta rule, where it is a matrix (M, F, F) that keeps a state; see `gated.delta_rule`."""
    last, ratio, passed = fall[:, -1:], falling(fall[..., 0]), jnp.exp(fall)
    of_keys, weights = (product("mcf,mdf->mcd", x, k) * ratio for x in (k, q))
    solution = inverse(beta * jnp.tril(of_keys, -1)) * beta.swapaxes(1, 2)
    weights, of_state = weights @ solution, passed * k
    written = (k * jnp.exp(last - fall)).swapaxes(1, 2) @ solution
    kept = jnp.exp(last) * jnp.eye(k.shape[-1]) - written @ of_state
    return weights, q * passed - weights @ of_state, kept, written @ v


def _of_levels(scales):
    """(M, C, L) -> (M, C, C): the scale of each key of a chunk for its queries, up to themselves."""
    C, last = scales.shape[1:]
    at = np.arange(C)
    of_pair = np.minimum(level_of(at[:, None], at), last - 1)
    chosen = jnp.zeros((*scales.shape[:2], C))
    for level in range(of_pair.max() + 1):
        chosen = jnp.where(of_pair == level, scales[..., level, None], chosen)
    return chosen


def _halves(x):
    """(n, ...) -> the first and the second of every two, each (n / 2, ...)."""
    return x[::2], x[1::2]
