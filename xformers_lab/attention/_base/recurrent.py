"""Base of mechanisms that are a recurrence with a state per head: read from left to right, decoded at constant cost."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention._base.one_head import Stepwise
from xformers_lab.attention._base.refusals import why_not_one_way
from xformers_lab.attention._engine.linear.gated import aligned, by_definition
from xformers_lab.errors import Refused
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.required import required
from xformers_lab.nn.size import Size

# Near-zero outputs are amplified no further than this allows.
EPSILON = 1e-5


class Recurrent(Stepwise):
    """A subclass defines `scanned(state, q, **keys)` of many positions at once, and `update(state, q, **keys)` of one.

    keys are arrays (S, ...) of which padding becomes zeros: k, v, and what else the recurrence reads. Where it defines
    `steps` by `scanned`, as it does `step` by `update`, a prompt is read many tokens at a time.
    """

    refuses: ClassVar = {
        "bidirectional": "it reads from left to right, so it serves no encoder and no cross-attention",
        "documents": "its state passes from one document to the next",
    }

    def forward(self, q, keys: dict, valid, causal: bool):
        self.one_way(causal)
        whole = lambda q, **keys: self.scanned(self.start(), q, **keys)[0]
        return jax.checkpoint(lambda q, keys: aligned(whole, q, keys, valid))(q, keys)

    def by_definition(self, q, keys: dict, valid, causal: bool):
        self.one_way(causal)
        wide = {name: x.astype(jnp.float32) for name, x in keys.items()}
        return by_definition(self.update, self.start(), q.astype(jnp.float32), wide, valid)

    def one_way(self, causal: bool) -> None:
        if not causal:
            raise Refused(why_not_one_way(type(self)))

    def start(self) -> Any:
        """The state of `scanned` and `update` before the first position."""
        return jnp.zeros((self.size.head, self.size.head), jnp.float32)

    def init_state(self, length: int, dtype=jnp.float32):
        return self.start()

    @required
    def scanned(self, state, q, *args: Any, **keys: Any) -> Any:
        """The state, queries (T, H) and keys (T, ...) of the next positions -> (T, H) and the state behind them."""

    @required
    def update(self, state, q, *args: Any, **keys: Any) -> Any:
        """The state and those of one position -> its output (H,) and the next state."""


def gate_of(size: Size, rngs: nnx.Rngs, *, numbers: int | None = None) -> Linear:
    """The projection of an output gate: so many numbers for every head, by default one per channel."""
    numbers = size.head if numbers is None else numbers
    return Linear(size.dim, size.heads * numbers, use_bias=False, dtype=size.dtype, rngs=rngs)


def rms(out):
    """out at unit root mean square over the head's channels."""
    return out * jax.lax.rsqrt((out * out).mean(-1, keepdims=True) + EPSILON)


def centred(out):
    """out at mean 0 and variance 1 over the head's channels."""
    return rms(out - out.mean(-1, keepdims=True))


def gated(out, gate):
    """silu(gate), where there is a gate, times out at unit root mean square over the head's channels."""
    return rms(out) if gate is None else rms(out) * jax.nn.silu(gate.astype(jnp.float32))


def interval_bias(key, shape, dtype):
    """Biases whose softplus, the interval of a head at first, is spread evenly, in logarithms, from 0.001 to 0.1."""
    start = jnp.exp(jax.random.uniform(key, shape, minval=jnp.log(1e-3), maxval=jnp.log(0.1)))
    return jnp.log(jnp.expm1(start)).astype(dtype)


def unit(x):
    """x over its length along the channels."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + EPSILON)


def at_queries(q, x, valid):
    """Keys' x (S, H) at the positions of queries q (T, H): zeros where they are padding or before the first key."""
    T, S = len(q), len(x)
    x = x if valid is None else jnp.where(valid[:, None], x, 0)
    return x[S - T :] if T <= S else jnp.pad(x, ((T - S, 0), (0, 0)))
