"""The kit passes every mechanism of the shelf, and names the property that each planted fault breaks."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as draw
from jax.core import Tracer

from xformers_lab import spec
from xformers_lab.attention import Attention, Cost
from xformers_lab.attention._engine.dense import dense
from xformers_lab.attention._engine.pattern import Band, BlockLocal, Causal
from xformers_lab.attention._patterned import Patterned
from xformers_lab.attention.adaptive_span import AdaptiveSpan
from xformers_lab.attention.axial import Axial
from xformers_lab.attention.differential import Differential
from xformers_lab.attention.linear import EPSILON, Linear
from xformers_lab.attention.local import Local
from xformers_lab.attention.mla import Mla
from xformers_lab.attention.multiscale import Multiscale
from xformers_lab.attention.softcap import Softcap
from xformers_lab.check import costs, masks, run, values
from xformers_lab.check.run import PROPERTIES, check, examine
from xformers_lab.check.subject import Case, Subject, compare, quick_jit

NAMED = {holds.__name__: holds for holds in PROPERTIES}


@pytest.mark.parametrize("name", spec.names("attention"))
def test_shelf(name):
    report = check(name)
    assert report.passed, report.failed
    assert len(report.skipped) < len(PROPERTIES) / 2


# Options under which a mechanism is another algorithm: what the bare name proves says nothing of them.
OTHER_FORMS = [
    "gaussian:kind=distance",
    "linear:features=cosformer:chunk=5",
    "linear:features=hedgehog:chunk=5",
    "linear:features=softmax:chunk=5",
    "performer:kernel=relu:features=5:chunk=5",
    "rfa:gate=learned:features=5:chunk=5",
    "streaming:logit=learned:sinks=0:window=5",
    "synthesizer:kind=factorised_dense",
]
MORE_FORMS = [
    "axial:axis=row",
    "axial:shape=3x4x6",
    "bigbird:block=5:heads=own",
    "fixed:stride=6:summary=2:heads=own",
    "gaussian:kind=layer",
    "image_local:form=2d:block=3x2:memory=2x1",
    "linear:features=dpfp:nu=2:chunk=5",
    "linear:features=relu:chunk=5",
    "linear:features=taylor:chunk=5",
    "linformer:share=keyvalue:rank=5",
    "linformer:share=none:rank=5",
    "longformer:dilation=2:window=3:tokens=2",
    "mca:pool=mean",
    "performer:rows=independent:features=5:chunk=5",
    "poolingformer:pool=max:window=3:reach=12",
    "rfa:kernel=arccos:features=5:chunk=5",
    "synthesizer:kind=factorised_random",
    "synthesizer:kind=random",
]
PROOFS = [
    values.equals_reference,
    values.same_gradients,
    masks.no_future,
    masks.no_padding,
    masks.nothing_to_see,
    costs.decoding,
]


@pytest.mark.parametrize("choice", [*OTHER_FORMS, *(pytest.param(form, marks=pytest.mark.slow) for form in MORE_FORMS)])
def test_other_forms(choice):
    resolved = spec.resolve("attention", choice)
    subject = Subject(choice, lambda size, small: run._fitted(choice, resolved, size, False))
    assert examine(subject, PROOFS).failed == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [*spec.names("attention"), "local:window=1", "strided:stride=1", "axial:axis=row", "axial:axis=column"]
)
def test_shelf_at_many_shapes(name):
    assert check(name, deep=True).failed == []


def agrees(name: str, T: int, S: int, causal: bool, seed: int) -> None:
    """attend gives what reference gives on T queries and S keys, at a model built for them, with padding drawn."""
    resolved = spec.resolve("attention", name)
    one = Subject(name, lambda size, small: run._fitted(name, resolved, size, small), length=S)
    assume(causal in one.modes)
    case = Case(T, S, causal, biased=one.takes_bias, batch=2)
    assume(not one.refusal(case))
    real, key = jnp.asarray(np.random.default_rng(seed).random((2, S)) < 0.7), jax.random.key(1)
    both = quick_jit(lambda own, inputs, real: [
        one.forward(own, inputs, real, key, causal=causal, method=method) for method in ("attend", "reference")
    ])  # fmt: skip
    with jax.default_matmul_precision("highest"):
        fast, slow = both(one.own, one.inputs(case, seed), real)
    compare(np.asarray(fast), np.asarray(slow), 2e-5, f"{name} ({case})", "")


SHAPES = {"T": draw.integers(1, 40), "S": draw.integers(1, 40), "causal": draw.booleans(), "seed": draw.integers(0, 99)}
# Finding a smaller example would compile for minutes.
SEARCH = {
    "deadline": None,
    "database": None,
    "phases": [Phase.generate],
    "suppress_health_check": list(HealthCheck),
}


@settings(max_examples=12, derandomize=True, **SEARCH)
@given(name=draw.sampled_from(spec.names("attention")), **SHAPES)
def test_shelf_at_a_few_drawn_shapes(name, T, S, causal, seed):
    agrees(name, T, S, causal, seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", spec.names("attention"))
@settings(max_examples=40, **SEARCH)
@given(**SHAPES)
def test_shelf_at_drawn_shapes(name, T, S, causal, seed):
    agrees(name, T, S, causal, seed)


# ---- mechanisms that are right: what each fault starts from, and kinds that the shelf does not have yet ----------


class Plain(Attention):
    """Softmax attention (Vaswani et al., 2017, arXiv 1706.03762).

    Kind: full
    """

    def reference(self, q, k, v, *, real, causal, bias=None):
        return _softmax(self.scores(q, k, real, causal, bias), v)

    def attend(self, q, k, v, *, real, causal, bias=None):
        return self.reference(q, k, v, real=real, causal=causal, bias=bias)

    def scores(self, q, k, real, causal, bias=None):
        return jnp.where(_mask(q, k, real, causal), _scores(q, k, bias), -1e30)

    def cost(self, T, S):
        return Cost(flops=4 * T * S * self.size.head, memory=T * S, state=2 * S * self.size.head)


class Span(Plain):
    """Adaptive span with a parameter for each head (Sukhbaatar et al., 2019, arXiv 1905.07799), in its score form.

    Kind: multi-head
    """

    def __init__(self, size, *, rngs):
        super().__init__(size, rngs=rngs)
        self.span = nnx.Param(jnp.linspace(2.0, 9.0, size.heads))

    def per_head(self):
        return {"span": self.span[...]}

    def reference(self, q, k, v, *, real, causal, bias=None, span):
        distance = jnp.abs(_at(q, k)[0] - _at(q, k)[1])
        return _softmax(self.scores(q, k, real, causal, bias) - distance / span, v)

    def attend(self, q, k, v, *, real, causal, bias=None, span):
        return self.reference(q, k, v, real=real, causal=causal, bias=bias, span=span)


class Residual(Plain):
    """Scores are added to those of the layer below (RealFormer, He et al., 2020, arXiv 2012.11747).

    Kind: prior
    """

    def init_carry(self, T, S):
        return jnp.zeros((T, S))

    def reference(self, q, k, v, *, real, causal, carry):
        total = _scores(q, k) + carry
        return _softmax(jnp.where(_mask(q, k, real, causal), total, -1e30), v), total

    def attend(self, q, k, v, *, real, causal, carry):
        return self.reference(q, k, v, real=real, causal=causal, carry=carry)


class BothSides(Plain):
    """Attention that cannot be causal: the mean of all values (as FNet's mixing, Lee-Thorp et al., 2022).

    Kind: without attention
    Not causal: its mean is over every position.
    """

    def reference(self, q, k, v, *, real):
        return _softmax(jnp.where(real[None], jnp.zeros((q.shape[0], k.shape[0])), -1e30), v)

    def attend(self, q, k, v, *, real):
        weights = real.astype(jnp.float32)
        return jnp.broadcast_to(weights @ v / jnp.maximum(weights.sum(), 1), q.shape).astype(v.dtype)

    def cost(self, T, S):
        return Cost(flops=2 * S * self.size.head, memory=max(T, S) * self.size.head, state=0)


class TalkingHeads(Attention):
    """Scores are mixed over heads before the softmax (Shazeer et al., 2020, arXiv 2003.02436): it overrides `mix`.

    Kind: multi-head
    """

    def __init__(self, size, *, rngs):
        super().__init__(size, rngs=rngs)
        self.talk = nnx.Param(jnp.eye(size.heads) + 0.1 * rngs.params.normal((size.heads, size.heads)))

    def mix(
        self, q, k, v, *, x=None, x_q=None, real=None, causal=False, bias=None, carry=None, key=None, method="attend"
    ):
        if bias is not None:
            raise ValueError("talking heads take no bias")
        k, v = (jnp.repeat(y, q.shape[2] // y.shape[2], 2) for y in (k, v))
        s = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        s = jnp.einsum("bnts,nm->bmts", s, self.talk[...])
        seen = _mask(q[0, :, 0], k[0, :, 0], jnp.ones(k.shape[1], bool), causal)
        seen = seen[None, None] & (True if real is None else real[:, None, None])
        p = jax.nn.softmax(jnp.where(seen, s, -1e30), -1) * seen
        return jnp.einsum("bnts,bsnh->btnh", p, v).astype(v.dtype), carry, {}

    cost = Plain.cost


class Gated(Plain):
    """Attention with a forget gate of the keys and an output gate (Lin et al., 2025, arXiv 2503.02130).

    Kind: prior
    """

    def __init__(self, size, *, rngs):
        super().__init__(size, rngs=rngs)
        self.gates = nnx.Param(0.3 * rngs.params.normal((2, size.dim, size.heads)))

    def from_keys(self, x):
        return {"gate": x @ self.gates[0]}

    def from_queries(self, x):
        return {"opening": x @ self.gates[1]}

    def reference(self, q, k, v, *, real, causal, bias=None, gate, opening):
        s = self.scores(q, k, real, causal, bias) + jax.nn.log_sigmoid(gate)[None]
        return (_softmax(s, v) * jax.nn.sigmoid(opening)[:, None]).astype(v.dtype)

    def attend(self, q, k, v, *, real, causal, bias=None, gate, opening):
        return self.reference(q, k, v, real=real, causal=causal, bias=bias, gate=gate, opening=opening)

    def cost(self, T, S):
        H, x = self.size.head, S * self.size.dim // self.size.heads
        return Cost(flops=4 * T * S * H, memory=T * S, state=2 * S * H + x)


class Decayed(Attention):
    """Retention, a recurrence with a fixed decay (Sun et al., 2023, arXiv 2307.08621).

    Kind: linearised
    """

    decay = 0.8

    def reference(self, q, k, v, *, real, causal):
        distance = _at(q, k)[0] - _at(q, k)[1]
        return _masked_product(q, k, v, self.decay ** abs(distance) * _mask(q, k, real, causal))

    def attend(self, q, k, v, *, real, causal):
        if not causal:
            return self.reference(q, k, v, real=real, causal=causal)
        k = jnp.where(real[:, None], k, 0)
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
    """Softmax attention that reports the size of its values (Plain, 2017).

    Kind: full
    """

    def mix(
        self, q, k, v, *, x=None, x_q=None, real=None, causal=False, bias=None, carry=None, key=None, method="attend"
    ):
        given = {"x": x, "x_q": x_q, "real": real, "causal": causal, "bias": bias, "carry": carry, "key": key}
        out, carry, _ = super().mix(q, k, v, **given, method=method)
        return out, carry, self.notes(v, jnp.ones(v.shape[:2], bool) if real is None else real, method)

    def notes(self, v, real, method):
        size = jnp.where(real, (v**2).mean((2, 3)), 0).sum() / jnp.maximum(real.sum(), 1)
        return {"loss/size": size}


class Whole(Attention):
    """A causal running mean of the block's input (Zhang et al., 2018, arXiv 1805.00631): it overrides `__call__`.

    Kind: without attention
    One way: it looks at the past of its own input
    Not cross: it has no queries
    No decoding: it is a test
    """

    def __call__(self, x, memory=None, *, real=None, causal=False, position=None, carry=None, key=None):
        if memory is not None or not causal:
            raise ValueError("the running mean looks at the past of its own input alone")
        w = jnp.ones(x.shape[:2]) if real is None else real
        w = jnp.asarray(w, jnp.float32)[..., None]
        x = jnp.where(w > 0, x, 0)
        return (jnp.cumsum(x * w, 1) / jnp.maximum(jnp.cumsum(w, 1), 1)).astype(x.dtype), carry, {}

    def cost(self, T, S):
        return Cost(flops=1, memory=T * self.size.dim, state=self.size.dim + 1)


def _at(q, k):
    return jnp.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0], jnp.arange(k.shape[0])[None]


def _mask(q, k, real, causal):
    q_at, k_at = _at(q, k)
    return real[None] & ((k_at <= q_at) | (not causal)) & (q_at == q_at)


def _scores(q, k, bias=None):
    s = jnp.dot(q, k.T, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    return s if bias is None else s + bias(*_at(q, k))


def _softmax(s, v):
    p = jax.nn.softmax(s, -1) * (s > -1e29)
    return jnp.dot(p, v, preferred_element_type=jnp.float32).astype(v.dtype)


def _masked_product(q, k, v, weights):
    s = jnp.dot(q, k.T, preferred_element_type=jnp.float32) * weights
    return jnp.dot(s, v, preferred_element_type=jnp.float32).astype(v.dtype)


def subject(kind, **options):
    return Subject(kind.__name__, lambda size, small: kind(size, **options, rngs=nnx.Rngs(0)))


PER_HEAD = {"carried", "full_in_the_limit", "samples_apart", "auxiliary"}


@pytest.mark.parametrize("kind, skipped", [
    (Plain, PER_HEAD),
    (Span, PER_HEAD),
    (Residual, PER_HEAD - {"carried"}),
    (BothSides, PER_HEAD | {"decoding", "state_size", "no_future"}),
    (TalkingHeads, PER_HEAD - {"samples_apart"} | {"heads_apart"}),
    (Gated, PER_HEAD),
    (Decayed, PER_HEAD),
    (Noted, PER_HEAD - {"auxiliary"}),
])  # fmt: skip
def test_right_mechanisms_of_every_kind_pass(kind, skipped):
    report = examine(subject(kind), PROPERTIES)
    assert report.passed, report.failed
    assert {skip.property for skip in report.skipped} == skipped
    assert all(skip.reason for skip in report.skipped)


def test_a_mechanism_that_overrides_the_whole_call():
    names = [
        "signature",
        "equals_reference",
        "jit_equals_eager",
        "no_retrace",
        "bfloat16",
        "no_future",
        "no_padding",
        "nothing_to_see",
        "memory",
    ]
    report = examine(subject(Whole), [NAMED[name] for name in names])
    assert report.passed, report.failed
    assert [skip.property for skip in report.skipped] == ["equals_reference"]


# ---- planted faults: each a common mistake, and the property that must name it -----------------------------------


class SeesOneAhead(Plain):
    __doc__ = Plain.__doc__

    def reference(self, q, k, v, *, real, causal, bias=None):
        q_at, k_at = _at(q, k)
        seen = real[None] & ((k_at <= q_at + 1) | (not causal))
        return _softmax(jnp.where(seen, _scores(q, k, bias), -1e30), v)


class AlignedAtTheStart(Plain):
    __doc__ = Plain.__doc__

    def reference(self, q, k, v, *, real, causal, bias=None):
        s = _scores(q, k, bias)
        seen = real[None] & (jnp.tril(jnp.ones(s.shape, bool)) if causal else True)
        return _softmax(jnp.where(seen, s, -1e30), v)


class LeaksThroughAMean(Plain):
    """Keys are centred over the whole sequence (2026)."""

    def reference(self, q, k, v, *, real, causal, bias=None):
        mean = jnp.where(real[:, None], k, 0).sum(0) / jnp.maximum(real.sum(), 1)
        return super().reference(
            q, k - 0.1 * jax.lax.stop_gradient(mean), v * (1 + mean), real=real, causal=causal, bias=bias
        )


class HiddenLeak(Plain):
    """Its gradient to the future is zero, its values change all the same (2026)."""

    def reference(self, q, k, v, *, real, causal, bias=None):
        top = jax.lax.stop_gradient(jnp.where(real, jnp.abs(v).max(-1), 0).max())
        return super().reference(q, k, v, real=real, causal=causal, bias=bias) * (1 + 0.1 * top)


class ForgetsPadding(Plain):
    __doc__ = Plain.__doc__

    def reference(self, q, k, v, *, real, causal, bias=None):
        return super().reference(q, k, v, real=jnp.ones_like(real), causal=causal, bias=bias)


class PaddingIsSoft(Plain):
    """Padding is pushed down by ten instead of masked (2026)."""

    def reference(self, q, k, v, *, real, causal, bias=None):
        s = self.scores(q, k, jnp.ones_like(real), causal, bias)
        return _softmax(s - 10.0 * ~real[None], v)


class FastForgetsPadding(Plain):
    __doc__ = Plain.__doc__

    def attend(self, q, k, v, *, real, causal, bias=None):
        return super().attend(q, k, v, real=jnp.ones_like(real), causal=causal, bias=bias)


class WrongScale(Plain):
    __doc__ = Plain.__doc__

    def attend(self, q, k, v, *, real, causal, bias=None):
        return super().attend(q / q.shape[-1] ** 0.5, k, v, real=real, causal=causal, bias=bias)


class WindowOffByOne(Local):
    __doc__ = Local.__doc__

    def reference(self, q, k, v, *, real=None, causal, bias=None):
        pattern = Band(self.window + 1) & Causal() if causal else Band(self.window + 1)
        return dense(q, k, v, pattern=pattern, real=real, bias=bias)


class LastChunkLost(Linear):
    __doc__ = Linear.__doc__

    def attend(self, q, k, v, *, real=None, causal):
        kept = k.shape[0] // self.chunk * self.chunk
        last = jnp.arange(k.shape[0]) < kept
        return super().attend(q, k, v, real=last if real is None else real & last, causal=causal)


class NoBiasGradient(Plain):
    __doc__ = Plain.__doc__

    def attend(self, q, k, v, *, real, causal, bias=None):
        return super().attend(q, k, v, real=real, causal=causal, bias=jax.lax.stop_gradient(bias))


class NoParameterGradient(Span):
    __doc__ = Span.__doc__

    def attend(self, q, k, v, *, real, causal, bias=None, span):
        return super().attend(q, k, v, real=real, causal=causal, bias=bias, span=jax.lax.stop_gradient(span))


@jax.custom_vjp
def _wrong_backward(q, k):
    return q @ k.T


_wrong_backward.defvjp(lambda q, k: (q @ k.T, (q, k)), lambda saved, g: (g @ saved[1], g.T @ saved[0] * 1.01))


class WrongCustomGradient(Plain):
    __doc__ = Plain.__doc__

    def attend(self, q, k, v, *, real, causal, bias=None):
        s = _wrong_backward(q, k) * q.shape[-1] ** -0.5
        s = s if bias is None else s + bias(*_at(q, k))
        return _softmax(jnp.where(_mask(q, k, real, causal), s, -1e30), v)


class BiasShifted(Plain):
    __doc__ = Plain.__doc__

    def reference(self, q, k, v, *, real, causal, bias=None):
        shifted = None if bias is None else lambda q_at, k_at: bias(q_at - k.shape[0] + q.shape[0], k_at)
        return super().reference(q, k, v, real=real, causal=causal, bias=shifted)


class QuadraticMask(Linear):
    """Declares linear memory (Linear, 2020), and builds a T x S mask."""

    def attend(self, q, k, v, *, real=None, causal):
        seen = jnp.tril(jnp.ones((q.shape[0], k.shape[0]))).any(1)
        return super().attend(q, k, v, real=real, causal=causal) * seen[:, None]


class QuadraticProducts(Linear):
    """Declares linear cost (Linear, 2020), and multiplies out all pairs."""

    def attend(self, q, k, v, *, real=None, causal):
        return self.reference(q, k, v, real=real, causal=causal)


class CostOffByTen(Plain):
    __doc__ = Plain.__doc__

    def cost(self, T, S):
        return Cost(flops=0.4 * T * S * self.size.head, memory=T * S, state=2 * S * self.size.head)


class StateUndeclared(Local):
    """Declares a ring of the window (Local, 2020), and keeps every key."""

    init_cache = Attention.init_cache


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


class OverflowsInHalf(Plain):
    """A softmax without its maximum (Plain, 2017)."""

    def attend(self, q, k, v, *, real, causal, bias=None):
        weights = jnp.exp(_scores(q, k, bias)) * _mask(q, k, real, causal)
        return (weights @ v / jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)).astype(v.dtype)


class SumsInHalf(Linear):
    """A running sum kept in the inputs' type (Linear, 2020)."""

    def attend(self, q, k, v, *, real=None, causal):
        if not causal:
            return self.reference(q, k, v, real=real, causal=causal)
        real = jnp.ones(k.shape[0], bool) if real is None else real
        q, k = jax.nn.elu(q) + 1, jnp.where(real[:, None], jax.nn.elu(k) + 1, 0)
        add = lambda state, new: (state + jnp.outer(*new), state + jnp.outer(*new))
        first = jnp.zeros((k.shape[1], v.shape[1]), v.dtype)
        states = jax.lax.scan(add, first, (k, v))[1]
        sums = jax.lax.scan(lambda s, new: (s + new, s + new), jnp.zeros(k.shape[1], k.dtype), k)[1]
        at = jnp.arange(q.shape[0]) + k.shape[0] - q.shape[0]
        return jnp.einsum("tf,tfh->th", q, states[at]) / (jnp.einsum("tf,tf->t", q, sums[at])[:, None] + EPSILON)


class ForgetsItsType(Plain):
    __doc__ = Plain.__doc__

    def reference(self, q, k, v, *, real, causal, bias=None):
        return super().reference(q, k, v.astype(jnp.float32), real=real, causal=causal, bias=bias)


class NanOnPadding(Plain):
    __doc__ = Plain.__doc__

    def reference(self, q, k, v, *, real, causal, bias=None):
        s = jnp.where(_mask(q, k, real, causal), _scores(q, k, bias), -jnp.inf)
        return (jax.nn.softmax(s, -1) @ v).astype(v.dtype)


class NanInTheGradient(Plain):
    __doc__ = Plain.__doc__

    def reference(self, q, k, v, *, real, causal, bias=None):
        out = (jax.nn.softmax(jnp.where(_mask(q, k, real, causal), _scores(q, k, bias), -jnp.inf), -1) @ v).astype(
            v.dtype
        )
        return jnp.where(_mask(q, k, real, causal).any(1)[:, None], out, 0)


class UniformOnPadding(Plain):
    __doc__ = Plain.__doc__

    def reference(self, q, k, v, *, real, causal, bias=None):
        s = jnp.where(_mask(q, k, real, causal), _scores(q, k, bias), -1e30)
        return jax.nn.softmax(s, -1).astype(v.dtype) @ v


class GroupsInTheWrongOrder(TalkingHeads):
    __doc__ = TalkingHeads.__doc__

    def mix(self, q, k, v, **given):
        k, v = (jnp.tile(y, (1, 1, q.shape[2] // y.shape[2], 1)) for y in (k, v))
        return super().mix(q, k, v, **given)


class KnowsItsNeighbours(Plain):
    __doc__ = Plain.__doc__

    def attend(self, q, k, v, *, real, causal, bias=None):
        out = super().attend(q, k, v, real=real, causal=causal, bias=bias)
        return out * (2 if type(q).__name__ == "BatchTracer" else 1)


class DependsOnTracing(Plain):
    __doc__ = Plain.__doc__

    def mix(self, q, k, v, **given):
        out, carry, aux = super().mix(q, k, v, **given)
        return out * (1 if isinstance(q, Tracer) else 2), carry, aux


class CountsItsCalls(Plain):
    __doc__ = Plain.__doc__

    def __init__(self, size, *, rngs):
        super().__init__(size, rngs=rngs)
        self.calls = 0

    def mix(self, q, k, v, **given):
        self.calls += 1
        return super().mix(q, k, v, **given)


class VariableChangesType(Plain):
    __doc__ = Plain.__doc__

    def __init__(self, size, *, rngs):
        super().__init__(size, rngs=rngs)
        self.mean = nnx.Variable(jnp.zeros((), jnp.bfloat16))

    def mix(self, q, k, v, **given):
        self.mean[...] = self.mean[...]
        self.mean.set_value(self.mean[...] * 0.9 + q.mean())
        return super().mix(q, k, v, **given)


class CarryDropped(Residual):
    __doc__ = Residual.__doc__

    def attend(self, q, k, v, *, real, causal, carry):
        return super().attend(q, k, v, real=real, causal=causal, carry=carry)[0], carry


class UnknownArgument(Plain):
    __doc__ = Plain.__doc__

    def attend(self, q, k, v, *, real, causal, bias=None, mask=None):
        return super().attend(q, k, v, real=real, causal=causal, bias=bias)


class BiasOnlyWhenFast(Plain):
    __doc__ = Plain.__doc__

    def reference(self, q, k, v, *, real, causal):
        return super().reference(q, k, v, real=real, causal=causal)


class NoPaper(Plain):
    """An idea."""


class GateSeesTheWholeSequence(Gated):
    __doc__ = Gated.__doc__

    def from_keys(self, x):
        return super().from_keys(x - 0.1 * x.mean(1, keepdims=True))


class GateOfTheNextToken(Gated):
    __doc__ = Gated.__doc__

    def from_queries(self, x):
        return super().from_queries(jnp.roll(x, -1, 1))


class GateCountsPadding(Gated):
    """A gate that adds up over the sequence, through what is padding too (Gated, 2025)."""

    def from_keys(self, x):
        return super().from_keys(jnp.cumsum(x, 1) / 8)


class GateFromTheStart(Gated):
    __doc__ = Gated.__doc__

    def mix(self, q, k, v, *, x=None, x_q=None, **given):
        assert x is not None
        return super().mix(q, k, v, x=x, x_q=x[:, : q.shape[1]] if x_q is None else x_q, **given)


class StaleInput(Gated):
    __doc__ = Gated.__doc__

    def mix_step(self, cache, q, k, v, **given):
        out, new, carry = super().mix_step(cache, q, k, v, **given)
        return out, new | {"x": jnp.roll(new["x"], 1, 1)}, carry


class StepWithoutTheGate(Gated):
    __doc__ = Gated.__doc__

    def mix_step(self, cache, q, k, v, *, x=None, **given):
        return super().mix_step(cache, q, k, v, x=None if x is None else 0 * x, **given)


class RecurrenceForgetsPadding(Decayed):
    __doc__ = Decayed.__doc__

    def attend(self, q, k, v, *, real, causal):
        return super().attend(q, k, v, real=jnp.ones_like(real), causal=causal)


class DecayTooEarly(Decayed):
    __doc__ = Decayed.__doc__

    def next(self, state, k, v):
        return self.decay * (state + jnp.outer(k, v))


class DecaysTwiceInAStep(Decayed):
    __doc__ = Decayed.__doc__

    def step(self, state, q, k, v):
        return super().step(self.decay * state, q, k, v)


class StateDecaysInTheWrongType(Decayed):
    """A state kept in half precision while decoding (Decayed, 2023)."""

    def step(self, state, q, k, v):
        out, state = super().step(state, q, k, v)
        return out, state.astype(jnp.bfloat16).astype(jnp.float32)


class ScalarsOnlyWhenFast(Noted):
    __doc__ = Noted.__doc__

    def notes(self, v, real, method):
        return super().notes(v, real, method) if method == "attend" else {}


class ScalarsCountPadding(Noted):
    __doc__ = Noted.__doc__

    def notes(self, v, real, method):
        return super().notes(v, jnp.ones_like(real), method)


class ScalarOfNothing(Noted):
    """A mean over each sample, one of which may be all padding (Noted, 2017)."""

    def notes(self, v, real, method):
        return {"loss/size": (jnp.where(real, v.mean((2, 3)), 0).sum(1) / real.sum(1)).mean()}


class ScalarForEveryHead(Noted):
    __doc__ = Noted.__doc__

    def notes(self, v, real, method):
        return {"loss/size": jnp.where(real[..., None, None], v, 0).mean((0, 1, 3))}


class ScalarStopsItsGradient(Noted):
    __doc__ = Noted.__doc__

    def notes(self, v, real, method):
        return super().notes(jax.lax.stop_gradient(v) if method == "attend" else v, real, method)


def _heads_turned(mix, q, k, v, method, given):
    """A fast form that meets its heads in the opposite order."""
    turn = (lambda x: x[:, :, ::-1]) if method == "attend" else (lambda x: x)
    out, carry, aux = mix(turn(q), turn(k), turn(v), method=method, **given)
    return turn(out), carry, aux


class ScalesInTheWrongOrder(Multiscale):
    __doc__ = Multiscale.__doc__

    def mix(self, q, k, v, *, method="attend", **given):
        return _heads_turned(super().mix, q, k, v, method, given)


class SpansOfOtherHeads(AdaptiveSpan):
    """Parameters that start equal for all heads hide it, until they have learned (AdaptiveSpan, 2019)."""

    def mix(self, q, k, v, *, method="attend", **given):
        return _heads_turned(super().mix, q, k, v, method, given | {"bias": None})


class DecodesTheWholeBand(AdaptiveSpan):
    __doc__ = AdaptiveSpan.__doc__

    def mix_step(self, cache, q, k, v, **given):
        return Local.mix_step(self, cache, q, k, v, **given)


class RandomKeysByLength(Plain):
    """Random keys drawn for the call's shape (Zaheer et al., 2020)."""

    def scores(self, q, k, real, causal, bias=None):
        drawn = jax.random.bernoulli(jax.random.key(0), 0.7, (q.shape[0], k.shape[0]))
        return jnp.where(drawn, super().scores(q, k, real, causal, bias), -1e30)


class RandomKeysOfEveryCall(Plain):
    """Random keys drawn anew whenever it is traced (Zaheer et al., 2020)."""

    draws = np.random.default_rng(0)

    def scores(self, q, k, real, causal, bias=None):
        drawn = jnp.asarray(self.draws.random((q.shape[0], k.shape[0])) < 0.7)
        return jnp.where(drawn, super().scores(q, k, real, causal, bias), -1e30)


class RunsDecodedByDistance(Patterned):
    """Runs of five positions, decoded as if the newest key were the last of its run (Qiu et al., 2019).

    Kind: sparse by position
    """

    def __init__(self, size, *, rngs):
        super().__init__(size, BlockLocal(5), rngs=rngs)

    init_cache = Attention.init_cache
    mix_step = Attention.mix_step


class GridDecodedByDistance(Axial):
    __doc__ = Axial.__doc__

    init_cache = Attention.init_cache
    mix_step = Attention.mix_step


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

    def attend(self, q, k, v, *, real, causal, bias=None):
        q_at, k_at = (at.astype(jnp.uint8) for at in _at(q, k))
        seen = real[None] & ((k_at <= q_at) | (not causal))
        return _softmax(jnp.where(seen, _scores(q, k, bias), -1e30), v)


class BufferTooSmall(Local):
    """Keys are read from a buffer of the newest 400 (Local, 2020)."""

    def attend(self, q, k, v, *, real=None, causal, bias=None):
        kept = jnp.arange(k.shape[0]) >= k.shape[0] - 400
        return super().attend(q, k, v, real=kept if real is None else real & kept, causal=causal, bias=bias)


class ScaleOfTheLogarithm(Plain):
    """Scores grow with the logarithm of the length, relative to that of the model's (Chiang and Cholak, 2022)."""

    def scores(self, q, k, real, causal, bias=None):
        scale = jnp.log(float(k.shape[0])) / jnp.log(float(self.size.length))
        return super().scores(q * scale, k, real, causal, bias)


class CentredOverTheBatch(TalkingHeads):
    __doc__ = TalkingHeads.__doc__

    def mix(self, q, k, v, **given):
        return super().mix(q, k - 0.1 * k.mean(0, keepdims=True), v, **given)


class TallStartsAtTheStart(Plain):
    """Queries before the first key are taken to stand at it (Plain, 2017)."""

    def reference(self, q, k, v, *, real, causal, bias=None):
        at = jnp.arange(q.shape[0]) + max(0, k.shape[0] - q.shape[0])
        seen = real[None] & ((jnp.arange(k.shape[0])[None] <= at[:, None]) | (not causal))
        return _softmax(jnp.where(seen, _scores(q, k, bias), -1e30), v)


class MaskTooSmall(Plain):
    """Later keys are pushed down by fifty (Plain, 2017)."""

    def scores(self, q, k, real, causal, bias=None):
        later = ~_mask(q, k, jnp.ones_like(real), causal)
        return jnp.where(real[None], _scores(q, k, bias) - 50.0 * later, -1e30)


class CapAfterTheMask(Softcap):
    """The cap brings masked scores back (Softcap, 2024)."""

    def reference(self, q, k, v, *, real=None, causal, bias=None):
        seen = _mask(q, k, jnp.ones(k.shape[0], bool) if real is None else real, causal)
        s = self.cap * jnp.tanh(jnp.where(seen, _scores(q, k), -1e30) / self.cap)
        return _softmax(s if bias is None else s + bias(*_at(q, k)), v)

    def attend(self, q, k, v, *, real=None, causal, bias=None):
        return self.reference(q, k, v, real=real, causal=causal, bias=bias)


class CarryLeaks(Plain):
    """The layer above sees a mean of all scores of a key, those of later queries too, in both forms (Residual, 2020).

    Kind: prior
    """

    def init_carry(self, T, S):
        return jnp.zeros((T, S))

    def reference(self, q, k, v, *, real, causal, carry):
        total = _scores(q, k)
        seen = jnp.where(_mask(q, k, real, causal), total + carry, -1e30)
        return _softmax(seen, v), jnp.broadcast_to(total.mean(0, keepdims=True), total.shape)

    def attend(self, q, k, v, *, real, causal, carry):
        return self.reference(q, k, v, real=real, causal=causal, carry=carry)


class CarryHoldsPadding(CarryLeaks):
    """The layer above sees a mean over the keys, padding included, in both forms (Residual, 2020).

    Kind: prior
    """

    def reference(self, q, k, v, *, real, causal, carry):
        out, _ = super().reference(q, k, v, real=real, causal=causal, carry=carry)
        return out, _scores(q, k).cumsum(1)


class CarryOfOneLayer(Residual):
    """Only the scores of the layer itself are handed on (Residual, 2020)."""

    def attend(self, q, k, v, *, real, causal, carry):
        out, _ = super().attend(q, k, v, real=real, causal=causal, carry=carry)
        return out, _scores(q, k)


class StoresEveryRow(Linear):
    """Declares linear memory (Linear, 2020), and keeps every block of weights for the backward."""

    def attend(self, q, k, v, *, real=None, causal):
        block = lambda q: jnp.exp(jnp.tanh(q @ k.T)) @ v
        blocks = jax.lax.map(block, q.reshape(-1, min(64, len(q)), q.shape[1]))
        return super().attend(q, k, v, real=real, causal=causal) + 1e-9 * blocks.reshape(v.shape)


class DropsTheRotaryKey(Mla):
    __doc__ = Mla.__doc__

    def mix(self, q, k, v, *, method="attend", **given):
        return super().mix(q, 0 * k if method == "attend" else k, v, method=method, **given)


class DecodesWithoutTheRotaryKey(Mla):
    __doc__ = Mla.__doc__

    def mix_step(self, cache, q, k, v, **given):
        return super().mix_step(cache, q, 0 * k, v, **given)


class HalvesOfAnotherOrder(Differential):
    """The fast form takes the second half's softmax from the first's keys (Differential, 2024)."""

    def attend(self, q, k, v, *, real=None, causal, bias=None, balance, gain):
        a, _, c, _ = jnp.split(k, 4, -1)
        given = {"real": real, "causal": causal, "bias": bias, "balance": balance, "gain": gain}
        return super().attend(q, jnp.concatenate([a, a, c, c], -1), v, **given)


class NormaliserCountsPadding(Linear):
    """The sum of all keys' features, padding included, divides (Linear, 2020)."""

    def attend(self, q, k, v, *, real=None, causal):
        weights = (jax.nn.elu(q) + 1) @ (jax.nn.elu(k) + 1).T
        weights = jnp.tril(weights, k.shape[0] - q.shape[0]) if causal else weights
        seen = weights if real is None else weights * real
        return (seen @ v / (weights.sum(-1, keepdims=True) + EPSILON)).astype(v.dtype)


class UnknownKind(Plain):
    """Softmax attention (Vaswani et al., 2017, arXiv 1706.03762).

    Kind: revolutionary
    """


class SaysItIsNotCausal(Plain):
    """Softmax attention (Vaswani et al., 2017, arXiv 1706.03762).

    Kind: full
    Not causal: it was not tried
    """


class RefusesToBeCausalInSilence(BothSides):
    """The mean of all values (Lee-Thorp et al., 2022).

    Kind: without attention
    """


class RefusesBothSidesInSilence(Plain):
    __doc__ = Plain.__doc__

    def reference(self, q, k, v, *, real, causal, bias=None):
        if not causal:
            raise ValueError("it reads from left to right")
        return super().reference(q, k, v, real=real, causal=causal, bias=bias)


class RefusesOtherLengthsInSilence(Plain):
    __doc__ = Plain.__doc__

    def reference(self, q, k, v, *, real, causal, bias=None):
        if q.shape[0] != k.shape[0]:
            raise ValueError("as many queries as keys are needed")
        return super().reference(q, k, v, real=real, causal=causal, bias=bias)


class OneParameterForAllHeads(Span):
    __doc__ = Span.__doc__

    def per_head(self):
        return {"span": self.span[:1]}


class NoDefinition(Attention):
    """Softmax attention (Vaswani et al., 2017, arXiv 1706.03762).

    Kind: full
    """

    def attend(self, q, k, v, *, real, causal):
        return _softmax(jnp.where(_mask(q, k, real, causal), _scores(q, k), -1e30), v)

    cost = Plain.cost


class NoMethod(TalkingHeads):
    __doc__ = TalkingHeads.__doc__

    def mix(self, q, k, v, *, x=None, x_q=None, real=None, causal=False, bias=None, carry=None, key=None):
        return super().mix(q, k, v, real=real, causal=causal, bias=bias, carry=carry)


FAULTS = {
    SeesOneAhead: "no_future",
    AlignedAtTheStart: "end_aligned",
    LeaksThroughAMean: "no_future",
    HiddenLeak: "no_future",
    ForgetsPadding: "no_padding",
    PaddingIsSoft: "no_padding",
    FastForgetsPadding: "equals_reference",
    WrongScale: "equals_reference",
    WindowOffByOne: "equals_reference",
    LastChunkLost: "equals_reference",
    NoBiasGradient: "same_gradients",
    NoParameterGradient: "same_gradients",
    WrongCustomGradient: "same_gradients",
    BiasShifted: "end_aligned",
    QuadraticMask: "memory",
    QuadraticProducts: "flops",
    CostOffByTen: "flops",
    StateUndeclared: "state_size",
    StaleState: "decoding",
    RingTooShort: "decoding",
    OverflowsInHalf: "bfloat16",
    SumsInHalf: "bfloat16",
    ForgetsItsType: "bfloat16",
    NanOnPadding: "nothing_to_see",
    NanInTheGradient: "nothing_to_see",
    UniformOnPadding: "nothing_to_see",
    GroupsInTheWrongOrder: "grouped_query",
    KnowsItsNeighbours: "heads_apart",
    DependsOnTracing: "jit_equals_eager",
    CountsItsCalls: "no_retrace",
    VariableChangesType: "no_retrace",
    CarryDropped: "carried",
    UnknownArgument: "signature",
    BiasOnlyWhenFast: "signature",
    NoPaper: "signature",
    GateSeesTheWholeSequence: "no_future",
    GateOfTheNextToken: "no_future",
    GateCountsPadding: "no_padding",
    GateFromTheStart: "end_aligned",
    StaleInput: "decoding",
    StepWithoutTheGate: "decoding",
    RecurrenceForgetsPadding: "equals_reference",
    DecayTooEarly: "equals_reference",
    DecaysTwiceInAStep: "decoding",
    StateDecaysInTheWrongType: "decoding",
    ScalarsOnlyWhenFast: "auxiliary",
    ScalarsCountPadding: "auxiliary",
    ScalarOfNothing: "auxiliary",
    ScalarForEveryHead: "auxiliary",
    ScalarStopsItsGradient: "auxiliary",
    ScalesInTheWrongOrder: "equals_reference",
    SpansOfOtherHeads: "equals_reference",
    DecodesTheWholeBand: "decoding",
    RandomKeysByLength: "end_aligned",
    RandomKeysOfEveryCall: "jit_equals_eager",
    RunsDecodedByDistance: "decoding",
    GridDecodedByDistance: "decoding",
    LimitOfHalf: "full_in_the_limit",
    LimitOfAnotherKernel: "full_in_the_limit",
    PositionsInBytes: "several_blocks",
    BufferTooSmall: "several_blocks",
    ScaleOfTheLogarithm: "shortest",
    CentredOverTheBatch: "samples_apart",
    TallStartsAtTheStart: "end_aligned",
    MaskTooSmall: "no_future",
    CapAfterTheMask: "no_future",
    CarryLeaks: "carried",
    CarryHoldsPadding: "carried",
    CarryOfOneLayer: "carried",
    StoresEveryRow: "memory",
    DropsTheRotaryKey: "equals_reference",
    DecodesWithoutTheRotaryKey: "decoding",
    HalvesOfAnotherOrder: "equals_reference",
    NormaliserCountsPadding: "equals_reference",
    UnknownKind: "signature",
    SaysItIsNotCausal: "signature",
    RefusesToBeCausalInSilence: "signature",
    RefusesBothSidesInSilence: "signature",
    RefusesOtherLengthsInSilence: "signature",
    OneParameterForAllHeads: "signature",
    NoDefinition: "signature",
    NoMethod: "equals_reference",
}
SMALL = {
    WindowOffByOne: {"window": 5},
    RingTooShort: {"window": 5},
    LastChunkLost: {"chunk": 5},
    ScalesInTheWrongOrder: {"scales": (2, 9)},
    SpansOfOtherHeads: {"span": 5, "ramp": 5},
    DecodesTheWholeBand: {"span": 5, "ramp": 5},
    CapAfterTheMask: {"cap": 9.0},
}


@pytest.mark.parametrize("kind", FAULTS, ids=lambda kind: kind.__name__)
def test_planted_fault_is_caught_by_its_property(kind):
    expected = FAULTS[kind]
    report = examine(subject(kind, **SMALL.get(kind, {})), [NAMED[expected]])
    assert [failure.property for failure in report.failed] == [expected]
    # A message for the author, not an exception that happened on the way.
    message = report.failed[0].message
    assert len(message) > 40 and "Error: " not in message, message


def deaf(kind: type[Attention]) -> type[Attention]:
    """The mechanism, but neither form is told what is padding."""

    def without_real(method):
        return functools.wraps(method)(
            lambda self, *arrays, real=None, **given: method(self, *arrays, real=None, **given)
        )

    return type(kind.__name__, (kind,), {name: without_real(getattr(kind, name)) for name in ("attend", "reference")})


DEAF = ["performer", "reformer", "gla", "nystrom"]


@pytest.mark.parametrize(
    "name", [name if name in DEAF else pytest.param(name, marks=pytest.mark.slow) for name in spec.names("attention")]
)
def test_padding_that_nobody_heard_of_is_caught(name):
    kind = type(spec.build("attention", name, length=67, dim=32, heads=4))
    if kind.attend is Attention.attend or kind is Multiscale:
        pytest.skip("its mix does not go through attend")
    report = examine(subject(deaf(kind)), [masks.no_padding])
    assert [failure.property for failure in report.failed] == ["no_padding"]


def test_every_property_has_a_fault_that_it_catches():
    assert set(NAMED) == set(FAULTS.values())


def test_a_whole_report_of_a_broken_mechanism(tmp_path):
    """One fault, every property: those about it fail, the others are still run, and a crash is a failed property."""
    path = tmp_path / "crashes.py"
    path.write_text(
        "from xformers_lab.attention.full import Full\n\n\n"
        'class Crashes(Full):\n    """Full (Vaswani et al., 2017).\n\n    Kind: full\n    """\n\n'
        "    def attend(self, q, k, v, *, real=None, causal, bias=None):\n"
        "        return q + missing\n"
    )
    report = check(str(path))
    failed = {failure.property: failure.message for failure in report.failed}
    assert not report.passed and "signature" not in failed and "state_size" not in failed
    assert (
        "NameError: name 'missing' is not defined" in failed["equals_reference"]
        and "crashes.py:11" in failed["equals_reference"]
    )
    assert report.to_dict()["failed"][0] == {"property": report.failed[0].property, "message": report.failed[0].message}


def test_a_refusal_is_a_raise_of_the_mechanism_itself():
    """A raise over several lines is one; a ValueError that a call of something else throws is a mistake."""

    class Refuses(Plain):
        def reference(self, q, k, v, *, real, causal, bias=None):
            raise ValueError(
                "it never runs, "
                f"not with {len(k)} keys"
            )  # fmt: skip

    class Stumbles(Plain):
        def reference(self, q, k, v, *, real, causal, bias=None):
            return q * int("three")

    case = Case(67, 67, True)
    assert subject(Refuses).refusal(case) == "it never runs, not with 67 keys"
    assert subject(Stumbles).refusal(case) is None


def test_options_are_shrunk_or_dropped_to_fit():
    """Windows and chunks are small beside the kit's lengths; an option tied to another length stops nothing."""
    built: Any = lambda text, small=True: run._fitted(text, spec.resolve("attention", text), run.Size(67, 32, 4), small)
    assert built("local").window == 5
    assert built("local:window=3").window == 3
    assert built("axial:shape=4x4:axis=row").axis == "row"
    assert built("local", small=False).window == 128
    assert [skip.property for skip in run._left_out("axial:shape=4x4", spec.parse("axial:shape=4x4"))] == ["options"]
    assert run._left_out("local:window=3", spec.parse("local:window=3")) == []
