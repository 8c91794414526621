"""Which key a query may see: predicates on (query index, key index), and an algebra over them.

A pattern is called with integer arrays that broadcast (numpy or jax) and gives booleans: the dense mask of `reference`,
the drawing of `xlab show`, and the mask inside a partly live block all come from this one call. `extent` answers for
whole rectangles of indices at once, so that a layout never evaluates what is wholly live or wholly dead.
"""

import dataclasses

import numpy as np

DEAD, MIXED, WHOLE = 0, 1, 2


class Pattern:
    """`a | b`, `a & b`, `~a` combine; subclasses are frozen dataclasses, hashable, so a layout is computed once."""

    # Positions are laid out by index modulo `stride`; 1 is the natural order. A pattern that couples positions of equal
    # residue (strided, the columns of a grid) is block-local in that order.
    stride = 1

    def __call__(self, q, k):
        raise NotImplementedError

    def extent(self, q_low, q_high, k_low, k_high):
        """DEAD, MIXED or WHOLE for the rectangles of queries q_low..q_high and keys k_low..k_high (inclusive).

        Bounds are broadcasting integer arrays in natural order. MIXED is always a right answer.
        """
        return np.full(np.broadcast_shapes(*map(np.shape, (q_low, q_high, k_low, k_high))), MIXED, np.int8)

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

    def __call__(self, q, k):
        return self.a(q, k) | self.b(q, k)

    def extent(self, *bounds):
        return np.maximum(self.a.extent(*bounds), self.b.extent(*bounds))

    def parts(self):
        found: list[Pattern] = []
        for part in [*self.a.parts(), *self.b.parts()]:
            same = next((i for i, other in enumerate(found) if other.stride == part.stride), None)
            if same is None:
                found.append(part)
            else:
                found[same] = found[same] | part
        disjoint, before = [found[0]], found[0]
        for part in found[1:]:
            disjoint.append(part & ~before)
            before = before | part
        return disjoint


@dataclasses.dataclass(frozen=True)
class Both(Pattern):
    a: Pattern
    b: Pattern

    @property
    def stride(self):
        return max(self.a.stride, self.b.stride)

    def __call__(self, q, k):
        return self.a(q, k) & self.b(q, k)

    def extent(self, *bounds):
        return np.minimum(self.a.extent(*bounds), self.b.extent(*bounds))

    def parts(self):
        return [left & right for left in self.a.parts() for right in self.b.parts()]


@dataclasses.dataclass(frozen=True)
class Not(Pattern):
    a: Pattern

    def __call__(self, q, k):
        return ~self.a(q, k)

    def extent(self, *bounds):
        return WHOLE - self.a.extent(*bounds)


@dataclasses.dataclass(frozen=True)
class All(Pattern):
    """Every query sees every key."""

    def __call__(self, q, k):
        return (q == q) & (k == k)

    def extent(self, q_low, q_high, k_low, k_high):
        return super().extent(q_low, q_high, k_low, k_high) * 0 + WHOLE


@dataclasses.dataclass(frozen=True)
class Causal(Pattern):
    """No query sees a later key."""

    def __call__(self, q, k):
        return k <= q

    def extent(self, q_low, q_high, k_low, k_high):
        return _extent(k_low <= q_high, k_high <= q_low)


@dataclasses.dataclass(frozen=True)
class Band(Pattern):
    """Keys at most `width` positions away, on both sides."""

    width: int

    def __call__(self, q, k):
        return abs(q - k) <= self.width

    def extent(self, q_low, q_high, k_low, k_high):
        possible = (k_low - q_high <= self.width) & (q_low - k_high <= self.width)
        certain = (k_high - q_low <= self.width) & (q_high - k_low <= self.width)
        return _extent(possible, certain)


@dataclasses.dataclass(frozen=True)
class BlockLocal(Pattern):
    """Keys in the same run of `size` consecutive positions."""

    size: int

    def __call__(self, q, k):
        return q // self.size == k // self.size

    def extent(self, q_low, q_high, k_low, k_high):
        first, last = (
            np.maximum(q_low // self.size, k_low // self.size),
            np.minimum(q_high // self.size, k_high // self.size),
        )
        one_run = (q_low // self.size == k_high // self.size) & (k_low // self.size == q_high // self.size)
        return _extent(first <= last, one_run)


@dataclasses.dataclass(frozen=True)
class Residue(Pattern):
    """Keys a whole multiple of `stride` away."""

    stride: int

    def __call__(self, q, k):
        return (q - k) % self.stride == 0


def _extent(possible, certain):
    return np.where(certain, WHOLE, np.where(possible, MIXED, DEAD)).astype(np.int8)
