import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.nn.layer_context import LayerContext
from xformers_lab.nn.size import Size
from xformers_lab.norm import Norm


class ResidualDual(Norm):
    """ResiDual: one residual stream that is normalised behind every sub-layer, as post-LN's, and one that never is, as
    pre-LN's (Xie et al., 2023, arXiv 2304.14802, section 2).

    a' = n(a + f(a)), b' = b + f(a); a + n(b) at the end of the stack. Both begin as the states that reach the stack.
    Deviations from the paper: none but the lab's first weights.

    Options:
        normaliser: a file of norm/normaliser
    """

    adds = False

    def __init__(self, size: Size, *, normaliser: str = "layernorm", rngs: nnx.Rngs):
        super().__init__(size, normaliser=normaliser, rngs=rngs)
        self.streams = 2

    def before(self, x: jax.Array, context: LayerContext) -> jax.Array:
        return jnp.split(x, 2, -1)[0]

    def after(self, x: jax.Array, y: jax.Array, context: LayerContext) -> jax.Array:
        a, b = jnp.split(x, 2, -1)
        return jnp.concatenate([self.normalise(a + y, context), b + y], -1)

    def final(self, x: jax.Array, context: LayerContext) -> jax.Array:
        a, b = jnp.split(x, 2, -1)
        return a + self.normalise(b, context)
