"""A gated recurrent unit (Cho et al., 2014, arXiv 1406.1078)."""

import jax.numpy as jnp
from flax import nnx
from jax import lax

from xformers_lab.nn.linear import Linear
from xformers_lab.nn.sigmoid import sigmoid
from xformers_lab.nn.size import Size


class Cell(nnx.Module):
    """r, z = sig(W x_t + U h_(t-1)); n = tanh(W' x_t + r (U' h_(t-1) + b)); h_t = (1 - z) n + z h_(t-1).

    The products with x run for all positions at once. x is as wide as h unless `inputs` says otherwise.
    """

    def __init__(self, size: Size, rngs: nnx.Rngs, inputs: int | None = None):
        D = size.dim
        self.width, self.dtype = D, size.dtype
        self.input = Linear(inputs or D, 3 * D, dtype=size.dtype, rngs=rngs)
        draw = nnx.initializers.orthogonal()
        self.recurrent = nnx.Param(jnp.concatenate([draw(rngs.params(), (D, D)) for _ in range(3)], 1), decays=True)
        self.bias = nnx.Param(jnp.zeros(D), decays=False)

    def __call__(self, x, valid):
        return self.run(x, valid)[0]

    def run(self, x, valid, start=None):
        gates = jnp.swapaxes(self.input(x), 0, 1)
        kept = jnp.ones(gates.shape[:2], bool) if valid is None else jnp.swapaxes(valid, 0, 1)

        def one(h, inputs):
            gate, keep = inputs
            h = jnp.where(keep[:, None], self.advance(gate, h), h)
            return h, h

        last, every = lax.scan(one, self.init_state(len(x)) if start is None else start, (gates, kept))
        return jnp.swapaxes(every, 0, 1), last

    def init_state(self, B: int):
        return jnp.zeros((B, self.width), self.dtype)

    def hidden(self, state):
        return state

    def step(self, state, x):
        h = self.advance(self.input(x), state)
        return h, h

    def advance(self, gates, h):
        """One position: gates (B, 3D) from the input and h (B, D) -> the new h."""
        turned = jnp.dot(h, self.recurrent[...].astype(h.dtype), preferred_element_type=jnp.float32)
        (r, z, n), (ur, uz, un) = (jnp.split(y, 3, -1) for y in (gates.astype(jnp.float32), turned))
        r, z = sigmoid(r + ur), sigmoid(z + uz)
        n = jnp.tanh(n + r * (un + self.bias[...]))
        return ((1 - z) * n + z * h).astype(h.dtype)
