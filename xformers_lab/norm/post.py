import jax

from xformers_lab.nn.layer_context import LayerContext
from xformers_lab.norm import Norm


class Post(Norm):
    """Post-LN: n(x + f(x)), as in the original Transformer (Vaswani et al., 2017, arXiv 1706.03762).

    Options:
        normaliser: a file of norm/normaliser
    """

    adds = False

    def after(self, x: jax.Array, y: jax.Array, context: LayerContext) -> jax.Array:
        return self.normalise(x + y, context)
