"""Softmax attention by definition: one matrix of scores."""

import jax.numpy as jnp

from xformers_lab.attention._engine.algebra import Pattern
from xformers_lab.attention._engine.softmax import softmax_average


def dense(q, k, v, *, pattern: Pattern, valid=None, bias=None):
    """(T, H), (S, H), (S, H) -> (T, H): over the keys that `pattern` allows and `valid` (S,) marks."""
    T, S = q.shape[0], k.shape[0]
    seen = pattern(jnp.arange(T)[:, None] + S - T, jnp.arange(S)[None])
    return softmax_average(scores(q, k, bias), seen if valid is None else seen & valid, v)


def scores(q, k, bias=None):
    """(T, S) scaled dot products in float32, with the bias of query position S - T + t and key position s."""
    T, S = q.shape[0], k.shape[0]
    s = jnp.dot(q * q.shape[-1] ** -0.5, k.T, preferred_element_type=jnp.float32)
    return s if bias is None else s + bias(jnp.arange(T)[:, None] + S - T, jnp.arange(S)[None])
