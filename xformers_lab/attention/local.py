from flax import nnx

from xformers_lab.attention import Complexity, Cost
from xformers_lab.attention._base.patterned import Patterned, near_block
from xformers_lab.attention._engine.pattern import Band, Global
from xformers_lab.errors import Refused
from xformers_lab.nn.size import Size


class Local(Patterned):
    """Sliding-window attention, the band of the survey (Beltagy et al., 2020, arXiv 2004.05150).

    out_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s over |t - s| <= window (causal: t - window <= s <= t); the first
    `tokens` positions, if any, also see and are seen by all.

    Deviations from the paper: it counts the window on both sides together, here it is one side; the projections that it
    gives to global tokens alone are in `longformer`.

    Options:
        window: keys seen on each side of a query, besides itself
        tokens: first positions that see every key and are seen by every query
    """

    kind = "sparse by position"
    exact = True
    accuracy = "within the window"
    complexity = Complexity(
        time="O(T (window + tokens) H)",
        memory="O(S H)",
        decoding="a ring of window + 1 keys and values, and the tokens'",
    )

    def __init__(self, size: Size, *, window: int = 128, tokens: int = 0, rngs: nnx.Rngs):
        if window < 1:
            raise Refused(f"window must be at least 1, got {window}")
        if tokens < 0:
            raise Refused(f"tokens must be at least 0, got {tokens}")
        super().__init__(size, Band(window) | Global(tokens) if tokens else Band(window), rngs=rngs)
        self.window, self.tokens, self.kept = window, tokens, tokens

    def blocks(self, T: int, S: int, causal: bool) -> tuple[int, int]:
        block = near_block(self.window, causal)
        return (block, block) if min(T, S) > block else super().blocks(T, S, causal)

    @staticmethod
    def limit(length: int):
        return {"window": length}

    def cost(self, T: int, S: int) -> Cost:
        H, block = self.size.head, self.blocks(T, S, causal=False)[0]
        if self.tokens:
            return super().cost(T, S)
        band = min(2 * (-(-self.window // block)) + 1, -(-S // block)) * block
        return Cost(flops=4 * T * band * H, memory=self.largest(T, S), state=2 * self.slots(S) * H)

    def slots(self, length: int) -> int:
        return min(length, self.tokens + self.window + 1)
