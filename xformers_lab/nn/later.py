"""What stands further on in a sequence."""

import jax
import jax.numpy as jnp


def later(x: jax.Array, places: int) -> jax.Array:
    """(B, T, ...) -> at each position what stands so many places behind it, and zeros where nothing does."""
    return jnp.pad(x[:, places:], [(0, 0), (0, places), *[(0, 0)] * (x.ndim - 2)])
