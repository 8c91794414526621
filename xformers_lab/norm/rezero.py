import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.nn.layer_context import LayerContext
from xformers_lab.nn.size import Size
from xformers_lab.norm import Norm


class Rezero(Norm):
    """ReZero: x + a f(x) without a normaliser, the learned scalar a of each sub-layer starting at 0 (Bachlechner
    et al., 2020, arXiv 2003.04887).

    Deviations from the paper: its Transformer has one a per layer, which both of its sub-layers share; a placement here
    knows its own sub-layer alone.
    """

    def __init__(self, size: Size, *, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.zeros(()), decays=False)

    def branch(self, y: jax.Array, context: LayerContext) -> jax.Array:
        return self.scale[...].astype(y.dtype) * y
