"""A simple recurrent network (Elman, 1990)."""

import jax.numpy as jnp
from flax import nnx

from xformers_lab.nn.linear import Linear
from xformers_lab.nn.size import Size


class Cell(nnx.Module):
    """h_t = tanh(W x_t + b + U h_(t-1)). The products with x can run for all positions at once."""

    def __init__(self, size: Size, rngs: nnx.Rngs):
        D = size.dim
        self.width, self.dtype = D, size.dtype
        self.input = Linear(D, D, dtype=size.dtype, rngs=rngs)
        self.recurrent = nnx.Param(nnx.initializers.orthogonal()(rngs.params(), (D, D)), decays=True)

    def init_state(self, B: int):
        return jnp.zeros((B, self.width), self.dtype)

    def hidden(self, state):
        return state

    def advance(self, gates, h):
        """One position: W x + b and h, (B, D) each -> the new h."""
        turned = jnp.dot(h, self.recurrent[...].astype(h.dtype), preferred_element_type=jnp.float32)
        return jnp.tanh(gates.astype(jnp.float32) + turned).astype(h.dtype)
