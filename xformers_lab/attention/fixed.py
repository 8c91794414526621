import dataclasses
import math
from typing import Literal

import numpy as np
from flax import nnx

from xformers_lab.attention import Complexity
from xformers_lab.attention._base.patterned import Patterned, run_block
from xformers_lab.attention._engine.algebra import WHOLE, Pattern, settled
from xformers_lab.attention._engine.order import PAD, Order
from xformers_lab.attention._engine.pattern import block_local
from xformers_lab.errors import Refused
from xformers_lab.nn.size import Size


@dataclasses.dataclass(frozen=True)
class Places(Order):
    """Queries in the natural order; of the keys only those at places low..high-1 of their run of `run` positions, which
    so become neighbours."""

    run: int
    low: int
    high: int

    def keys(self, stop, block):
        positions = np.arange(stop, dtype=np.int32)
        positions = positions[(positions % self.run >= self.low) & (positions % self.run < self.high)]
        return np.pad(
            positions, (0, max(block, -(-len(positions) // block) * block) - len(positions)), constant_values=PAD
        )

    def find(self, q, first, last, stop, block):
        return self._before(first) // block, (self._before(last + 1) - 1) // block

    def _before(self, at):
        """How many of these keys come before a position."""
        place = np.clip(at % self.run, self.low, self.high)
        return at // self.run * (self.high - self.low) + place - self.low


@dataclasses.dataclass(frozen=True)
class Summary(Pattern):
    """Keys at places low..high-1 of any run of `run` positions."""

    run: int
    low: int
    high: int

    @property
    def order(self):
        return Places(self.run, self.low, self.high)

    def __call__(self, q, k):
        place = k % self.run
        return (place >= self.low) & (place < self.high) & (q == q)

    def state(self, q, k):
        if k.order == self.order:
            return super().state(q, k) * 0 + WHOLE
        run, place = k.high // self.run, k.high % self.run
        possible = (place >= self.low) & (k.low < run * self.run + self.high) | (k.low // self.run < run)
        certain = (k.low // self.run == run) & (k.low % self.run >= self.low) & (place < self.high)
        return settled(possible & (q.low == q.low), certain & (q.low == q.low))


class Fixed(Patterned):
    """Fixed sparse attention of the Sparse Transformer (Child et al., 2019, arXiv 1904.10509, section 4.3).

    out_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s over the keys of t's own run of `stride` positions, and over the
    last `summary` positions of every run, which gather what their run holds for all others.

    One softmax runs over the union of the paper's two patterns (its "merged" form).
    Deviations from the paper: not causal, a query sees the summaries of later runs too.

    Options:
        stride: positions of one run; none: the square root of the length
        summary: positions at the end of a run that all queries see; none: a sixteenth of the stride
        heads: shared: one summary for all heads; own: each head the next `summary` positions from the end of a run
    """

    kind = "sparse by position"
    exact = True
    accuracy = "on its pattern"
    complexity = Complexity(
        time="O(T (stride + S summary / stride) H)",
        memory="O(S H)",
        decoding="every key and value",
        time_note=", at the default stride sqrt(length) O(T^1.5 H) and more, with the summary growing",
    )

    def __init__(
        self,
        size: Size,
        *,
        stride: int | None = None,
        summary: int | None = None,
        heads: Literal["shared", "own"] = "shared",
        rngs: nnx.Rngs,
    ):
        stride = max(1, round(math.sqrt(size.length))) if stride is None else stride
        if stride < 1:
            raise Refused(f"stride must be at least 1, got {stride}")
        summary = max(1, stride // 16) if summary is None else summary
        if not 1 <= summary <= stride:
            raise Refused(f"summary must be from 1 to stride={stride}, got {summary}")
        shifts = [head % (stride // summary) * summary if heads == "own" else 0 for head in range(size.heads)]
        each = [block_local(stride) | Summary(stride, stride - shift - summary, stride - shift) for shift in shifts]
        super().__init__(size, tuple(each) if heads == "own" else each[0], rngs=rngs)
        self.stride, self.summary = stride, summary

    def blocks(self, T: int, S: int, causal: bool) -> tuple[int, int]:
        return (block := run_block(self.stride)), block

    @staticmethod
    def limit(length: int):
        return {"stride": length}
