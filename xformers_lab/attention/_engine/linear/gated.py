"""Chunked recurrences whose state fades or is corrected: the engine of the gated half of the linear family.

    S_t = a_t S_(t-1) + k_t u_t^T,   out_t = q_t S_t

with a_t <= 1 a scalar or one number per key channel (in `value_decay` per value channel), and u_t = v_t, or under the
delta rule the correction u_t = b_t (v_t - a_t k_t S_(t-1)). Within a chunk of C positions everything is products of
matrices, between chunks only the state passes. Decays are given as logarithms, and only differences that are at most 0
are ever raised to a power, so nothing overflows however strong a decay is.

Triangles within a chunk are built by halves: what the second half of 2s positions has to do with the first is a
product, for s = 1, 2, 4, ... Two forms would be shorter and are wrong on CPU (jaxlib 0.10.2). Two batched triangular
solves in one program starve XLA's thread pool and never end. And a sum of products over an axis that is not the last,
in an array of seven or more axes, which is what a loop over pairs of positions becomes once samples and heads are
batched, is miscompiled for processors with AVX2 but no AVX-512: wrong sums, or a crash. Products of matrices have
neither fault.

All take q and k (T, F), v (T, H), and the state (F, H) before them, if it is not zeros, and give (T, H) in float32 and
the last state (F, H). A position that must count for
nothing has k = 0 and decay 0 (in logarithms). Callers wrap their whole head in `jax.checkpoint`.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jax import lax

from xformers_lab.attention._engine.blocks import in_blocks, joined
from xformers_lab.attention._engine.linear.recurrence import before_each
from xformers_lab.attention._engine.products import inverts
from xformers_lab.attention._engine.softmax import MASKED


def scalar_decay(q, k, v, decay, *, chunk: int, state=None):
    """decay (T,): log a_t, at most 0."""
    T, C = len(q), min(chunk, len(q))
    q, k, v, decay = (in_blocks(x, C) for x in (q, k, v, decay))
    fall = jnp.cumsum(decay.astype(jnp.float32), 1)  # (M, C), from before the chunk
    inside = product("mcf,mdf->mcd", q, k) * falling(fall)
    out = product("mcd,mdh->mch", inside.astype(v.dtype), v)
    last = fall[:, -1:]
    added = product("mcf,mch->mfh", k * jnp.exp(last - fall)[..., None].astype(k.dtype), v)
    states, end = _states(added, jnp.exp(last[..., None]), state)
    out += product("mcf,mfh->mch", (q * jnp.exp(fall)[..., None]).astype(q.dtype), states.astype(q.dtype))
    return joined(out, T), end


def channel_decay(q, k, v, decay, *, chunk: int, state=None):
    """decay (T, F): log a_t of every key channel, at most 0. The chunk is rounded up to a power of two."""
    T, C = len(q), power_of_two(min(chunk, len(q)))
    q, k, v, decay = (in_blocks(x, C) for x in (q, k, v, decay))
    fall = jnp.cumsum(decay.astype(jnp.float32), 1)  # (M, C, F)
    last = fall[:, -1:]
    added = product("mcf,mch->mfh", (k * jnp.exp(last - fall)).astype(k.dtype), v)
    states, end = _states(added, jnp.exp(last).swapaxes(1, 2), state)
    out = product("mcf,mfh->mch", (q * jnp.exp(fall)).astype(q.dtype), states.astype(q.dtype))
    inside = channel_weights(q, k, fall)
    out += product("mcd,mdh->mch", inside.astype(v.dtype), v)
    return joined(out, T), end


def channel_weights(q, k, fall, reached=None):
    """(M, C, C): sum_f q_if k_jf exp(fall_if - fall_jf) for j <= i, with fall (M, C, F) the logarithm of all decays up
    to a position. With `reached`, those up to the position before, it is exp(reached_if - fall_jf) for j < i.

    The fall at the end of a first half lies between those of its positions and of the second half's, so both factors
    of exp(fall_i - fall_j) are at most 1.
    """
    M, C = q.shape[:2]
    weights = jnp.zeros((M * C, 1, 1)) if reached is not None else (q * k).astype(jnp.float32).sum(-1).reshape(-1, 1, 1)
    reached = fall if reached is None else reached
    s = 1
    while s < C:
        (_, later), (earlier, _) = _halves(q, s), _halves(k, s)
        (before, _), (_, after) = _halves(fall, s), _halves(reached, s)
        end = before[:, -1:]
        left, right = later * jnp.exp(after - end), earlier * jnp.exp(end - before)
        weights = _lower(weights, product("nif,njf->nij", left.astype(q.dtype), right.astype(k.dtype)))
        s *= 2
    return weights.reshape(M, C, C)


def value_decay(q, k, v, decay, *, chunk: int, state=None):
    """S_t = S_(t-1) diag(a_t) + k_t v_t^T with decay (T, H): log a_t of every channel of the values, at most 0.

    The chunk is rounded up to a power of two.
    """
    T, C = len(q), power_of_two(min(chunk, len(q)))
    q, k, v, decay = (in_blocks(x, C) for x in (q, k, v, decay))
    fall = jnp.cumsum(decay.astype(jnp.float32), 1)  # (M, C, H)
    last = fall[:, -1:]
    added = product("mcf,mch->mfh", k, (v * jnp.exp(last - fall)).astype(v.dtype))
    states, end = _states(added, jnp.exp(last), state)
    out = product("mcf,mfh->mch", q, states.astype(q.dtype)) * jnp.exp(fall)
    out += (q * k).astype(jnp.float32).sum(-1, keepdims=True) * v
    s = 1
    while s < C:  # what a second half sees of the first, as in `channel_weights`
        (_, later), (earlier, _), (values, _) = (_halves(x, s) for x in (q, k, v))
        before, after = _halves(fall, s)
        ends = before[:, -1:]
        seen = product("nif,njf->nij", later, earlier).astype(v.dtype)
        new = product("nij,njh->nih", seen, (values * jnp.exp(ends - before)).astype(v.dtype)) * jnp.exp(after - ends)
        out += jnp.concatenate([jnp.zeros_like(new), new], 1).reshape(out.shape)
        s *= 2
    return joined(out, T), end


def delta_rule(q, k, v, beta, decay=None, *, chunk: int, state=None):
    """beta (T,): how much of the error is corrected; decay: log a_t, at most 0, (T,), or (T, F) of every key channel,
    where the chunk is rounded up to a power of two; None: nothing fades.

    In a chunk the corrections U solve a unit triangular system, (I + b A) U = b (V - a K S), with A_ij = k_i . k_j
    times the decay between (the WY form: Yang et al., 2024, arXiv 2406.06484, equations 7 to 10; with a decay of every
    channel: Kimi Team, 2025, arXiv 2510.26692, section 3.1).
    """
    T, C = len(q), min(chunk, len(q))
    decay = jnp.zeros(T) if decay is None else decay
    by_channel = decay.ndim == 2
    C = power_of_two(C) if by_channel else C
    q, k, v, decay = (in_blocks(x, C) for x in (q, k, v, decay if by_channel else decay[:, None]))
    beta = in_blocks(beta[:, None], C).astype(jnp.float32)
    fall = jnp.cumsum(decay.astype(jnp.float32), 1)  # (M, C, F or 1)
    if by_channel:
        of_keys, weights = channel_weights(k, k, fall), channel_weights(q, k, fall)
    else:
        ratio = falling(fall[..., 0])
        of_keys, weights = (product("mcf,mdf->mcd", x, k) * ratio for x in (k, q))
    solution = inverse(beta * of_keys * jnp.tril(jnp.ones((C, C)), -1))
    passed = jnp.exp(fall)
    right = jnp.concatenate([beta * v, beta * passed * k], -1).astype(jnp.float32)
    fresh, from_state = jnp.split(solution @ right, [v.shape[-1]], -1)
    last = fall[:, -1:]
    written = k * jnp.exp(last - fall)

    def one(state, chunk):
        fresh, from_state, weights, q, written, whole = chunk
        u = fresh - from_state @ state
        return whole * state + written.T @ u, q @ state + weights @ u

    chunks = fresh, from_state, weights, q * passed, written, jnp.exp(last).swapaxes(1, 2)
    start = jnp.zeros((q.shape[-1], v.shape[-1])) if state is None else state
    end, out = lax.scan(one, start, chunks)
    return joined(out, T), end


@functools.partial(inverts, kept=lambda grad: jnp.tril(grad, -1))
def inverse(below):
    """(I + below)^-1 of matrices (M, C, C) that hold numbers only below the diagonal.

    Of two halves with the inverses A and D and what lies between them, B, the inverse is [[A, 0], [-D B A, D]].
    """
    M, C, _ = below.shape
    wide = power_of_two(C)
    below = jnp.pad(below, ((0, 0), (0, wide - C), (0, wide - C)))
    solution = jnp.ones((M * wide, 1, 1), below.dtype)
    s = 1
    while s < wide:
        first, second = solution[::2], solution[1::2]
        corner = -(second @ _corners(below, s) @ first)
        solution = _lower(solution, corner)
        s *= 2
    return solution[:, :C, :C]


def power_of_two(length: int) -> int:
    """The least power of two that is not below `length`."""
    return 1 << (length - 1).bit_length()


def _halves(x, s: int):
    """(M, C, F) -> first and second halves of every 2s positions, each (M C / 2s, s, F)."""
    pairs = x.reshape(-1, 2, s, x.shape[-1])
    return pairs[:, 0], pairs[:, 1]


def _corners(x, s: int):
    """(M, C, C) -> (M C / 2s, s, s): rows of the second half of every 2s positions, columns of the first."""
    M, C, _ = x.shape
    first = np.arange(0, C // s, 2)
    pairs = x.reshape(M, C // s, s, C // s, s)[:, first + 1, :, first]  # (C / 2s, M, s, s)
    return jnp.swapaxes(pairs, 0, 1).reshape(-1, s, s)


def _lower(diagonal, corner):
    """Blocks (2n, s, s) on the diagonal and (n, s, s) below it -> (n, 2s, 2s), zeros above."""
    first, second = diagonal[::2], diagonal[1::2]
    top = jnp.concatenate([first, jnp.zeros_like(first)], 2)
    return jnp.concatenate([top, jnp.concatenate([corner.astype(second.dtype), second], 2)], 1)


def falling(fall):
    """(M, C, C): exp(fall_i - fall_j) for j <= i, else 0."""
    seen = jnp.tril(jnp.ones((fall.shape[1],) * 2, bool))
    return jnp.exp(jnp.where(seen, fall[:, :, None] - fall[:, None], MASKED))


def _states(added, kept, start):
    """States before each chunk (M, F, H), and after the last: state = kept (M, F or 1, 1) state + added (M, F, H)."""
    merge = lambda state, new: new[1] * state + new[0]
    start = jnp.zeros(added.shape[1:], jnp.float32) if start is None else start
    return before_each(merge, start, (added, kept))


def product(equation: str, a, b):
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def aligned(run, q, keys: dict, valid):
    """run(q, **keys) over all positions, with queries at the end of them: q (T, F), keys of (S, ...) -> (T, H).

    Keys that are padding become zeros, in every array: they write nothing, and a decay of 0 forgets nothing. Earlier
    positions than the first query only write; queries before the first key get zeros.
    """
    T, S = len(q), len(next(iter(keys.values())))
    if valid is not None:
        keys = {name: jnp.where(valid.reshape(-1, *[1] * (x.ndim - 1)), x, 0) for name, x in keys.items()}
    if T > S:
        return jnp.pad(aligned(run, q[T - S :], keys, None), ((T - S, 0), (0, 0)))
    return run(jnp.pad(q, ((S - T, 0), (0, 0))), **keys)[S - T :]


def by_definition(update, state, q, keys: dict, valid):
    """The same by definition: out, state = update(state, q_t, **keys_t) position after position."""

    def run(q, **keys):
        def one(state, position):
            out, state = update(state, position[0], **position[1])
            return state, out

        return lax.scan(one, state, (q, keys))[1]

    return aligned(run, q, keys, valid)
