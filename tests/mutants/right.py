"""Mechanisms that are right: what each fault starts from, and kinds that the shelf does not have yet."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention import Attention, Cost, MultiHead, OneHead, Stepwise
from xformers_lab.check.subject import Subject
from xformers_lab.errors import Refused
from xformers_lab.nn.aux_results import Aux


class Plain(OneHead):
    """Softmax attention (Vaswani et al., 2017, arXiv 1706.03762)."""

    kind = "full"

    def reference(self, q, k, v, *, valid, causal, bias=None):
        return softmax(self.scores(q, k, valid, causal, bias), v)

    def attend(self, q, k, v, *, valid, causal, bias=None):
        return self.reference(q, k, v, valid=valid, causal=causal, bias=bias)

    def scores(self, q, k, valid, causal, bias=None):
        return jnp.where(mask(q, k, valid, causal), scaled_scores(q, k, bias), -1e30)

    def cost(self, T, S):
        return Cost(flops=4 * T * S * self.size.head, memory=T * S, state=2 * S * self.size.head)


class Span(Plain):
    """Adaptive span with a parameter for each head (Sukhbaatar et al., 2019, arXiv 1905.07799), in its score form."""

    kind = "multi-head"

    def __init__(self, size, *, rngs):
        super().__init__(size, rngs=rngs)
        self.span = nnx.Param(jnp.linspace(2.0, 9.0, size.heads))

    def per_head(self):
        return {"span": self.span[...]}

    def reference(self, q, k, v, *, valid, causal, bias=None, span):
        distance = jnp.abs(positions(q, k)[0] - positions(q, k)[1])
        return softmax(self.scores(q, k, valid, causal, bias) - distance / span, v)

    def attend(self, q, k, v, *, valid, causal, bias=None, span):
        return self.reference(q, k, v, valid=valid, causal=causal, bias=bias, span=span)


class Residual(Plain):
    """Scores are added to those of the layer below (RealFormer, He et al., 2020, arXiv 2012.11747)."""

    kind = "prior"

    def init_carry(self, T, S):
        return jnp.zeros((T, S))

    def reference(self, q, k, v, *, valid, causal, carry):
        total = scaled_scores(q, k) + carry
        return softmax(jnp.where(mask(q, k, valid, causal), total, -1e30), v), total

    def attend(self, q, k, v, *, valid, causal, carry):
        return self.reference(q, k, v, valid=valid, causal=causal, carry=carry)


class BothSides(Plain):
    """Attention that cannot be causal: the mean of all values (as FNet's mixing, Lee-Thorp et al., 2022)."""

    kind = "without attention"
    refuses: ClassVar = {"causal": "its mean is over every position"}

    def reference(self, q, k, v, *, valid):
        return softmax(jnp.where(valid[None], jnp.zeros((q.shape[0], k.shape[0])), -1e30), v)

    def attend(self, q, k, v, *, valid):
        weights = valid.astype(jnp.float32)
        return jnp.broadcast_to(weights @ v / jnp.maximum(weights.sum(), 1), q.shape).astype(v.dtype)

    def cost(self, T, S):
        return Cost(flops=2 * S * self.size.head, memory=max(T, S) * self.size.head, state=0)


class TalkingHeads(MultiHead):
    """Scores are mixed over heads before the softmax (Shazeer et al., 2020, arXiv 2003.02436): all heads at once."""

    kind = "multi-head"

    def __init__(self, size, *, rngs):
        super().__init__(size, rngs=rngs)
        self.talk = nnx.Param(jnp.eye(size.heads) + 0.1 * rngs.params.normal((size.heads, size.heads)))

    def attend_heads(self, call):
        if call.bias is not None:
            raise Refused("talking heads take no bias")
        q, k, v = call.q, *(jnp.repeat(y, call.q.shape[2] // y.shape[2], 2) for y in (call.k, call.v))
        s = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        if call.method == "attend":
            s = jnp.einsum("bnts,nm->bmts", s, self.talk[...])
        else:
            s = sum(s[:, n, None] * self.talk[n][None, :, None, None] for n in range(s.shape[1]))
        seen = mask(q[0, :, 0], k[0, :, 0], jnp.ones(k.shape[1], bool), call.causal)
        seen = seen[None, None] & (True if call.valid is None else call.valid[:, None, None])
        p = jax.nn.softmax(jnp.where(seen, s, -1e30), -1) * seen
        return jnp.einsum("bnts,bsnh->btnh", p, v).astype(v.dtype), call.carry, Aux()

    cost = Plain.cost


class Gated(Plain):
    """Attention with a forget gate of the keys and an output gate (Lin et al., 2025, arXiv 2503.02130)."""

    kind = "prior"

    def __init__(self, size, *, rngs):
        super().__init__(size, rngs=rngs)
        self.gates = nnx.Param(0.3 * rngs.params.normal((2, size.dim, size.heads)))

    def from_keys(self, x):
        return {"gate": x @ self.gates[0]}

    def from_queries(self, x):
        return {"opening": x @ self.gates[1]}

    def reference(self, q, k, v, *, valid, causal, bias=None, gate, opening):
        s = self.scores(q, k, valid, causal, bias) + jax.nn.log_sigmoid(gate)[None]
        return (softmax(s, v) * jax.nn.sigmoid(opening)[:, None]).astype(v.dtype)

    def attend(self, q, k, v, *, valid, causal, bias=None, gate, opening):
        return self.reference(q, k, v, valid=valid, causal=causal, bias=bias, gate=gate, opening=opening)

    def cost(self, T, S):
        H, x = self.size.head, S * self.size.dim // self.size.heads
        return Cost(flops=4 * T * S * H, memory=T * S, state=2 * S * H + x)


class Decayed(Stepwise):
    """Retention, a recurrence with a fixed decay (Sun et al., 2023, arXiv 2307.08621)."""

    kind = "linearised"

    decay = 0.8

    def reference(self, q, k, v, *, valid, causal):
        distance = positions(q, k)[0] - positions(q, k)[1]
        return _masked_product(q, k, v, self.decay ** abs(distance) * mask(q, k, valid, causal))

    def attend(self, q, k, v, *, valid, causal):
        if not causal:
            return self.reference(q, k, v, valid=valid, causal=causal)
        k = jnp.where(valid[:, None], k, 0)
        first = jnp.zeros((k.shape[1], v.shape[1]), jnp.float32)

        def one(state, new):
            state = self.next(state, *new)
            return state, state

        states = jax.lax.scan(one, first, (k, v))[1]
        missing = max(0, q.shape[0] - k.shape[0])
        out = jnp.einsum("tf,tfh->th", q[missing:], states[k.shape[0] - q.shape[0] + missing :])
        return jnp.pad(out, ((missing, 0), (0, 0))).astype(v.dtype)

    def next(self, state, k, v):
        return self.decay * state + jnp.outer(k, v)

    def init_state(self, length, dtype=jnp.float32):
        return jnp.zeros((self.size.head, self.size.head))

    def step(self, state, q, k, v):
        state = self.next(state, k, v)
        return q @ state, state

    def cost(self, T, S):
        return Cost(flops=4 * T * S * self.size.head, memory=T * S, state=self.size.head**2)


class Noted(Plain):
    """Softmax attention that reports the size of its values (Plain, 2017)."""

    kind = "full"

    def attend_heads(self, call):
        out, carry, _ = super().attend_heads(call)
        valid = jnp.ones(call.v.shape[:2], bool) if call.valid is None else call.valid
        return out, carry, self.notes(call.v, valid, call.method)

    def notes(self, v, valid, method):
        size = jnp.where(valid, (v**2).mean((2, 3)), 0).sum() / jnp.maximum(valid.sum(), 1)
        return Aux(losses={"size": size})


class Whole(Attention):
    """A causal running mean of the block's input (Zhang et al., 2018, arXiv 1805.00631): it overrides `__call__`."""

    kind = "without attention"
    refuses: ClassVar = {
        "bidirectional": "it looks at the past of its own input",
        "cross": "it has no queries",
        "decoding": "it is a test",
    }

    def __call__(self, x, memory=None, *, valid=None, causal=False, position=None, carry=None, key=None):
        if memory is not None or not causal:
            raise Refused("the running mean looks at the past of its own input alone")
        w = jnp.ones(x.shape[:2]) if valid is None else valid
        w = jnp.asarray(w, jnp.float32)[..., None]
        x = jnp.where(w > 0, x, 0)
        return (jnp.cumsum(x * w, 1) / jnp.maximum(jnp.cumsum(w, 1), 1)).astype(x.dtype), carry, Aux()

    def cost(self, T, S):
        return Cost(flops=1, memory=T * self.size.dim, state=self.size.dim + 1)


def positions(q, k):
    return jnp.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0], jnp.arange(k.shape[0])[None]


def mask(q, k, valid, causal):
    q_at, k_at = positions(q, k)
    return valid[None] & ((k_at <= q_at) | (not causal)) & (q_at == q_at)


def scaled_scores(q, k, bias=None):
    s = jnp.dot(q, k.T, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    return s if bias is None else s + bias(*positions(q, k))


def softmax(s, v):
    p = jax.nn.softmax(s, -1) * (s > -1e29)
    return jnp.dot(p, v, preferred_element_type=jnp.float32).astype(v.dtype)


def _masked_product(q, k, v, weights):
    s = jnp.dot(q, k.T, preferred_element_type=jnp.float32) * weights
    return jnp.dot(s, v, preferred_element_type=jnp.float32).astype(v.dtype)


def subject(kind, **options):
    return Subject(kind.__name__, lambda size, small: kind(size, **options, rngs=nnx.Rngs(0)))
