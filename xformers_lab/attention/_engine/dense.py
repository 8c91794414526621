"""Softmax attention by definition: one matrix of scores."""

import jax.numpy as jnp

from xformers_lab.attention._engine.algebra import Pattern
from xformers_lab.attention._engine.softmax import MASKED, masked_softmax, same_document, softmax_average


def dense(q, k, v, *, pattern: Pattern, valid=None, documents=None, bias=None, pair_values=None):
    """(T, H), (S, H), (S, H) -> (T, H): over the keys that `pattern` allows and `valid` (S,) marks, in the query's own
    document of `documents` (S,), if there are any."""
    T, S = q.shape[0], k.shape[0]
    at, keys = jnp.arange(T)[:, None] + S - T, jnp.arange(S)[None]
    seen = pattern(at, keys) if documents is None else pattern(at, keys) & same_document(documents, at, keys)
    seen = seen if valid is None else seen & valid
    mean = softmax_average(scores(q, k, bias), seen, v)
    if pair_values is None:
        return mean
    p = masked_softmax(jnp.where(seen, scores(q, k, bias), MASKED))
    return (mean + pair_values(p, at, keys)).astype(v.dtype)


def scores(q, k, bias=None):
    """(T, S) scaled dot products in float32, with the bias of query position S - T + t and key position s."""
    T, S = q.shape[0], k.shape[0]
    s = jnp.dot(q * q.shape[-1] ** -0.5, k.T, preferred_element_type=jnp.float32)
    return s if bias is None else s + bias(jnp.arange(T)[:, None] + S - T, jnp.arange(S)[None])
