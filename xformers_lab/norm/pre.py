import jax

from xformers_lab.nn.layer_context import LayerContext
from xformers_lab.norm import Norm


class Pre(Norm):
    """Pre-LN: x + f(n(x)), and n once more at the end of the stack (Xiong et al., 2020, arXiv 2002.04745).

    Options:
        normaliser: a file of norm/normaliser
    """

    def before(self, x: jax.Array, context: LayerContext) -> jax.Array:
        return self.normalise(x, context)

    def final(self, x: jax.Array, context: LayerContext) -> jax.Array:
        return self.normalise(x, context)
