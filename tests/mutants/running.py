"""Faults of how a mechanism runs: compiled, step after step, in bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from xformers_lab.attention.linear import EPSILON, Linear
from xformers_lab.attention.rwkv import Rwkv

from .right import Plain, mask, scaled_scores


class OverflowsInHalf(Plain):
    """A softmax without its maximum (Plain, 2017)."""

    def attend(self, q, k, v, *, valid, causal, bias=None):
        weights = jnp.exp(scaled_scores(q, k, bias)) * mask(q, k, valid, causal)
        return (weights @ v / jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)).astype(v.dtype)


class SumsInHalf(Linear):
    """A running sum kept in the inputs' type (Linear, 2020)."""

    def attend(self, q, k, v, *, valid=None, causal):
        if not causal:
            return self.reference(q, k, v, valid=valid, causal=causal)
        valid = jnp.ones(k.shape[0], bool) if valid is None else valid
        q, k = jax.nn.elu(q) + 1, jnp.where(valid[:, None], jax.nn.elu(k) + 1, 0)
        add = lambda state, new: (state + jnp.outer(*new), state + jnp.outer(*new))
        first = jnp.zeros((k.shape[1], v.shape[1]), v.dtype)
        states = jax.lax.scan(add, first, (k, v))[1]
        sums = jax.lax.scan(lambda s, new: (s + new, s + new), jnp.zeros(k.shape[1], k.dtype), k)[1]
        at = jnp.arange(q.shape[0]) + k.shape[0] - q.shape[0]
        return jnp.einsum("tf,tfh->th", q, states[at]) / (jnp.einsum("tf,tf->t", q, sums[at])[:, None] + EPSILON)


class ForgetsItsType(Plain):
    __doc__ = Plain.__doc__

    def reference(self, q, k, v, *, valid, causal, bias=None):
        return super().reference(q, k, v.astype(jnp.float32), valid=valid, causal=causal, bias=bias)


class DependsOnTracing(Plain):
    __doc__ = Plain.__doc__

    def attend_heads(self, call):
        out, carry, aux = super().attend_heads(call)
        return out * (1 if isinstance(call.q, Tracer) else 2), carry, aux


class CountsItsCalls(Plain):
    __doc__ = Plain.__doc__

    def __init__(self, size, *, rngs):
        super().__init__(size, rngs=rngs)
        self.calls = 0

    def attend_heads(self, call):
        self.calls += 1
        return super().attend_heads(call)


class VariableChangesType(Plain):
    __doc__ = Plain.__doc__

    def __init__(self, size, *, rngs):
        super().__init__(size, rngs=rngs)
        self.mean = nnx.Variable(jnp.zeros((), jnp.bfloat16))

    def attend_heads(self, call):
        self.mean[...] = self.mean[...]
        self.mean.set_value(self.mean[...] * 0.9 + call.q.mean())
        return super().attend_heads(call)


class RandomKeysOfEveryCall(Plain):
    """Random keys drawn anew whenever it is traced (Zaheer et al., 2020)."""

    draws = np.random.default_rng(0)

    def scores(self, q, k, valid, causal, bias=None):
        drawn = jnp.asarray(self.draws.random((q.shape[0], k.shape[0])) < 0.7)
        return jnp.where(drawn, super().scores(q, k, valid, causal, bias), -1e30)


class ForgetsTheInput(Rwkv):
    """A token shift whose decoding does not keep the position before (Rwkv, 2023).

    Options:
        chunk: as there
    """

    def __init__(self, size, *, chunk: int = 64, rngs):
        super().__init__(size, shift="input", chunk=chunk, rngs=rngs)

    def _of_next(self, x, tails, at):
        return *super()._of_next(x, tails, at)[:3], tails


FAULTS = {
    OverflowsInHalf: "bfloat16",
    SumsInHalf: "bfloat16",
    ForgetsItsType: "bfloat16",
    DependsOnTracing: "jit_equals_eager",
    CountsItsCalls: "no_retrace",
    VariableChangesType: "no_retrace",
    RandomKeysOfEveryCall: "jit_equals_eager",
    ForgetsTheInput: "decoding",
}
