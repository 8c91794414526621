import math

from flax import nnx

from xformers_lab.attention import Complexity, Cost
from xformers_lab.attention._base.patterned import Patterned, near_block
from xformers_lab.attention._engine.block_sparse.chunks import largest_array
from xformers_lab.attention._engine.block_sparse.layout import live_pairs
from xformers_lab.attention._engine.pattern import Band
from xformers_lab.errors import Refused
from xformers_lab.nn.size import Size


class Multiscale(Patterned):
    """Multi-scale multi-head attention (Guo et al., 2020, arXiv 1912.00544).

    Head n: out_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s over |t - s| <= w_n (causal: t - w_n <= s <= t), with one
    window for each run of heads, from a word's neighbours to far context.

    Heads of one window run the band engine together.
    Deviations from the paper: heads are spread evenly over the scales in every layer; the paper gives lower layers more
    small scales, which `multiscale:scales=1x8+multiscale:scales=8x64` does.

    Options:
        scales: windows (keys on each side of a query), the first heads' first; fewer heads than scales keep the last of
            each share
    """

    kind = "multi-head"
    exact = True
    accuracy = "within each head's window"
    complexity = Complexity(
        time="O(T w H)",
        memory="O(S H)",
        decoding="a ring of the widest window's keys and values",
        time_note="with the mean window w",
    )

    def __init__(self, size: Size, *, scales: tuple[int, ...] = (1, 8, 64), rngs: nnx.Rngs):
        if not scales or min(scales) < 1:
            raise Refused(f"scales are windows of at least 1, such as 1x8x64, got {'x'.join(map(str, scales))}")
        share = [math.ceil((head + 1) * len(scales) / size.heads) - 1 for head in range(size.heads)]
        super().__init__(size, tuple(Band(scales[index]) for index in share), rngs=rngs)
        self.windows = tuple(scales[index] for index in share)

    def blocks(self, T: int, S: int, causal: bool) -> tuple[int, int]:
        block = near_block(max(self.windows), causal)
        return (block, block) if min(T, S) > block else super().blocks(T, S, causal)

    @staticmethod
    def limit(length: int):
        return {"scales": (length,)}

    def cost(self, T: int, S: int) -> Cost:
        H, blocks = self.size.head, self.blocks(T, S, causal=False)
        each = [self.seen(False, head) for head in range(self.size.heads)]
        pairs = sum(live_pairs(pattern, T, S, *blocks) for pattern in each) / len(each)
        memory = max(largest_array(pattern, T, S, H, blocks) for pattern in each)
        return Cost(flops=4 * H * pairs, memory=memory, state=2 * self.slots(S) * H)

    def slots(self, length: int) -> int:
        return min(length, max(self.windows) + 1)
