"""In place of a projection that a mechanism does without."""

import jax.numpy as jnp
from flax import nnx


class Absent(nnx.Module):
    """(..., D) -> zeros (..., features): no parameters, no work."""

    def __init__(self, features: int, dtype: str):
        self.features, self.dtype = features, dtype

    def __call__(self, x):
        return jnp.zeros((*x.shape[:-1], self.features), self.dtype)


class Same(nnx.Module):
    """What it is given, as it is."""

    def __call__(self, x):
        return x
