"""The masked softmax, and the number that stands for a score that is not there."""

import jax.numpy as jnp
from jax import lax

MASKED = -1e30
# The running maximum never falls below this, so a row that sees no key gets weights exp(MASKED - EMPTY) = 0.
EMPTY = MASKED / 2


def softmax(s, seen, v):
    """softmax(s) @ v over the seen keys; a row that sees none gives zeros."""
    s = jnp.where(seen, s, MASKED)
    p = jnp.exp(s - lax.stop_gradient(jnp.maximum(s.max(-1, keepdims=True), EMPTY)))
    p = p / jnp.maximum(p.sum(-1, keepdims=True), 1e-30)
    return jnp.dot(p.astype(v.dtype), v, preferred_element_type=jnp.float32).astype(v.dtype)


def masked_softmax(s, seen):
    """softmax over the seen keys in float32; a row that sees none gives zeros."""
    s = jnp.where(seen, s, MASKED)
    p = jnp.where(seen, jnp.exp(s - lax.stop_gradient(s.max(-1, keepdims=True))), 0)
    total = p.sum(-1, keepdims=True)
    return p / jnp.where(total > 0, total, 1)
