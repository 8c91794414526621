import dataclasses
from typing import Literal

from flax import nnx

from xformers_lab.attention import Complexity
from xformers_lab.attention._base.patterned import Patterned, run_block
from xformers_lab.attention._engine.random_blocks import RandomBlocks
from xformers_lab.errors import Refused
from xformers_lab.nn.size import Size


class Bigbird(Patterned):
    """BigBird: window, global and random blocks (Zaheer et al., 2020, arXiv 2007.14062, section 2 and appendix D).

    out_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s over the keys of t's own block, of its two neighbours, of the first
    and the last block, and of `random` random blocks out of the others; queries of the first and the last block see
    every key.

    Causal: what of the pattern lies in the past.
    Deviations from the paper: random blocks are drawn once, from `seed`, for all layers. The last block is shorter
    where `block` does not divide the length; of five blocks or fewer nothing is left out.

    Options:
        block: positions of one block; the length where that is less
        random: random blocks that a block sees
        seed: of the random draw
        heads: shared: one draw for all heads; own: one for each, as in the paper's code, and a program for each
    """

    kind = "sparse by position"
    exact = True
    accuracy = "on its pattern, the paper's internal construction (ITC), where global blocks are part of the sequence"
    complexity = Complexity(
        time="O(T (7 + random) block H)",
        memory="O(S H)",
        decoding="every key and value",
        time_note=", of which two parts are the global blocks' queries",
    )

    def __init__(
        self,
        size: Size,
        *,
        block: int = 64,
        random: int = 3,
        seed: int = 0,
        heads: Literal["shared", "own"] = "shared",
        rngs: nnx.Rngs,
    ):
        if block < 1:
            raise Refused(f"block must be at least 1, got {block}")
        if min(random, seed) < 0:
            raise Refused(f"random and seed must be at least 0, got {random} and {seed}")
        block = min(block, size.length)
        one = RandomBlocks(block, -(-size.length // block), near=1, ends=1, count=random, seed=seed)
        each = tuple(dataclasses.replace(one, head=head) for head in range(size.heads))
        super().__init__(size, each if heads == "own" else one, rngs=rngs)
        self.block_size = block

    def blocks(self, T: int, S: int, causal: bool) -> tuple[int, int]:
        return (block := self.block_size if 16 <= self.block_size <= 512 else run_block(self.block_size)), block

    @staticmethod
    def limit(length: int):
        return {"block": length}
