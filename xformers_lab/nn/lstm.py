"""A long short-term memory (Hochreiter and Schmidhuber, 1997; with the forget gate of Gers et al., 2000)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from xformers_lab.nn.linear import Linear
from xformers_lab.nn.sigmoid import sigmoid
from xformers_lab.nn.size import Size


class Cell(nnx.Module):
    """i, f, g, o = W x_t + U h_(t-1) + b; c_t = sig(f) c_(t-1) + sig(i) tanh(g); h_t = sig(o) tanh(c_t).

    The forget gate's bias starts at 1 (Jozefowicz et al., 2015). The products with x run for all positions at once.
    x is as wide as h unless `inputs` says otherwise.
    """

    def __init__(self, size: Size, rngs: nnx.Rngs, inputs: int | None = None):
        D = size.dim
        self.width, self.dtype = D, size.dtype
        keeping = lambda key, shape, dtype: jnp.zeros(shape, dtype).at[D : 2 * D].set(1.0)
        self.input = Linear(inputs or D, 4 * D, bias_init=keeping, dtype=size.dtype, rngs=rngs)
        draw = nnx.initializers.orthogonal()
        self.recurrent = nnx.Param(jnp.concatenate([draw(rngs.params(), (D, D)) for _ in range(4)], 1), decays=True)

    def __call__(self, x, valid):
        return self.run(x, valid)[0]

    def run(self, x, valid, start=None):
        gates = jnp.swapaxes(self.input(x), 0, 1)
        kept = jnp.ones(gates.shape[:2], bool) if valid is None else jnp.swapaxes(valid, 0, 1)
        start = self.init_state(len(x)) if start is None else start
        h, c = _scan(gates, self.recurrent[...].astype(x.dtype), kept, start["h"], start["c"])
        return jnp.swapaxes(h, 0, 1), {"h": h[-1], "c": c}

    def init_state(self, B: int):
        return {"h": jnp.zeros((B, self.width), self.dtype), "c": jnp.zeros((B, self.width), jnp.float32)}

    def hidden(self, state):
        return state["h"]

    def step(self, state, x):
        state = self.advance(self.input(x), state)
        return state, state["h"]

    def advance(self, gates, state):
        """One position: gates (B, 4D) from the input and a state -> the new state."""
        h, c, _ = _advance(gates, state["h"], state["c"], self.recurrent[...].astype(state["h"].dtype))
        return {"h": h, "c": c}


def _advance(gates, h, c, recurrent):
    """One position: gates (B, 4D) from the input, h and c (B, D) -> the new h and c, and the four activations."""
    total = gates.astype(jnp.float32) + jnp.dot(h, recurrent, preferred_element_type=jnp.float32)
    i, f, g, o = jnp.split(total, 4, -1)
    i, f, g, o = sigmoid(i), sigmoid(f), jnp.tanh(g), sigmoid(o)
    c = f * c + i * g
    return (o * jnp.tanh(c)).astype(h.dtype), c, (i, f, g, o)


@jax.custom_vjp
def _scan(gates, recurrent, kept, h, c) -> tuple[jax.Array, jax.Array]:
    """gates (T, B, 4D), recurrent (D, 4D), kept (T, B), the start h and c (B, D) -> every h (T, B, D), the last c.

    A position that is not kept changes nothing, so the last h is that of the last position.
    """
    return _forward(gates, recurrent, kept, h, c)[0]


def _forward(gates, recurrent, kept, first_h, first_c) -> tuple:

    def one(state, inputs):
        h, c = state
        gate, keep = inputs
        new_h, new_c, active = _advance(gate, h, c, recurrent)
        h, c = jnp.where(keep[:, None], new_h, h), jnp.where(keep[:, None], new_c, c)
        return (h, c), (h, c, active)

    (_, last), (h, c, active) = lax.scan(one, (first_h, first_c), (gates, kept))
    return (h, last), (recurrent, kept, first_h, first_c, h, c, active)


def _backward(saved, grad):
    """Backwards through time, only for the gates; the gradient of the recurrent matrix is then one product."""
    recurrent, kept, first_h, first_c, h, c, active = saved
    (grad, last), (T, B, D) = grad, h.shape
    before = jnp.concatenate([first_c[None], c[:-1]])
    turned = recurrent.T

    def one(state, residuals):
        dh, dc = state
        g_out, keep, c, c_before, (i, f, g, o) = residuals
        keep = keep[:, None]
        dh = dh + g_out
        bent = jnp.tanh(c)
        d = dc + dh * o * (1 - bent * bent)
        gates = [d * g * i * (1 - i), d * c_before * f * (1 - f), d * i * (1 - g * g), dh * bent * o * (1 - o)]
        gates = jnp.where(keep, jnp.concatenate(gates, -1), 0).astype(recurrent.dtype)
        earlier = jnp.dot(gates, turned, preferred_element_type=jnp.float32)
        return (jnp.where(keep, earlier, dh), jnp.where(keep, d * f, dc)), gates

    residuals = grad.astype(jnp.float32), kept, c, before, active
    (dh, dc), gates = lax.scan(one, (jnp.zeros((B, D), jnp.float32), last), residuals, reverse=True)
    h_before = jnp.concatenate([first_h[None], h[:-1]]).reshape(T * B, D)
    total = jnp.dot(h_before.T, gates.reshape(T * B, -1), preferred_element_type=jnp.float32)
    return gates, total.astype(recurrent.dtype), None, dh.astype(h.dtype), dc


_scan.defvjp(_forward, _backward)
