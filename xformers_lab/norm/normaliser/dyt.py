import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.nn.size import Size


class Dyt(nnx.Module):
    """Dynamic tanh: g tanh(a x) + b, no statistics at all (Zhu et al., 2025, arXiv 2503.10622).

    Options:
        start: a at the start
    """

    def __init__(self, size: Size, *, start: float = 0.5, rngs: nnx.Rngs):
        self.a = nnx.Param(jnp.asarray(start, jnp.float32), decays=False)
        self.scale, self.bias = (
            nnx.Param(jnp.ones(size.dim), decays=False),
            nnx.Param(jnp.zeros(size.dim), decays=False),
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        squashed = jnp.tanh(self.a[...] * x.astype(jnp.float32))
        return (self.scale[...] * squashed + self.bias[...]).astype(x.dtype)
