from typing import Any

import jax
from flax import nnx

from xformers_lab.nn.layer_context import LayerContext
from xformers_lab.nn.size import Size
from xformers_lab.norm import Norm


class Deepnorm(Norm):
    """DeepNorm: n(a x + f(x)), with first weights smaller by b (Wang et al., 2022, arXiv 2203.00555, figure 2).

    A stack of L layers alone: a = (2 L)^(1/4), b = (8 L)^(-1/4). An encoder of N layers, and a decoder of M that looks
    at it: a = 0.81 (N^4 M)^(1/16), b = 0.87 (N^4 M)^(-1/16) in the encoder, a = (3 M)^(1/4), b = (12 M)^(-1/4) in the
    decoder. So the size of a model's update does not grow with depth. What is smaller are the feed-forward, value and
    output projections, not those of queries and keys: each sub-layer knows its own, `scale_init`.
    Deviations from the paper: b multiplies the first weights of the lab, whose variance is 1 / inputs, where the paper
    draws Xavier's.

    Options:
        normaliser: a file of norm/normaliser
    """

    adds = False

    def __init__(self, size: Size, *, normaliser: str = "layernorm", rngs: nnx.Rngs):
        super().__init__(size, normaliser=normaliser, rngs=rngs)
        self.alpha, self.beta = constants(size)

    def start(self, layer: Any) -> None:
        layer.scale_init(self.beta)

    def after(self, x: jax.Array, y: jax.Array, context: LayerContext) -> jax.Array:
        return self.normalise(self.alpha * x + y, context)


def constants(size: Size) -> tuple[float, float]:
    """a and b of the stack that a layer stands in."""
    if size.target_layers:
        both = (size.layers**4 * size.target_layers) ** (1 / 16)
        return 0.81 * both, 0.87 / both
    if size.source_layers:
        return (3 * size.layers) ** 0.25, (12 * size.layers) ** -0.25
    return (2 * size.layers) ** 0.25, (8 * size.layers) ** -0.25
