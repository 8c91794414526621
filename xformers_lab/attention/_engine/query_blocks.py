"""Rows of queries against all keys, for weights that are not a plain softmax of the scores.

One block of queries at a time: scores, then `weigh`, then weights times values. The backward computes each block's
weights again, so memory is linear in the keys, and time is that of all pairs. q, k and v may have an axis of heads in
front, which `weigh` may mix. Weights that look at positions alone belong to the block-sparse engine.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from xformers_lab.nn.plan import Plan

# Queries at once: enough for wide products, few enough that a block of scores stays in cache.
ROWS, CAUSAL_ROWS = 512, 256
# From this many keys on, causal queries come in eighths that see no more keys than they may: 9/16 of the square.
LONG, EIGHTHS = 1024, 8


def rows(q, k, v, weigh, leaves, *, valid=None, causal=False, at_once: int | None = None):
    """weigh(scores, seen, positions, leaves) @ v -> (..., T, H) in v's type.

    q (..., T, H), k and v (..., S, H), valid (S,) bool or None; query t stands at position S - T + t. `weigh` gets
    float32 scores (..., C, S') of C queries, scaled by 1 / sqrt(H), seen (C, S') bool, positions ((C, 1), (1, S')), and
    `leaves`, a pytree that is differentiated; it gives float32 weights, zero where nothing is seen. at_once: queries
    per block, by default as many as one head should have.
    """
    T, S = q.shape[-2], k.shape[-2]
    at_once = at_once or (CAUSAL_ROWS if causal else ROWS)
    if not causal or min(T, S) < LONG:
        return _rows(q, k, v, valid, leaves, weigh, S - T, causal, at_once)
    size, parts = -(-T // EIGHTHS), []
    for first in range(0, T, size):
        # T > S: queries before the first key are given one, which is masked.
        last, keys = min(first + size, T), max(1, min(S, S - T + first + size))
        part = q[..., first:last, :], k[..., :keys, :], v[..., :keys, :], None if valid is None else valid[:keys]
        parts.append(_rows(*part, leaves, weigh, S - T + first, causal, at_once))
    return jnp.concatenate(parts, -2)


def readings(q, k, read, leaves, *, valid=None, causal=False, at_once: int = ROWS):
    """read(scores, seen, positions, leaves) of one block of queries at a time, numbers (C,) -> (T,)."""
    T, S, scale = q.shape[-2], k.shape[-2], q.shape[-1] ** -0.5

    @jax.checkpoint
    def row(index, q, k, leaves):
        seen, positions = _seen(S - T + index * q.shape[-2], q.shape[-2], S, valid, causal)
        return read(_product(q * scale, jnp.swapaxes(k, -1, -2)), seen, positions, leaves)

    blocks = _blocked(q, at_once)
    return lax.map(lambda each: row(*each, k, leaves), (jnp.arange(len(blocks)), blocks)).reshape(-1)[:T]


def over_samples(one, q, k, v, valid, *, plan: Plan):
    """Run `one(q, k, v, valid)` on every sample of (B, N, T, H), (B, N, S, H) and (B, S): one by one where the plan
    says so, which keeps the scores of a block in cache."""
    if plan.loops(q.shape[2], k.shape[2]):
        return lax.map(lambda each: one(*each), (q, k, v, valid))
    return jax.vmap(one)(q, k, v, valid)


def largest(T: int, S: int, H: int, at_once: int = ROWS) -> int:
    """Elements of the largest array of one head: a block of scores, or queries or keys."""
    return max(block(T, at_once) * S, T * H, S * H)


def block(T: int, at_once: int) -> int:
    """The size of the fewest equal blocks of at most `at_once` queries."""
    return -(-T // -(-T // at_once))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _rows(q, k, v, valid, leaves, weigh, first, causal, at_once):
    return _forward(q, k, v, valid, leaves, weigh, first, causal, at_once)[0]


def _forward(q, k, v, valid, leaves, weigh, first, causal, at_once):
    T, scale = q.shape[-2], q.shape[-1] ** -0.5
    kT = jnp.swapaxes(k, -1, -2)

    def row(each):
        index, q = each
        seen, positions = _seen(first + index * q.shape[-2], q.shape[-2], k.shape[-2], valid, causal)
        p = weigh(_product(q * scale, kT), seen, positions, leaves)
        return _product(p.astype(v.dtype), v).astype(v.dtype)

    blocks = _blocked(q, at_once)
    out = _unblocked(lax.map(row, (jnp.arange(len(blocks)), blocks)), T)
    return out, (q, k, v, valid, leaves)


def _backward(weigh, first, causal, at_once, saved, grad):
    q, k, v, valid, leaves = saved
    T, scale = q.shape[-2], q.shape[-1] ** -0.5
    kT, vT = jnp.swapaxes(k, -1, -2), jnp.swapaxes(v, -1, -2)

    def row(totals, each):
        index, q, g = each
        seen, positions = _seen(first + index * q.shape[-2], q.shape[-2], k.shape[-2], valid, causal)
        s = _product(q * scale, kT)
        p, pull = jax.vjp(lambda s, leaves: weigh(s, seen, positions, leaves), s, leaves)
        ds, dleaves = pull(_product(g, vT))
        p, ds = p.astype(v.dtype), ds.astype(k.dtype)
        # Transposed, because XLA:CPU runs a product whose left side is contracted on its major axis much slower.
        added = _product(jnp.swapaxes(q, -1, -2), ds), _product(jnp.swapaxes(g, -1, -2), p), dleaves
        return jax.tree.map(jnp.add, totals, added), _product(ds, k)

    zeros = lambda x: jnp.zeros(x.shape, jnp.float32)
    blocks, grads = _blocked(q, at_once), _blocked(grad, at_once)
    totals = zeros(kT), zeros(vT), jax.tree.map(jnp.zeros_like, leaves)
    (dkT, dvT, dleaves), dq = lax.scan(row, totals, (jnp.arange(len(blocks)), blocks, grads))
    dk, dv = jnp.swapaxes(dkT, -1, -2) * scale, jnp.swapaxes(dvT, -1, -2)
    dq = _unblocked(dq, T) * scale
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, dleaves


_rows.defvjp(_forward, _backward)


def _product(a, b):
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _seen(first, C: int, S: int, valid, causal: bool):
    """What C queries from position `first` on see (C, S), and positions ((C, 1), (1, S))."""
    at, keys = (first + jnp.arange(C))[:, None], jnp.arange(S)[None]
    seen = keys <= at if causal else jnp.ones((C, S), bool)
    return seen if valid is None else seen & valid, (at, keys)


def _blocked(x, at_once: int):
    """(..., T, H) -> (blocks, ..., C, H)."""
    T, size = x.shape[-2], block(x.shape[-2], at_once)
    count = -(-T // size)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, count * size - T), (0, 0)])
    return jnp.moveaxis(x.reshape(*x.shape[:-2], count, size, x.shape[-1]), -3, 0)


def _unblocked(x, T: int):
    """(blocks, ..., C, H) -> (..., T, H)."""
    x = jnp.moveaxis(x, 0, -3)
    return x.reshape(*x.shape[:-3], math.prod(x.shape[-3:-1]), x.shape[-1])[..., :T, :]
