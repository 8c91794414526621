"""Softmax attention by definition, and the number that stands for a score that is not there."""

import jax.numpy as jnp
from jax import lax

from xformers_lab.attention._engine.algebra import Pattern

MASKED = -1e30
# The running maximum never falls below this, so a row that sees no key gets weights exp(MASKED - EMPTY) = 0.
EMPTY = MASKED / 2


def dense(q, k, v, *, pattern: Pattern, valid=None, bias=None):
    """The same by definition: one (T, S) matrix of scores."""
    T, S = q.shape[0], k.shape[0]
    at, keys = jnp.arange(T)[:, None] + S - T, jnp.arange(S)[None]
    seen = pattern(at, keys) if valid is None else pattern(at, keys) & valid[None]
    return softmax(scores(q, k, bias), seen, v)


def scores(q, k, bias=None):
    """(T, S) scaled dot products in float32, with the bias of query position S - T + t and key position s."""
    T, S = q.shape[0], k.shape[0]
    s = jnp.dot(q * q.shape[-1] ** -0.5, k.T, preferred_element_type=jnp.float32)
    return s if bias is None else s + bias(jnp.arange(T)[:, None] + S - T, jnp.arange(S)[None])


def softmax(s, seen, v):
    """softmax(s) @ v over the seen keys; a row that sees none gives zeros."""
    s = jnp.where(seen, s, MASKED)
    p = jnp.exp(s - lax.stop_gradient(jnp.maximum(s.max(-1, keepdims=True), EMPTY)))
    p = p / jnp.maximum(p.sum(-1, keepdims=True), 1e-30)
    return jnp.dot(p.astype(v.dtype), v, preferred_element_type=jnp.float32).astype(v.dtype)
