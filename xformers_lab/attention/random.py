import dataclasses
from typing import Literal

from flax import nnx

from xformers_lab.attention import Complexity
from xformers_lab.attention._base.patterned import Patterned, run_block
from xformers_lab.attention._engine.random_blocks import RandomBlocks
from xformers_lab.errors import Refused
from xformers_lab.nn.size import Size


class Random(Patterned):
    """Random block attention (Zaheer et al., 2020, arXiv 2007.14062, section 2: a random graph on its own).

    out_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s over the keys of t's own block and of `count` random other blocks.

    Causal: what of the pattern lies in the past.
    Deviations from the paper: a block also sees itself, so that no query is left without a key.

    Options:
        block: positions of one block; the length where that is less
        count: random blocks that a block sees
        seed: of the random draw
        heads: shared: one draw for all heads; own: one for each, and a program for each
    """

    kind = "sparse by position"
    exact = True
    accuracy = "on its pattern"
    complexity = Complexity(time="O(T (1 + count) block H)", memory="O(S H)", decoding="every key and value")

    def __init__(
        self,
        size: Size,
        *,
        block: int = 64,
        count: int = 3,
        seed: int = 0,
        heads: Literal["shared", "own"] = "shared",
        rngs: nnx.Rngs,
    ):
        if block < 1:
            raise Refused(f"block must be at least 1, got {block}")
        if min(count, seed) < 0:
            raise Refused(f"count and seed must be at least 0, got {count} and {seed}")
        block = min(block, size.length)
        one = RandomBlocks(block, -(-size.length // block), near=0, ends=0, count=count, seed=seed)
        each = tuple(dataclasses.replace(one, head=head) for head in range(size.heads))
        super().__init__(size, each if heads == "own" else one, rngs=rngs)
        self.block_size = block

    def blocks(self, T: int, S: int, causal: bool) -> tuple[int, int]:
        return (block := self.block_size if 16 <= self.block_size <= 512 else run_block(self.block_size)), block

    @staticmethod
    def limit(length: int):
        return {"block": length}
