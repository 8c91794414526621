"""Dropout, of what a sub-layer adds to the states and of the embeddings."""

import jax
import jax.numpy as jnp


def drop(x, rate: float, key):
    """Residual dropout (Srivastava et al., 2014): zero a share `rate` of x, scale the rest; identity without a key."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)
