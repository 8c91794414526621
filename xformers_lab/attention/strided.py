import math

from flax import nnx

from xformers_lab.attention import Complexity, Cost
from xformers_lab.attention._base.patterned import Patterned
from xformers_lab.attention._engine.pattern import Band, Residue
from xformers_lab.errors import Refused
from xformers_lab.nn.size import Size


class Strided(Patterned):
    """Strided sparse attention of the Sparse Transformer (Child et al., 2019, arXiv 1904.10509, section 4.3).

    A query sees the keys at most `stride` away and every key a multiple of `stride` away:
    out_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s over |t - s| <= stride or (t - s) mod stride = 0.

    Deviations from the paper: where it is not causal a query sees the later keys of its pattern too, and the paper is
    causal alone. One softmax runs over the union of the paper's two patterns (its "merged" form), where its factorised
    heads have one each.

    Options:
        stride: distance between the far keys, and half-width of the near band; none: the square root of the length
    """

    kind = "sparse by position"
    exact = True
    accuracy = "on its pattern"
    complexity = Complexity(
        time="O(T (stride + S / stride) H)",
        memory="O(S H)",
        decoding="every key and value",
        time_note=", least at the default stride sqrt(length): O(T^1.5 H)",
    )

    def __init__(self, size: Size, *, stride: int | None = None, rngs: nnx.Rngs):
        stride = max(1, round(math.sqrt(size.length))) if stride is None else stride
        if stride < 1:
            raise Refused(f"stride must be at least 1, got {stride}")
        super().__init__(size, Band(stride) | Residue(stride), rngs=rngs)
        self.stride = stride

    def blocks(self, T: int, S: int, causal: bool) -> tuple[int, int]:
        """Blocks of one stride: the band is three of them, and at the square root so is a residue exactly one."""
        return (block := max(8, min(self.stride, 512))), block

    @staticmethod
    def limit(length: int):
        return {"stride": length}

    def cost(self, T: int, S: int) -> Cost:
        H, stride = self.size.head, self.stride
        pairs = T * (3 * stride + S / stride)
        return Cost(flops=4 * H * pairs, memory=self.largest(T, S), state=2 * S * H)
