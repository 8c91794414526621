from flax import nnx

from xformers_lab.attention import Attention
from xformers_lab.norm import Norm
from xformers_lab.size import Size


class Deepnorm(Norm):
    """DeepNorm: n(a x + f(x)) with a = (2 L)^(1/4) for a stack of L layers (Wang et al., 2022, arXiv 2203.00555).

    At the start the weights of the feed-forward, value and output projections are smaller by b = (8 L)^(-1/4), so that
    the size of a model's update does not grow with depth.

    Options:
        normaliser: a file of norm/normaliser
    """

    def __init__(self, size: Size, *, normaliser: str = "layernorm", rngs: nnx.Rngs):
        super().__init__(size, normaliser=normaliser, rngs=rngs)
        self.alpha, self.beta = (2 * size.layers) ** 0.25, (8 * size.layers) ** -0.25

    def start(self, layer):
        for path, param in nnx.iter_graph(layer):
            attends = isinstance(layer, Attention)
            if isinstance(param, nnx.Param) and path[-1] == "kernel" and (not attends or path[-2] in ("value", "out")):
                param[...] = param[...] * self.beta

    def after(self, x, y, rows):
        return self.normalise(self.alpha * x + y, rows)
