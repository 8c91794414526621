"""Sines and cosines of a position's number, as they are added to tokens."""

import jax
import jax.numpy as jnp


def waves(at: jax.Array | int, dim: int, base: float = 10_000.0) -> jax.Array:
    """at (...) -> (..., D): channel 2i holds sin(at / base^(2i/D)), 2i + 1 the cosine. They are ADDED as large as a
    token (nn/embedding.py)."""
    at = jnp.asarray(at)
    angle = at[..., None] * base ** (-jnp.arange(0, dim, 2) / dim)
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], -1).reshape(*at.shape, -1)[..., :dim]
