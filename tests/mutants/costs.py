"""Faults of decoding, and of declared costs."""

import jax
import jax.numpy as jnp

from xformers_lab.attention import Cost, KeepsKeys, OneHead, Patterned
from xformers_lab.attention._engine.pattern import block_local
from xformers_lab.attention.adaptive_span import AdaptiveSpan
from xformers_lab.attention.axial import Axial
from xformers_lab.attention.linear import Linear
from xformers_lab.attention.local import Local
from xformers_lab.attention.mla import Mla

from .right import Decayed, Gated, Plain


class QuadraticMask(Linear):
    """Declares linear memory (Linear, 2020), and builds a T x S mask."""

    def attend(self, q, k, v, *, valid=None, causal):
        seen = jnp.tril(jnp.ones((q.shape[0], k.shape[0]))).any(1)
        return super().attend(q, k, v, valid=valid, causal=causal) * seen[:, None]


class QuadraticProducts(Linear):
    """Declares linear cost (Linear, 2020), and multiplies out all pairs."""

    def attend(self, q, k, v, *, valid=None, causal):
        return self.reference(q, k, v, valid=valid, causal=causal)


class CostOffByTen(Plain):
    __doc__ = Plain.__doc__

    def cost(self, T, S):
        return Cost(flops=0.4 * T * S * self.size.head, memory=T * S, state=2 * S * self.size.head)


class StateUndeclared(Local):
    """Declares a ring of the window (Local, 2020), and keeps every key."""

    init_cache = OneHead.init_cache


class StaleState(Linear):
    __doc__ = Linear.__doc__

    def step(self, state, q, k, v):
        out, _ = super().step(state, q, k, v)
        late = super().step(state, q, k, jnp.zeros_like(v))[1]
        return out, late


class RingTooShort(Local):
    __doc__ = Local.__doc__

    def slots(self, length):
        return self.window


class StaleInput(Gated):
    __doc__ = Gated.__doc__

    def decode_heads(self, cache, call):
        out, new, carry = super().decode_heads(cache, call)
        return out, new | {"x": jnp.roll(new["x"], 1, 1)}, carry


class StepWithoutTheGate(Gated):
    __doc__ = Gated.__doc__

    def decode_heads(self, cache, call):
        assert call.x is not None
        return super().decode_heads(cache, call.replace(x=jnp.zeros_like(call.x)))


class DecaysTwiceInAStep(Decayed):
    __doc__ = Decayed.__doc__

    def step(self, state, q, k, v):
        return super().step(self.decay * state, q, k, v)


class StateDecaysInTheWrongType(Decayed):
    """A state kept in half precision while decoding (Decayed, 2023)."""

    def step(self, state, q, k, v):
        out, state = super().step(state, q, k, v)
        return out, state.astype(jnp.bfloat16).astype(jnp.float32)


class DecodesTheWholeBand(AdaptiveSpan):
    __doc__ = AdaptiveSpan.__doc__

    attend_cached = Local.attend_cached


class RunsDecodedByDistance(KeepsKeys, Patterned):
    """Runs of five positions, decoded as if the newest key were the last of its run (Qiu et al., 2019)."""

    kind = "sparse by position"

    def __init__(self, size, *, rngs):
        super().__init__(size, block_local(5), rngs=rngs)


class GridDecodedByDistance(KeepsKeys, Axial):
    __doc__ = Axial.__doc__


class StoresEveryRow(Linear):
    """Declares linear memory (Linear, 2020), and keeps every block of weights for the backward."""

    def attend(self, q, k, v, *, valid=None, causal):
        block = lambda q: jnp.exp(jnp.tanh(q @ k.T)) @ v
        blocks = jax.lax.map(block, q.reshape(-1, min(64, len(q)), q.shape[1]))
        return super().attend(q, k, v, valid=valid, causal=causal) + 1e-9 * blocks.reshape(v.shape)


class DecodesWithoutTheRotaryKey(Mla):
    __doc__ = Mla.__doc__

    def decode_heads(self, cache, call):
        return super().decode_heads(cache, call.replace(k=0 * call.k))


FAULTS = {
    QuadraticMask: "memory",
    QuadraticProducts: "flops",
    CostOffByTen: "flops",
    StateUndeclared: "state_size",
    StaleState: "decoding",
    RingTooShort: "decoding",
    StaleInput: "decoding",
    StepWithoutTheGate: "decoding",
    DecaysTwiceInAStep: "decoding",
    StateDecaysInTheWrongType: "decoding",
    DecodesTheWholeBand: "decoding",
    RunsDecodedByDistance: "decoding",
    GridDecodedByDistance: "decoding",
    StoresEveryRow: "memory",
    DecodesWithoutTheRotaryKey: "decoding",
}
OPTIONS = {RingTooShort: {"window": 5}, DecodesTheWholeBand: {"span": 5, "ramp": 5}}
