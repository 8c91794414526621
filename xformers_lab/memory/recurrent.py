import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from xformers_lab.errors import Refused
from xformers_lab.memory import Memory, Remembered
from xformers_lab.nn import layer_number
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.size import Size


class Recurrent(Memory):
    """A small recurrence between segments, which can be added to a trained Transformer: one vector stands before the
    keys and values of a segment, made of what a layer gave in the one before (Yoshida, Ettinger and Gimpel, 2020, arXiv
    2008.07027).

        m' = mean over the segment of layer(h)    (B, 1, D)
        source = [g(m); h],    g(m) = m + W_2 relu(W_1 m + b_1) + b_2

    The layer has looked at g(m) when it gives what m' is the mean of, so that m is a state without an end, for one key
    more than without a memory. A segment of padding alone leaves it as it was. To add it to a model that was trained
    without: `init=RUN memory=recurrent`, of which W and b alone are new. At the start W_2 is small, so that a trained
    layer is given what it knows, a mean of its states.
    Deviations from the paper: a layer reads what it gave itself, where the paper hands the state of a high layer to a
    lower one; gradients stop at m, and so train g in every segment, but do not pass from one to another; m is added to
    what the network makes of it.

    Options:
        layer: the number of the one layer that reads it, from 0 on (none: all do)
        ratio: hidden width of g over model width
    """

    of_outputs = True

    def __init__(self, size: Size, *, layer: int | None = None, ratio: float = 1.0, rngs: nnx.Rngs):
        if layer is not None and not 0 <= layer < size.layers:
            raise Refused(f"layer={layer} must be from 0 to {size.layers - 1}, one of layers={size.layers}")
        if ratio * size.dim < 1:
            raise Refused(f"ratio={ratio} of dim={size.dim} leaves no hidden channel")
        self.length, hidden = 1, round(ratio * size.dim)
        self.into = Linear(size.dim, hidden, dtype=size.dtype, rngs=rngs)
        small = nnx.initializers.variance_scaling(0.01, "fan_in", "truncated_normal")
        self.out = Linear(hidden, size.dim, kernel_init=small, dtype=size.dtype, rngs=rngs)
        self.layer, self.number = layer, layer_number.first_layer()
        self.state = Remembered(jnp.zeros((1, 1, size.dim), size.dtype))
        self.there = Remembered(jnp.zeros((1, 1), bool))

    def read(self, B: int) -> tuple[jax.Array, jax.Array]:
        mean, there = self._kept(B)
        there = there if self.layer is None else there & (self.number[...] == self.layer)
        return mean + self.out(jax.nn.relu(self.into(mean))), there

    def write(self, x: jax.Array, valid: jax.Array | None) -> None:
        mean, there = self._kept(len(x))
        real = jnp.ones(x.shape[:2], bool) if valid is None else valid
        total = jnp.where(real[..., None], x, 0).sum(1, keepdims=True, dtype=jnp.float32)
        new = (total / jnp.maximum(real.sum(1), 1)[:, None, None]).astype(mean.dtype)
        some = real.any(1, keepdims=True)
        self.state.set_value(lax.stop_gradient(jnp.where(some[..., None], new, mean)))
        self.there.set_value(there | some)

    def _kept(self, B: int) -> tuple[jax.Array, jax.Array]:
        """The mean of the last segment (B, 1, D), and whether there is one (B, 1)."""
        mean, there = self.state[...], self.there[...]
        return lax.stop_gradient(jnp.broadcast_to(mean, (B, 1, mean.shape[-1]))), jnp.broadcast_to(there, (B, 1))
