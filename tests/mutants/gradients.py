"""Faults of what training sees: gradients, auxiliary scalars, what layers carry."""

import jax
import jax.numpy as jnp

from xformers_lab.nn.aux_results import Aux

from .right import Noted, Plain, Residual, Span, mask, positions, scaled_scores, softmax


class NoBiasGradient(Plain):
    __doc__ = Plain.__doc__

    def attend(self, q, k, v, *, valid, causal, bias=None):
        return super().attend(q, k, v, valid=valid, causal=causal, bias=jax.lax.stop_gradient(bias))


class NoParameterGradient(Span):
    __doc__ = Span.__doc__

    def attend(self, q, k, v, *, valid, causal, bias=None, span):
        return super().attend(q, k, v, valid=valid, causal=causal, bias=bias, span=jax.lax.stop_gradient(span))


@jax.custom_vjp
def _wrong_backward(q, k):
    return q @ k.T


_wrong_backward.defvjp(lambda q, k: (q @ k.T, (q, k)), lambda saved, g: (g @ saved[1], g.T @ saved[0] * 1.01))


class WrongCustomGradient(Plain):
    __doc__ = Plain.__doc__

    def attend(self, q, k, v, *, valid, causal, bias=None):
        s = _wrong_backward(q, k) * q.shape[-1] ** -0.5
        s = s if bias is None else s + bias(*positions(q, k))
        return softmax(jnp.where(mask(q, k, valid, causal), s, -1e30), v)


class CarryDropped(Residual):
    __doc__ = Residual.__doc__

    def attend(self, q, k, v, *, valid, causal, carry):
        return super().attend(q, k, v, valid=valid, causal=causal, carry=carry)[0], carry


class ScalarsOnlyWhenFast(Noted):
    __doc__ = Noted.__doc__

    def notes(self, v, valid, method):
        return super().notes(v, valid, method) if method == "attend" else {}


class ScalarsCountPadding(Noted):
    __doc__ = Noted.__doc__

    def notes(self, v, valid, method):
        return super().notes(v, jnp.ones_like(valid), method)


class ScalarOfNothing(Noted):
    """A mean over each sample, one of which may be all padding (Noted, 2017)."""

    def notes(self, v, valid, method):
        means = jnp.where(valid, v.mean((2, 3)), 0).sum(1) / valid.sum(1)
        return Aux(losses={"size": means.mean()})


class ScalarForEveryHead(Noted):
    __doc__ = Noted.__doc__

    def notes(self, v, valid, method):
        return Aux(losses={"size": jnp.where(valid[..., None, None], v, 0).mean((0, 1, 3))})


class ScalarStopsItsGradient(Noted):
    __doc__ = Noted.__doc__

    def notes(self, v, valid, method):
        return super().notes(jax.lax.stop_gradient(v) if method == "attend" else v, valid, method)


class CarryLeaks(Plain):
    """The layer above sees a mean of all scores of a key, of later queries too, in both forms (Residual, 2020)."""

    kind = "prior"

    def init_carry(self, T, S):
        return jnp.zeros((T, S))

    def reference(self, q, k, v, *, valid, causal, carry):
        total = scaled_scores(q, k)
        seen = jnp.where(mask(q, k, valid, causal), total + carry, -1e30)
        return softmax(seen, v), jnp.broadcast_to(total.mean(0, keepdims=True), total.shape)

    def attend(self, q, k, v, *, valid, causal, carry):
        return self.reference(q, k, v, valid=valid, causal=causal, carry=carry)


class CarryHoldsPadding(CarryLeaks):
    """The layer above sees a mean over the keys, padding included, in both forms (Residual, 2020)."""

    kind = "prior"

    def reference(self, q, k, v, *, valid, causal, carry):
        out, _ = super().reference(q, k, v, valid=valid, causal=causal, carry=carry)
        return out, scaled_scores(q, k).cumsum(1)


class CarryOfOneLayer(Residual):
    """Only the scores of the layer itself are handed on (Residual, 2020)."""

    def attend(self, q, k, v, *, valid, causal, carry):
        out, _ = super().attend(q, k, v, valid=valid, causal=causal, carry=carry)
        return out, scaled_scores(q, k)


FAULTS = {
    NoBiasGradient: "same_gradients",
    NoParameterGradient: "same_gradients",
    WrongCustomGradient: "same_gradients",
    CarryDropped: "carried",
    ScalarsOnlyWhenFast: "auxiliary",
    ScalarsCountPadding: "auxiliary",
    ScalarOfNothing: "auxiliary",
    ScalarForEveryHead: "auxiliary",
    ScalarStopsItsGradient: "auxiliary",
    CarryLeaks: "carried",
    CarryHoldsPadding: "carried",
    CarryOfOneLayer: "carried",
}
