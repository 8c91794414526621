import functools

from flax import nnx

from xformers_lab.attention import Cost
from xformers_lab.attention._engine import fused
from xformers_lab.attention._engine.pattern import Band
from xformers_lab.attention._patterned import Patterned
from xformers_lab.size import Size


class Local(Patterned):
    """Sliding-window attention, the band of the survey (Beltagy et al., 2020, arXiv 2004.05150).

    out_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s over |t - s| <= window (causal: t - window <= s <= t).
    Kind: sparse by position
    Time O(T window H); memory O(S H); decoding keeps a ring of window + 1 keys and values.
    Exact within the window. Longformer counts the window on both sides together; here it is one side.

    Options:
        window: keys seen on each side of a query, besides itself
    """

    def __init__(self, size: Size, *, window: int = 128, rngs: nnx.Rngs):
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        super().__init__(size, Band(window), rngs=rngs)
        self.window = window

    def blocks(self, T: int, S: int, causal: bool) -> tuple[int, int]:
        """Blocks of half a window, between 16 and 128: finer ones waste less of the band, coarser ones loop less."""
        block = min(128, max(16, -(-self.window // 16) * 8))
        return (block, block) if min(T, S) > block else super().blocks(T, S, causal)

    def fused(self, causal: bool):
        return functools.partial(fused.attend, causal=True, window=self.window) if causal else None

    @staticmethod
    def limit(length: int):
        return {"window": length}

    def cost(self, T: int, S: int) -> Cost:
        H, block = self.size.head, self.blocks(T, S, causal=False)[0]
        band = min(2 * (-(-self.window // block)) + 1, -(-S // block)) * block
        return Cost(flops=4 * T * band * H, memory=self.largest(T, S), state=2 * (self.window + 1) * H)

    def slots(self, length: int) -> int:
        return min(length, self.window + 1)
