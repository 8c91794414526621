import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.errors import Refused
from xformers_lab.nn.size import Size


class Adanorm(nnx.Module):
    """AdaNorm: c (1 - k y) y for y of zero mean and unit variance, without learned parameters (Xu et al., 2019, arXiv
    1911.07013, equation 9). No gradient flows through the factor c (1 - k y).

    Options:
        c: scale of the output
        k: how much large values are pulled down
    """

    def __init__(self, size: Size, *, c: float = 1.0, k: float = 0.1, rngs: nnx.Rngs):
        if c <= 0 or k < 0:
            raise Refused(f"c must be above 0 and k at least 0, got c={c} and k={k}")
        self.c, self.k = c, k

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        y = (wide - wide.mean(-1, keepdims=True)) * jax.lax.rsqrt(wide.var(-1, keepdims=True) + 1e-6)
        return (jax.lax.stop_gradient(self.c * (1 - self.k * y)) * y).astype(x.dtype)
