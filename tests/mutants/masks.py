"""Faults of what a mechanism may not see: the future, padding, nothing at all."""

from typing import Any

import jax
import jax.numpy as jnp

from xformers_lab.attention._engine.softmax import same_document
from xformers_lab.attention.softcap import Softcap

from .right import Gated, Plain, mask, positions, scaled_scores, softmax


class SeesOneAhead(Plain):
    __doc__ = Plain.__doc__

    def reference(self, q, k, v, *, valid, causal, bias=None):
        q_at, k_at = positions(q, k)
        seen = valid[None] & ((k_at <= q_at + 1) | (not causal))
        return softmax(jnp.where(seen, scaled_scores(q, k, bias), -1e30), v)


class LeaksThroughAMean(Plain):
    """Keys are centred over the whole sequence (2026)."""

    def reference(self, q, k, v, *, valid, causal, bias=None):
        mean = jnp.where(valid[:, None], k, 0).sum(0) / jnp.maximum(valid.sum(), 1)
        return super().reference(
            q, k - 0.1 * jax.lax.stop_gradient(mean), v * (1 + mean), valid=valid, causal=causal, bias=bias
        )


class HiddenLeak(Plain):
    """Its gradient to the future is zero, its values change all the same (2026)."""

    def reference(self, q, k, v, *, valid, causal, bias=None):
        top = jax.lax.stop_gradient(jnp.where(valid, jnp.abs(v).max(-1), 0).max())
        return super().reference(q, k, v, valid=valid, causal=causal, bias=bias) * (1 + 0.1 * top)


class ForgetsPadding(Plain):
    __doc__ = Plain.__doc__

    def reference(self, q, k, v, *, valid, causal, bias=None):
        return super().reference(q, k, v, valid=jnp.ones_like(valid), causal=causal, bias=bias)


class PaddingIsSoft(Plain):
    """Padding is pushed down by ten instead of masked (2026)."""

    def reference(self, q, k, v, *, valid, causal, bias=None):
        s = self.scores(q, k, jnp.ones_like(valid), causal, bias)
        return softmax(s - 10.0 * ~valid[None], v)


class DocumentsAreSoft(Plain):
    """Other documents are pushed down by ten instead of masked (2026)."""

    def reference(self, q, k, v, *, valid, documents=None, causal, bias=None):
        s = self.scores(q, k, valid, causal, bias)
        q_at, k_at = positions(q, k)
        return softmax(s if documents is None else s - 10.0 * ~same_document(documents, q_at, k_at), v)

    def attend(self, q, k, v, *, valid, documents=None, causal, bias=None):
        return self.reference(q, k, v, valid=valid, documents=documents, causal=causal, bias=bias)


class TellsDocumentsOfOneAnother(Plain):
    """Values grow with the largest of the whole row, without a gradient (2026)."""

    def reference(self, q, k, v, *, valid, documents=None, causal, bias=None):
        if documents is None:
            return softmax(self.scores(q, k, valid, causal, bias), v)
        top = jax.lax.stop_gradient(jnp.where(valid[:, None], v, 0).max())
        seen = mask(q, k, valid, causal) & same_document(documents, *positions(q, k))
        return softmax(jnp.where(seen, scaled_scores(q, k, bias), -1e30), v) * (1 + 0.1 * top)

    def attend(self, q, k, v, *, valid, documents=None, causal, bias=None):
        return self.reference(q, k, v, valid=valid, documents=documents, causal=causal, bias=bias)


class NanOnPadding(Plain):
    __doc__ = Plain.__doc__

    def reference(self, q, k, v, *, valid, causal, bias=None):
        s = jnp.where(mask(q, k, valid, causal), scaled_scores(q, k, bias), -jnp.inf)
        return (jax.nn.softmax(s, -1) @ v).astype(v.dtype)


class NanInTheGradient(Plain):
    __doc__ = Plain.__doc__

    def reference(self, q, k, v, *, valid, causal, bias=None):
        s = jnp.where(mask(q, k, valid, causal), scaled_scores(q, k, bias), -jnp.inf)
        out = (jax.nn.softmax(s, -1) @ v).astype(v.dtype)
        return jnp.where(mask(q, k, valid, causal).any(1)[:, None], out, 0)


class UniformOnPadding(Plain):
    __doc__ = Plain.__doc__

    def reference(self, q, k, v, *, valid, causal, bias=None):
        s = jnp.where(mask(q, k, valid, causal), scaled_scores(q, k, bias), -1e30)
        return jax.nn.softmax(s, -1).astype(v.dtype) @ v


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


class MaskTooSmall(Plain):
    """Later keys are pushed down by fifty (Plain, 2017)."""

    def scores(self, q, k, valid, causal, bias=None):
        later = ~mask(q, k, jnp.ones_like(valid), causal)
        return jnp.where(valid[None], scaled_scores(q, k, bias) - 50.0 * later, -1e30)


class CapAfterTheMask(Softcap):
    """The cap brings masked scores back (Softcap, 2024)."""

    def reference(self, q, k, v, *, valid=None, causal, bias=None):
        seen = mask(q, k, jnp.ones(k.shape[0], bool) if valid is None else valid, causal)
        s = self.cap * jnp.tanh(jnp.where(seen, scaled_scores(q, k), -1e30) / self.cap)
        return softmax(s if bias is None else s + bias(*positions(q, k)), v)

    def attend(self, q, k, v, *, valid=None, causal, bias=None):
        return self.reference(q, k, v, valid=valid, causal=causal, bias=bias)


class TellsOfLaterMarks(Plain):
    """Marked positions count more, and the first query knows how many there are (2026)."""

    marks = 3

    def reference(self, q, k, v, *, valid, marked: Any = None, causal, bias=None):
        s = self.scores(q, k, valid, causal, bias) + 0.5 * marked
        q_at, _ = positions(q, k)
        last = jnp.where(marked, jnp.arange(len(marked)), -1).max()
        return softmax(s, v) * jnp.where(q_at == 0, 1 + last / len(marked), 1)

    def attend(self, q, k, v, *, valid, marked=None, causal, bias=None):
        return self.reference(q, k, v, valid=valid, marked=marked, causal=causal, bias=bias)


class LooksAtNoMarks(Plain):
    """It says that it looks at marks (2026)."""

    marks = 3

    def reference(self, q, k, v, *, valid, marked=None, causal, bias=None):
        return super().reference(q, k, v, valid=valid, causal=causal, bias=bias)

    def attend(self, q, k, v, *, valid, marked=None, causal, bias=None):
        return super().reference(q, k, v, valid=valid, causal=causal, bias=bias)


FAULTS = {
    SeesOneAhead: "no_future",
    LeaksThroughAMean: "no_future",
    HiddenLeak: "no_future",
    ForgetsPadding: "no_padding",
    PaddingIsSoft: "no_padding",
    NanOnPadding: "nothing_to_see",
    NanInTheGradient: "nothing_to_see",
    UniformOnPadding: "nothing_to_see",
    GateSeesTheWholeSequence: "no_future",
    GateOfTheNextToken: "no_future",
    GateCountsPadding: "no_padding",
    MaskTooSmall: "no_future",
    DocumentsAreSoft: "documents_apart",
    TellsDocumentsOfOneAnother: "documents_apart",
    CapAfterTheMask: "no_future",
    TellsOfLaterMarks: "marks_in_time",
    LooksAtNoMarks: "marks_in_time",
}
OPTIONS = {CapAfterTheMask: {"cap": 9.0}}
