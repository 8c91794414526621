"""Softmax attention by definition: one matrix of scores."""

import jax.numpy as jnp

from xformers_lab.attention._engine.algebra import Pattern
from xformers_lab.attention._engine.softmax import softmax


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
