from flax import nnx

from xformers_lab.attention import Complexity
from xformers_lab.attention._base.patterned import Patterned, near_block
from xformers_lab.attention._engine.pattern import dilated_band
from xformers_lab.errors import Refused
from xformers_lab.nn.size import Size


class Dilated(Patterned):
    """Dilated sliding-window attention (Beltagy et al., 2020, arXiv 2004.05150, section 3.1).

    out_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s over |t - s| <= window dilation with (t - s) mod dilation = 0.

    Positions of different residues never meet in one layer: alternate with `local` by `+`.
    Deviations from the paper: the dilation is that of a layer, where the paper gives it to some heads of a layer.

    Options:
        window: keys seen on each side of a query, besides itself
        dilation: distance between neighbouring keys of the window
    """

    kind = "sparse by position"
    exact = True
    accuracy = "on its pattern"
    complexity = Complexity(
        time="O(T window H)",
        memory="O(S H)",
        decoding="a ring of window dilation + 1 keys and values",
    )

    def __init__(self, size: Size, *, window: int = 128, dilation: int = 2, rngs: nnx.Rngs):
        if window < 1:
            raise Refused(f"window must be at least 1, got {window}")
        if dilation < 1:
            raise Refused(f"dilation must be at least 1, got {dilation}")
        super().__init__(size, dilated_band(window, dilation), rngs=rngs)
        self.window, self.dilation = window, dilation

    def blocks(self, T: int, S: int, causal: bool) -> tuple[int, int]:
        """As for a band, within the positions of one residue."""
        block = min(near_block(self.window, causal), max(8, -(-S // (8 * self.dilation)) * 8))
        return block, block

    @staticmethod
    def limit(length: int):
        return {"window": length, "dilation": 1}

    def slots(self, length: int) -> int:
        return min(length, self.window * self.dilation + 1)
