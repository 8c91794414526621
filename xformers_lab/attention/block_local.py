from flax import nnx

from xformers_lab.attention import Complexity
from xformers_lab.attention._base.patterned import Patterned, run_block
from xformers_lab.attention._engine.pattern import Blocks
from xformers_lab.errors import Refused
from xformers_lab.nn.size import Size


class BlockLocal(Patterned):
    """Block-local attention over runs of positions (Qiu et al., 2019, arXiv 1911.02972; Kitaev et al., 2020, arXiv
    2001.04451, appendix: chunks that look one back).

    out_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s over the keys s of t's own run of `block` positions, of the
    `before` runs in front of it and of the `after` runs behind it.

    The last run is shorter where `block` does not divide the length.
    Deviations from the paper: none of Blockwise's permutations of runs, which differ by head.

    Options:
        block: positions of one run
        before: runs in front of its own that a query sees
        after: runs behind its own that a query sees
    """

    kind = "sparse by position"
    exact = True
    accuracy = "on its pattern"
    complexity = Complexity(
        time="O(T block (1 + before + after) H)",
        memory="O(S H)",
        decoding="a ring of block (1 + before) keys and values",
    )

    def __init__(self, size: Size, *, block: int = 64, before: int = 0, after: int = 0, rngs: nnx.Rngs):
        if block < 1:
            raise Refused(f"block must be at least 1, got {block}")
        if min(before, after) < 0:
            raise Refused(f"before and after must be at least 0, got {before} and {after}")
        super().__init__(size, Blocks(block, before, after), rngs=rngs)
        self.block_size, self.before, self.after = block, before, after

    def blocks(self, T: int, S: int, causal: bool) -> tuple[int, int]:
        return (block := run_block(self.block_size)), block

    @staticmethod
    def limit(length: int):
        return {"block": length}

    def slots(self, length: int) -> int:
        return min(length, self.block_size * (1 + self.before))
