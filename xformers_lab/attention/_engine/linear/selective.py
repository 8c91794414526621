"""The selective scan: a diagonal recurrence for every channel and state, whose states of a whole sequence never exist.

    s_t = exp(d_t A) s_(t-1) + d_t x_t b_t^T,   y_t = s_t c_t

with s (I, n), intervals d_t and inputs x_t (I,), rates A (I, n) below 0, b_t and c_t (n,). No two channels or states
share a decay, so no product of matrices over positions gives it: within a chunk an associative scan does, in the
logarithm of the chunk's length many steps, and from chunk to chunk the state passes. The backward pass computes a
chunk's states again from that before it, so T / chunk states are kept and those of one chunk exist at a time.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from xformers_lab.attention._engine.blocks import in_blocks, joined


def selective_scan(x, interval, b, c, rate, *, chunk: int, state=None):
    """x and interval (B, T, I), b and c (B, T, n), rate A (I, n), all in float32, and the state (B, I, n) before them,
    if it is not zeros -> (B, T, I) and the last state.

    A position whose interval is 0 writes nothing and forgets nothing.
    """
    T = x.shape[1]

    @jax.checkpoint
    def one(state, chunk):
        x, interval, b, c = chunk
        kept, added = _change(x, interval, b, rate)
        kept, states = lax.associative_scan(_after, (kept, added), axis=1)
        states += kept * state[:, None]
        return states[:, -1], _read(states, c)

    state = jnp.zeros((x.shape[0], *rate.shape)) if state is None else state
    chunks = tuple(in_blocks(array, min(chunk, T), axis=1) for array in (x, interval, b, c))
    state, y = lax.scan(one, state, chunks)
    return joined(y, T, axis=1), state


def by_definition(x, interval, b, c, rate):
    """The same, position after position."""
    in_turn = lambda array: jnp.swapaxes(array, 0, 1)
    state = jnp.zeros((x.shape[0], *rate.shape))
    step = functools.partial(one_more, rate=rate)
    return in_turn(lax.scan(lambda state, at: step(state, *at), state, tuple(map(in_turn, (x, interval, b, c))))[1])


def one_more(state, x, interval, b, c, *, rate):
    """One position: state (B, I, n), x and interval (B, I), b and c (B, n) -> the next state, y (B, I)."""
    kept, added = _change(x, interval, b, rate)
    state = kept * state + added
    return state, _read(state, c)


def _change(x, interval, b, rate):
    """What positions (..., I) leave of a state and add to it, each (..., I, n)."""
    return jnp.exp(interval[..., None] * rate), (interval * x)[..., None] * b[..., None, :]


def _after(first, second):
    """Two changes of a state, one after the other, as one."""
    return first[0] * second[0], second[0] * first[1] + second[1]


def _read(states, c):
    return (states * c[..., None, :]).sum(-1)
