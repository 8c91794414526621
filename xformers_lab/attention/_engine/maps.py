"""Attention whose map of queries and keys is given, kept or handed on, rather than computed from q and k alone.

Blocks of queries are computed one after the other and again in the backward, so that what is T x S is only what a
mechanism takes or gives. The two products have gradients of their own: XLA:CPU runs p.T @ do, which differentiation
would give, three times slower than do.T @ p.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from xformers_lab.attention._engine.softmax import EMPTY, MASKED

# Queries per block: rows of some thousand scores then stay in the cache of a CPU.
BLOCK = 128
# From this many queries on, causal ones come in quarters that are given no more keys than they may see.
LONG, QUARTERS = 1024, 4


def by_blocks(row, queries, S: int, causal: bool):
    """row(queries of a block, at (C, 1), keys) on blocks of C queries; its results are joined along the first axis.

    queries is a pytree of arrays with a leading axis T; query t stands at position S - T + t, which is its `at`. A
    block can see no more than the first `keys` of the S keys.
    """
    T = jax.tree.leaves(queries)[0].shape[0]
    size, found = -(-T // (QUARTERS if causal and T >= LONG else 1)), []
    for first in range(0, T, size):
        last = min(first + size, T)
        keys = min(S, max(1, S - T + last)) if causal else S
        part = jax.tree.map(lambda x, first=first, last=last: x[first:last], queries)
        found.append(_by_blocks(functools.partial(row, keys=keys), part, S - T + first))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *found)


def _by_blocks(row, queries, first: int):
    T = jax.tree.leaves(queries)[0].shape[0]
    C = -(-T // -(-T // BLOCK))
    if T == C:
        return jax.checkpoint(row)(queries, first + jnp.arange(T)[:, None])
    pad = -T % C
    blocks = lambda x: jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, C, *x.shape[1:])
    run = jax.checkpoint(lambda given: row(*given), prevent_cse=False)
    found = lax.map(run, (jax.tree.map(blocks, queries), first + jnp.arange(T + pad).reshape(-1, C, 1)))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:T], found)


def seen_from(at, keys: int, valid, causal: bool):
    """(C, keys) bool: what queries at positions `at` (C, 1) may see of the first `keys` keys."""
    seen = jnp.arange(keys)[None] <= (at if causal else keys)
    return seen if valid is None else seen & valid[None, :keys]


def widened(x, S: int):
    """(C, keys) with zeros for the keys up to S."""
    return jnp.pad(x, ((0, 0), (0, S - x.shape[1])))


def biased(s, bias, at):
    """s (C, keys) with what `bias` adds for queries at positions `at` (C, 1)."""
    return s if bias is None else s + bias(at, jnp.arange(s.shape[1])[None])


def weights(s, seen):
    """softmax(s) over the seen keys; zeros in a row that sees none."""
    s = jnp.where(seen, s, MASKED)
    p = jnp.exp(s - lax.stop_gradient(jnp.maximum(s.max(-1, keepdims=True), EMPTY)))
    total = p.sum(-1, keepdims=True)
    return p / jnp.where(total > 0, total, 1)


def by_definition(s, seen, v):
    """softmax(s) v over the seen keys, and the softmax, written plainly: what references do."""
    p = jnp.where(seen, jax.nn.softmax(jnp.where(seen, s, MASKED)), 0)
    return jnp.dot(p, v.astype(jnp.float32)).astype(v.dtype), p


@jax.custom_vjp
def products(q, k):
    """q k^T in float32: (T, H) (S, H) -> (T, S)."""
    return jnp.dot(q, k.T, preferred_element_type=jnp.float32)


def _products_backward(given, grad):
    q, k = given
    grad = grad.astype(k.dtype)
    dq = jnp.dot(grad, k, preferred_element_type=jnp.float32)
    return dq.astype(q.dtype), _transposed_product(q, grad).astype(k.dtype)


products.defvjp(lambda q, k: (products(q, k), (q, k)), _products_backward)


@jax.custom_vjp
def weighted(p, v):
    """p v in float32: (T, S) (S, H) -> (T, H)."""
    return jnp.dot(p.astype(v.dtype), v, preferred_element_type=jnp.float32)


def _weighted_backward(given, grad):
    p, v = given
    grad = grad.astype(v.dtype)
    dp = jnp.dot(grad, v.T, preferred_element_type=jnp.float32)
    return dp.astype(p.dtype), _transposed_product(grad, p.astype(v.dtype)).astype(v.dtype)


weighted.defvjp(lambda p, v: (weighted(p, v), (p, v)), _weighted_backward)


def _transposed_product(x, p):
    """p.T x as (x.T p).T: (T, H) (T, S) -> (S, H); the barrier keeps XLA from turning it back into the slow form."""
    return lax.optimization_barrier(jnp.dot(x.T, p, preferred_element_type=jnp.float32)).T
