"""An axis of positions in blocks of equal size, and back."""

import jax.numpy as jnp
from jax import lax


def in_blocks(x, size: int, fill: float = 0, axis: int = 0):
    """Positions on an axis, (..., n, ...) -> (blocks, ..., size, ...), with `fill` behind them."""
    at = axis % x.ndim
    x = jnp.pad(x, [(0, -x.shape[at] % size if number == at else 0) for number in range(x.ndim)], constant_values=fill)
    return jnp.moveaxis(x.reshape(*x.shape[:at], -1, size, *x.shape[at + 1 :]), at, 0)


def joined(x, n: int, axis: int = 0):
    """The first n positions of blocks, (blocks, ..., size, ...) -> (..., n, ...)."""
    at = axis % (x.ndim - 1)
    x = jnp.moveaxis(x, 0, at)
    return lax.slice_in_dim(x.reshape(*x.shape[:at], -1, *x.shape[at + 2 :]), 0, n, axis=at)
