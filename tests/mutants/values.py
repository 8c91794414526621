"""Faults of what a mechanism computes."""

import jax
import jax.numpy as jnp

from xformers_lab.attention._engine.dense import dense
from xformers_lab.attention._engine.pattern import Band, Causal
from xformers_lab.attention.adaptive_span import AdaptiveSpan
from xformers_lab.attention.differential import Differential
from xformers_lab.attention.linear import EPSILON, Linear
from xformers_lab.attention.local import Local
from xformers_lab.attention.mla import Mla
from xformers_lab.attention.multiscale import Multiscale

from .right import Decayed, Gated, Plain, TalkingHeads, positions, scaled_scores, softmax


class AlignedAtTheStart(Plain):
    __doc__ = Plain.__doc__

    def reference(self, q, k, v, *, valid, causal, bias=None):
        s = scaled_scores(q, k, bias)
        seen = valid[None] & (jnp.tril(jnp.ones(s.shape, bool)) if causal else True)
        return softmax(jnp.where(seen, s, -1e30), v)


class FastForgetsPadding(Plain):
    __doc__ = Plain.__doc__

    def attend(self, q, k, v, *, valid, causal, bias=None):
        return super().attend(q, k, v, valid=jnp.ones_like(valid), causal=causal, bias=bias)


class WrongScale(Plain):
    __doc__ = Plain.__doc__

    def attend(self, q, k, v, *, valid, causal, bias=None):
        return super().attend(q / q.shape[-1] ** 0.5, k, v, valid=valid, causal=causal, bias=bias)


class WindowOffByOne(Local):
    __doc__ = Local.__doc__

    def reference(self, q, k, v, *, valid=None, causal, bias=None):
        pattern = Band(self.window + 1) & Causal() if causal else Band(self.window + 1)
        return dense(q, k, v, pattern=pattern, valid=valid, bias=bias)


class LastChunkLost(Linear):
    __doc__ = Linear.__doc__

    def attend(self, q, k, v, *, valid=None, causal):
        kept = k.shape[0] // self.chunk * self.chunk
        last = jnp.arange(k.shape[0]) < kept
        return super().attend(q, k, v, valid=last if valid is None else valid & last, causal=causal)


class BiasShifted(Plain):
    __doc__ = Plain.__doc__

    def reference(self, q, k, v, *, valid, causal, bias=None):
        shifted = None if bias is None else lambda q_at, k_at: bias(q_at - k.shape[0] + q.shape[0], k_at)
        return super().reference(q, k, v, valid=valid, causal=causal, bias=shifted)


class GroupsInTheWrongOrder(TalkingHeads):
    __doc__ = TalkingHeads.__doc__

    def attend_heads(self, call):
        k, v = (jnp.tile(y, (1, 1, call.q.shape[2] // y.shape[2], 1)) for y in (call.k, call.v))
        return super().attend_heads(call.replace(k=k, v=v))


class KnowsItsNeighbours(Plain):
    __doc__ = Plain.__doc__

    def attend(self, q, k, v, *, valid, causal, bias=None):
        out = super().attend(q, k, v, valid=valid, causal=causal, bias=bias)
        return out * (2 if type(q).__name__ == "BatchTracer" else 1)


class GateFromTheStart(Gated):
    __doc__ = Gated.__doc__

    def attend_heads(self, call):
        assert call.x is not None
        x_q = call.x[:, : call.q.shape[1]] if call.x_q is None else call.x_q
        return super().attend_heads(call.replace(x_q=x_q))


class RecurrenceForgetsPadding(Decayed):
    __doc__ = Decayed.__doc__

    def attend(self, q, k, v, *, valid, causal):
        return super().attend(q, k, v, valid=jnp.ones_like(valid), causal=causal)


class DecayTooEarly(Decayed):
    __doc__ = Decayed.__doc__

    def next(self, state, k, v):
        return self.decay * (state + jnp.outer(k, v))


def _heads_turned(attend_heads, call):
    """A fast form that meets its heads in the opposite order."""
    turn = (lambda x: x[:, :, ::-1]) if call.method == "attend" else (lambda x: x)
    out, carry, aux = attend_heads(call.replace(q=turn(call.q), k=turn(call.k), v=turn(call.v)))
    return turn(out), carry, aux


class ScalesInTheWrongOrder(Multiscale):
    __doc__ = Multiscale.__doc__

    def attend_heads(self, call):
        return _heads_turned(super().attend_heads, call)


class SpansOfOtherHeads(AdaptiveSpan):
    """Parameters that start equal for all heads hide it, until they have learned (AdaptiveSpan, 2019)."""

    def attend_heads(self, call):
        return _heads_turned(super().attend_heads, call.replace(bias=None))


class RandomKeysByLength(Plain):
    """Random keys drawn for the call's shape (Zaheer et al., 2020)."""

    def scores(self, q, k, valid, causal, bias=None):
        drawn = jax.random.bernoulli(jax.random.key(0), 0.7, (q.shape[0], k.shape[0]))
        return jnp.where(drawn, super().scores(q, k, valid, causal, bias), -1e30)


class LimitOfHalf(Local):
    __doc__ = Local.__doc__

    @staticmethod
    def limit(length):
        return {"window": length // 2}


class LimitOfAnotherKernel(Linear):
    __doc__ = Linear.__doc__

    limit_error = 0.01

    @staticmethod
    def limit(length):
        return {}


class PositionsInBytes(Plain):
    """Positions beyond 255 start again (Plain, 2017)."""

    def attend(self, q, k, v, *, valid, causal, bias=None):
        q_at, k_at = (at.astype(jnp.uint8) for at in positions(q, k))
        seen = valid[None] & ((k_at <= q_at) | (not causal))
        return softmax(jnp.where(seen, scaled_scores(q, k, bias), -1e30), v)


class BufferTooSmall(Local):
    """Keys are read from a buffer of the newest 400 (Local, 2020)."""

    def attend(self, q, k, v, *, valid=None, causal, bias=None):
        kept = jnp.arange(k.shape[0]) >= k.shape[0] - 400
        return super().attend(q, k, v, valid=kept if valid is None else valid & kept, causal=causal, bias=bias)


class ScaleOfTheLogarithm(Plain):
    """Scores grow with the logarithm of the length, relative to that of the model's (Chiang and Cholak, 2022)."""

    def scores(self, q, k, valid, causal, bias=None):
        scale = jnp.log(float(k.shape[0])) / jnp.log(float(self.size.length))
        return super().scores(q * scale, k, valid, causal, bias)


class CentredOverTheBatch(TalkingHeads):
    __doc__ = TalkingHeads.__doc__

    def attend_heads(self, call):
        return super().attend_heads(call.replace(k=call.k - 0.1 * call.k.mean(0, keepdims=True)))


class TallStartsAtTheStart(Plain):
    """Queries before the first key are taken to stand at it (Plain, 2017)."""

    def reference(self, q, k, v, *, valid, causal, bias=None):
        at = jnp.arange(q.shape[0]) + max(0, k.shape[0] - q.shape[0])
        seen = valid[None] & ((jnp.arange(k.shape[0])[None] <= at[:, None]) | (not causal))
        return softmax(jnp.where(seen, scaled_scores(q, k, bias), -1e30), v)


class DropsTheRotaryKey(Mla):
    __doc__ = Mla.__doc__

    def attend_heads(self, call):
        return super().attend_heads(call.replace(k=0 * call.k) if call.method == "attend" else call)


class HalvesOfAnotherOrder(Differential):
    """The fast form takes the second half's softmax from the first's keys (Differential, 2024)."""

    def attend(self, q, k, v, *, valid=None, causal, bias=None, balance):
        a, _, c, _ = jnp.split(k, 4, -1)
        given = {"valid": valid, "causal": causal, "bias": bias, "balance": balance}
        return super().attend(q, jnp.concatenate([a, a, c, c], -1), v, **given)


class ClipsTheMean(Plain):
    """Both forms clip the mean, which is not what `finished` says of it (Clipped, 2020)."""

    def reference(self, q, k, v, *, valid, causal, bias=None):
        return jnp.maximum(super().reference(q, k, v, valid=valid, causal=causal, bias=bias), 0)

    def finished(self, mean):
        return mean / 2


class NormaliserCountsPadding(Linear):
    """The sum of all keys' features, padding included, divides (Linear, 2020)."""

    def attend(self, q, k, v, *, valid=None, causal):
        weights = (jax.nn.elu(q) + 1) @ (jax.nn.elu(k) + 1).T
        weights = jnp.tril(weights, k.shape[0] - q.shape[0]) if causal else weights
        seen = weights if valid is None else weights * valid
        return (seen @ v / (weights.sum(-1, keepdims=True) + EPSILON)).astype(v.dtype)


class NoMethod(TalkingHeads):
    __doc__ = TalkingHeads.__doc__

    def attend_heads(self, call):
        return super().attend_heads(call.replace(method="attend"))


class ForgetsValuesOfPairs(Local):
    __doc__ = Local.__doc__
    adds_pair_values = True

    def attend(self, q, k, v, *, valid=None, documents=None, causal, bias=None, pair_values=None):
        return super().attend(q, k, v, valid=valid, documents=documents, causal=causal, bias=bias)


FAULTS = {
    AlignedAtTheStart: "end_aligned",
    FastForgetsPadding: "equals_reference",
    WrongScale: "equals_reference",
    WindowOffByOne: "equals_reference",
    LastChunkLost: "equals_reference",
    BiasShifted: "end_aligned",
    GroupsInTheWrongOrder: "grouped_query",
    KnowsItsNeighbours: "heads_apart",
    GateFromTheStart: "end_aligned",
    RecurrenceForgetsPadding: "equals_reference",
    DecayTooEarly: "equals_reference",
    ScalesInTheWrongOrder: "equals_reference",
    SpansOfOtherHeads: "equals_reference",
    RandomKeysByLength: "end_aligned",
    LimitOfHalf: "full_in_the_limit",
    LimitOfAnotherKernel: "full_in_the_limit",
    PositionsInBytes: "several_blocks",
    BufferTooSmall: "several_blocks",
    ScaleOfTheLogarithm: "shortest",
    CentredOverTheBatch: "samples_apart",
    TallStartsAtTheStart: "end_aligned",
    DropsTheRotaryKey: "equals_reference",
    HalvesOfAnotherOrder: "equals_reference",
    NormaliserCountsPadding: "equals_reference",
    ClipsTheMean: "attention_map",
    NoMethod: "equals_reference",
    ForgetsValuesOfPairs: "pair_values",
}
OPTIONS = {
    WindowOffByOne: {"window": 5},
    LastChunkLost: {"chunk": 5},
    ScalesInTheWrongOrder: {"scales": (2, 9)},
    SpansOfOtherHeads: {"span": 5, "ramp": 5},
}
