import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.nn.layer_context import LayerContext
from xformers_lab.nn.size import Size
from xformers_lab.norm.pre import Pre


class Layerscale(Pre):
    """LayerScale: pre-LN whose branches have a learned scale of every channel (Touvron et al., 2021, arXiv 2103.17239,
    equation 4).

    x + a * f(n(x)), a (D), and n once more at the end of the stack.
    In the paper a starts at 0.1 up to 18 layers, at 1e-5 with 24 and at 1e-6 above, so that every layer begins near the
    identity; that is what `start` is by default here.

    Options:
        normaliser: a file of norm/normaliser
        start: a at the start (none: by the number of layers)
    """

    def __init__(self, size: Size, *, normaliser: str = "layernorm", start: float | None = None, rngs: nnx.Rngs):
        super().__init__(size, normaliser=normaliser, rngs=rngs)
        self.size, self.first = size, _first(size.layers) if start is None else start

    def start(self, layer) -> None:
        """Only around a sub-layer is there a branch, not at the end of the stack."""
        self.scale = nnx.Param(jnp.full(self.size.dim, self.first), decays=False)

    def branch(self, y: jax.Array, context: LayerContext) -> jax.Array:
        return self.scale[...].astype(y.dtype) * y


def _first(layers: int) -> float:
    return 0.1 if layers <= 18 else 1e-5 if layers <= 24 else 1e-6
