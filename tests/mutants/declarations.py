"""Faults of what a mechanism says of itself: its docstring, its class attributes, its signature."""

from typing import ClassVar

import jax.numpy as jnp

from xformers_lab.attention import OneHead
from xformers_lab.errors import Refused

from .right import BothSides, Plain, Span, mask, scaled_scores, softmax


class UnknownArgument(Plain):
    __doc__ = Plain.__doc__

    def attend(self, q, k, v, *, valid, causal, bias=None, mask=None):
        return super().attend(q, k, v, valid=valid, causal=causal, bias=bias)


class BiasOnlyWhenFast(Plain):
    __doc__ = Plain.__doc__

    def reference(self, q, k, v, *, valid, causal):
        return super().reference(q, k, v, valid=valid, causal=causal)


class NoPaper(Plain):
    """An idea."""


class UnknownKind(Plain):
    """Softmax attention (Vaswani et al., 2017, arXiv 1706.03762)."""

    kind = "revolutionary"  # pyright: ignore[reportAssignmentType]


class NoKind(Plain):
    __doc__ = Plain.__doc__

    kind = None


class SaysItIsNotCausal(Plain):
    __doc__ = Plain.__doc__

    refuses: ClassVar = {"causal": "it was not tried"}


class SaysItReadsOneWay(Plain):
    __doc__ = Plain.__doc__

    refuses: ClassVar = {"bidirectional": "it was not tried"}


class SaysItIsNotCross(Plain):
    __doc__ = Plain.__doc__

    refuses: ClassVar = {"cross": "it was not tried"}


class SaysItTakesNoBias(Plain):
    __doc__ = Plain.__doc__

    refuses: ClassVar = {"bias": "it was not tried"}


class RefusesWhatThereIsNot(Plain):
    __doc__ = Plain.__doc__

    refuses: ClassVar = {"backwards": "it was not tried"}


class RefusesWithoutAReason(BothSides):
    __doc__ = BothSides.__doc__

    refuses: ClassVar = {"causal": ""}


class RefusesToBeCausalInSilence(BothSides):
    __doc__ = BothSides.__doc__

    refuses: ClassVar = {}


class RefusesBothSidesInSilence(Plain):
    __doc__ = Plain.__doc__

    def reference(self, q, k, v, *, valid, causal, bias=None):
        if not causal:
            raise Refused("it reads from left to right")
        return super().reference(q, k, v, valid=valid, causal=causal, bias=bias)


class RefusesOtherLengthsInSilence(Plain):
    __doc__ = Plain.__doc__

    def reference(self, q, k, v, *, valid, causal, bias=None):
        if q.shape[0] != k.shape[0]:
            raise Refused("as many queries as keys are needed")
        return super().reference(q, k, v, valid=valid, causal=causal, bias=bias)


class OneParameterForAllHeads(Span):
    __doc__ = Span.__doc__

    def per_head(self):
        return {"span": self.span[:1]}


class NoDefinition(OneHead):
    """Softmax attention (Vaswani et al., 2017, arXiv 1706.03762)."""

    kind = "full"

    def attend(self, q, k, v, *, valid, causal):
        return softmax(jnp.where(mask(q, k, valid, causal), scaled_scores(q, k), -1e30), v)

    cost = Plain.cost


FAULTS = {
    UnknownArgument: "signature",
    BiasOnlyWhenFast: "signature",
    NoPaper: "signature",
    UnknownKind: "signature",
    NoKind: "signature",
    SaysItIsNotCausal: "signature",
    SaysItReadsOneWay: "signature",
    SaysItIsNotCross: "signature",
    SaysItTakesNoBias: "signature",
    RefusesWhatThereIsNot: "signature",
    RefusesWithoutAReason: "signature",
    RefusesToBeCausalInSilence: "signature",
    RefusesBothSidesInSilence: "signature",
    RefusesOtherLengthsInSilence: "signature",
    OneParameterForAllHeads: "signature",
    NoDefinition: "signature",
}
