import functools

import jax
from flax import nnx

from xformers_lab.ffn import ACTIVATIONS, Activation, Ffn, hidden_size
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.size import Size


class Mlp(Ffn):
    """Two linear layers around an activation (Vaswani et al., 2017, arXiv 1706.03762, equation 2).

    Options:
        ratio: hidden width over model width
        activation: between the layers
    """

    documents_apart = True

    def __init__(self, size: Size, *, ratio: float = 4.0, activation: Activation = "gelu", rngs: nnx.Rngs):
        linear = functools.partial(Linear, dtype=size.dtype, rngs=rngs)
        hidden = hidden_size(size, ratio)
        self.up, self.down = linear(size.dim, hidden), linear(hidden, size.dim)
        self.activation = activation

    def __call__(
        self, x: jax.Array, *, valid: jax.Array | None = None, key: jax.Array | None = None
    ) -> tuple[jax.Array, Aux]:
        return self.last(ACTIVATIONS[self.activation](self.up(x)), valid=valid, key=key), Aux()
