"""Base of mechanisms that are a recurrence with a state per head: read from left to right, decoded at constant cost."""

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention._base.one_head import Stepwise
from xformers_lab.attention._base.refusals import why_not_one_way
from xformers_lab.attention._engine.linear.gated import aligned, by_definition
from xformers_lab.errors import Refused
from xformers_lab.nn.absent import Same
from xformers_lab.nn.initial_scale import scale_init
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


class Widened(Recurrent):
    """A recurrence whose values may have `expand` channels for each of the block's.

    A subclass calls `widen` at the end of its constructor, hands what `more_values` gives of the block's input to
    `wide`, beside each head's own values, and ends `finished` by `narrowed`.
    """

    expand: int = 1
    more_value: Linear | None = None
    inner_out: Linear | None = None

    def widen(self, expand: int, rngs: nnx.Rngs) -> None:
        self.expand = expand
        if expand == 1:
            return
        size, linear = self.size, functools.partial(Linear, use_bias=False, dtype=self.size.dtype, rngs=rngs)
        self.more_value = linear(size.dim, size.key_heads * (expand - 1) * size.head)
        self.inner_out, self.out = linear(size.heads * expand * size.head, size.dim), Same()

    def refusals(self):
        wider = {"map": "its values are wider than the block"} if self.expand > 1 else {}
        return {**super().refusals(), **wider}

    def scale_init(self, share: float) -> None:
        super().scale_init(share)
        if self.more_value is not None and self.inner_out is not None:
            scale_init(share, self.more_value, self.inner_out)

    def more_values(self, x) -> Any:
        """(B, S, D) -> (B, S, N, (expand - 1) H), None where values are as wide as the block."""
        if self.more_value is None:
            return None
        of_keys = self.more_value(x).reshape(*x.shape[:2], self.size.key_heads, -1)
        return jnp.repeat(of_keys, self.size.heads // self.size.key_heads, 2)

    def wide(self, v, more_v):
        """All channels of a head's values, (S, expand H) or of one position."""
        return v if more_v is None else jnp.concatenate([v, self.summed(more_v).astype(v.dtype)], -1)

    def narrowed(self, out):
        """(B, T, N, expand H) -> (B, T, N, H), by the projection of wider values, which is the layer's last."""
        if self.inner_out is None:
            return out
        return self.inner_out(out.reshape(*out.shape[:2], -1)).reshape(*out.shape[:3], -1)

    def start(self):
        return jnp.zeros((self.size.head, self.expand * self.size.head), jnp.float32)

    def flops_of_width(self, S: int) -> int:
        """Of the projections of wider values, that of one head's."""
        wide = 2 * self.expand - 1 if self.expand > 1 else 0
        return 2 * S * self.size.head**2 * self.size.heads * wide


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
