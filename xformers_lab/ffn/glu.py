import functools

import jax
from flax import nnx

from xformers_lab.ffn import ACTIVATIONS, Activation, Ffn, hidden_size
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.size import Size


class Glu(Ffn):
    """Gated linear unit: down(a(gate(x)) * up(x)), without biases (Shazeer, 2020, arXiv 2002.05202).

    The default ratio of 8/3 gives it the parameters of an `mlp` of ratio 4. Of the paper's family activation sigmoid is
    GLU, identity Bilinear, relu ReGLU, gelu GEGLU and silu SwiGLU.

    Options:
        ratio: hidden width over model width
        activation: on the gate
    """

    documents_apart = True

    def __init__(self, size: Size, *, ratio: float = 8 / 3, activation: Activation = "silu", rngs: nnx.Rngs):
        linear = functools.partial(Linear, use_bias=False, dtype=size.dtype, rngs=rngs)
        hidden = hidden_size(size, ratio)
        self.gate, self.up, self.down = linear(size.dim, hidden), linear(size.dim, hidden), linear(hidden, size.dim)
        self.activation = activation

    def __call__(
        self, x: jax.Array, *, valid: jax.Array | None = None, key: jax.Array | None = None
    ) -> tuple[jax.Array, Aux]:
        hidden = ACTIVATIONS[self.activation](self.gate(x)) * self.up(x)
        return self.last(hidden, valid=valid, key=key), Aux()
