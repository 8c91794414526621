"""Rows of what tokens bring to a score, looked up by positions that broadcast."""

import jax
import jax.numpy as jnp


def row(at: jax.Array, first: jax.Array | int, rows: jax.Array) -> jax.Array:
    """The place of position `at` among `rows` (T, C) that begin with position `first`; the nearest where outside."""
    return jnp.clip(at - jnp.int32(first), 0, len(rows) - 1)


def products(a: jax.Array, b: jax.Array, q_at: jax.Array, k_at: jax.Array) -> jax.Array:
    """Dot products, at broadcasting positions, of a (C channels in its last axis, at q_at) and b (at k_at).

    a is (..., C) with q_at's shape in front, b with k_at's. Blocks, positions (..., Q, 1) and (..., 1, K), take a
    product of matrices.
    """
    if min(q_at.ndim, k_at.ndim) > 1 and q_at.shape[-1] == 1 == k_at.shape[-2]:
        wide, tall = a[..., 0, :], b[..., 0, :, :]
        return jnp.einsum("...qc,...kc->...qk", wide, tall, preferred_element_type=jnp.float32)
    return (a * b).sum(-1)
