"""What a pattern of attention is, and how patterns combine."""

import dataclasses

import numpy as np

from xformers_lab.attention._engine.order import NATURAL, Order, Runs

DEAD, MIXED, WHOLE = 0, 1, 2
# Beyond every position, and far enough from the ends of int64 to be added to.
FAR = 1 << 40
Spans = list[tuple[np.ndarray, np.ndarray]]


class Pattern:
    """`a | b`, `a & b`, `~a` combine; subclasses are frozen dataclasses, hashable, so a layout is computed once.

    A subclass says which pairs are live (a call). What it says beyond that makes layouts cheap: `state` settles whole
    rectangles of pairs, `spans` bounds the keys that a run of queries may see, and `order` is the order of positions in
    which it is block-local.
    """

    @property
    def order(self) -> Order:
        return NATURAL

    @property
    def drawn_among(self) -> int:
        """How many runs of positions random ones are drawn among; 0 where nothing is drawn."""
        return 0

    def __call__(self, q, k):
        """Booleans for integer arrays of query and key positions that broadcast, numpy or jax."""
        raise NotImplementedError

    def state(self, q: Runs, k: Runs) -> np.ndarray:
        """DEAD, MIXED or WHOLE for blocks of queries and blocks of keys, pair by pair. MIXED is always a right answer.

        Blocks lie between bounds; in the order of a pattern it knows more of what they hold.
        """
        return np.full(np.broadcast_shapes(np.shape(q.low), np.shape(k.low)), MIXED, np.int8)

    def spans(self, low, high) -> Spans:
        """(first, last) keys, arrays like low and high, of spans that hold every key that a query of low..high sees.

        A superset is always a right answer; a span whose first is beyond its last is empty.
        """
        return [everything(low)]

    def parts(self) -> list["Pattern"]:
        """Disjoint patterns, one per order of positions, whose union is this one."""
        return [self]

    def __or__(self, other: "Pattern") -> "Pattern":
        return Either(self, other)

    def __and__(self, other: "Pattern") -> "Pattern":
        return Both(self, other)

    def __invert__(self) -> "Pattern":
        return Not(self)


@dataclasses.dataclass(frozen=True)
class Either(Pattern):
    a: Pattern
    b: Pattern

    @property
    def order(self):
        return self.a.order if self.a.order == self.b.order else NATURAL

    @property
    def drawn_among(self):
        return max(self.a.drawn_among, self.b.drawn_among)

    def __call__(self, q, k):
        return self.a(q, k) | self.b(q, k)

    def state(self, q, k):
        return np.maximum(self.a.state(q, k), self.b.state(q, k))

    def spans(self, low, high):
        return [*self.a.spans(low, high), *self.b.spans(low, high)]

    def parts(self):
        of_order: dict[Order, Pattern] = {}
        for part in [*self.a.parts(), *self.b.parts()]:
            of_order[part.order] = of_order[part.order] | part if part.order in of_order else part
        first, *others = of_order.values()
        disjoint, before = [first], first
        for part in others:
            disjoint.append(part & ~before)
            before = before | part
        return disjoint


@dataclasses.dataclass(frozen=True)
class Both(Pattern):
    a: Pattern
    b: Pattern

    @property
    def order(self):
        return self.b.order if self.a.order == NATURAL else self.a.order

    @property
    def drawn_among(self):
        return max(self.a.drawn_among, self.b.drawn_among)

    def __call__(self, q, k):
        return self.a(q, k) & self.b(q, k)

    def state(self, q, k):
        return np.minimum(self.a.state(q, k), self.b.state(q, k))

    def spans(self, low, high):
        """Each span of the one with more of them, cut to the bounds of the other's."""
        many, few = sorted((self.a.spans(low, high), self.b.spans(low, high)), key=len, reverse=True)
        least, most = _hull(few)
        return [(np.maximum(first, least), np.minimum(last, most)) for first, last in many]

    def parts(self):
        return [left & right for left in self.a.parts() for right in self.b.parts()]


@dataclasses.dataclass(frozen=True)
class Not(Pattern):
    a: Pattern

    @property
    def drawn_among(self):
        return self.a.drawn_among

    def __call__(self, q, k):
        return ~self.a(q, k)

    def state(self, q, k):
        return WHOLE - self.a.state(q, k)


def settled(possible, certain):
    """DEAD, MIXED or WHOLE from what may and what must be live."""
    return np.where(certain, WHOLE, np.where(possible, MIXED, DEAD)).astype(np.int8)


def everything(low):
    return np.full(np.shape(low), -FAR), np.full(np.shape(low), FAR)


def _hull(spans: Spans):
    """One span around them all; empty ones count for nothing."""
    first = [np.where(first <= last, first, FAR) for first, last in spans]
    last = [np.where(first <= last, last, -FAR) for first, last in spans]
    return np.min(first, 0), np.max(last, 0)
