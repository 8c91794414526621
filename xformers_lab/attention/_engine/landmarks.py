"""What low-rank attention through landmarks shares: means over runs of positions, and inverses by products alone."""

import jax
import jax.numpy as jnp
from jax import lax

from xformers_lab.attention._engine.products import EXACT
from xformers_lab.attention._engine.softmax import masked_softmax


def segments(valid, T: int, count: int):
    """(count, T) bool: which of the positions that are valid belong to which of `count` runs of nearly equal size.

    Where there are fewer valid positions than runs, some runs are empty.
    """
    if valid is None:
        run = jnp.arange(T) * count // T
        return run == jnp.arange(count)[:, None]
    run = (jnp.cumsum(valid) - 1) * count // jnp.maximum(valid.sum(), 1)
    return (run == jnp.arange(count)[:, None]) & valid


def means(x, member):
    """(T, H), (count, T) -> (count, H) in float32; zeros for a run without members."""
    weight = member / jnp.maximum(member.sum(1, keepdims=True), 1)
    return jnp.dot(weight.astype(x.dtype), x, **EXACT)


def probabilities(q, k, seen=None):
    """softmax of q k^T / sqrt(H) over the keys that are seen (a bool that broadcasts), zeros where none is."""
    s = jnp.dot(q, k.T, **EXACT) * q.shape[-1] ** -0.5
    return jax.nn.softmax(s, -1) if seen is None else masked_softmax(s, seen)


def largest(x):
    """max(x) of a vector, whose derivative does not compare x with a maximum that XLA may have rounded otherwise."""
    return x[jnp.argmax(lax.stop_gradient(x))]


def inverse(a, iterations: int, scale=None):
    """The Moore-Penrose inverse of a matrix (m, m) by third-order Newton-Schulz steps (Razavi et al., 2014).

    Z' = Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4 from Z = A^T scale. Directions in which A is small come last; six
    steps leave those below about 1/30 of the largest unfinished. scale: 1 / (|A|_1 |A|_inf) unless given.
    """
    if scale is None:
        scale = 1 / (largest(jnp.abs(a).sum(0)) * largest(jnp.abs(a).sum(1)))
    eye = jnp.eye(len(a), dtype=a.dtype)
    product = lambda a, b: jnp.dot(a, b, precision=lax.Precision.HIGHEST)

    def step(z, _):
        az = product(a, z)
        return product(z, 13 * eye - product(az, 15 * eye - product(az, 7 * eye - az))) / 4, None

    return lax.scan(step, a.T * scale, length=iterations)[0]
