import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.nn.size import Size


class Scalenorm(nnx.Module):
    """Unit length times one learned scale, sqrt(D) at the start (Nguyen and Salazar, 2019, arXiv 1910.05895)."""

    def __init__(self, size: Size, *, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.asarray(size.dim**0.5), decays=False)

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        length = jnp.sqrt((wide * wide).sum(-1, keepdims=True) + 1e-10)
        return (self.scale[...] * wide / length).astype(x.dtype)
