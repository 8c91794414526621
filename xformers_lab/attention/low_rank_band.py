from typing import Any

import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention import Complexity, Cost, OneHead
from xformers_lab.attention._engine.block_sparse import block_sparse
from xformers_lab.attention._engine.block_sparse.chunks import largest_array
from xformers_lab.attention._engine.block_sparse.layout import live_pairs
from xformers_lab.attention._engine.dense import dense
from xformers_lab.attention._engine.pattern import All, Band, Causal, Pattern
from xformers_lab.errors import Refused
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.size import Size


class LowRankBand(OneHead):
    """Low-rank and locality constrained attention (Guo et al., 2019, doi 10.1109/TASLP.2019.2944078).

    out_t = sum_s softmax_s(u_t . w_s / sqrt(rank)) v_s + sum_(|t - s| <= window) softmax_s(q_t . k_s / sqrt(H)) v_s.
    The matrix of attention is a low-rank one for what is far, whose scores come from queries u and keys w of few
    channels, and a band for what is near; `csalr` is low-rank alone.

    A bias is added to the scores of both parts; rotary positions turn q and k alone.
    Deviations from the paper: this follows the survey's account of it (Lin et al., 2021, section 4.5); both parts weigh
    the same values, and are added.

    Options:
        rank: channels of the queries and keys of the low-rank part
        window: keys of the band on each side of a query, besides itself
    """

    kind = "low rank"
    exact = True
    complexity = Complexity(
        time="O(T S (rank + H) + T window H)",
        memory="O(S)",
        decoding="every key, value and input",
        memory_note="per block of queries",
    )

    def __init__(self, size: Size, *, rank: int = 8, window: int = 16, rngs: nnx.Rngs):
        for name, value in (("rank", rank), ("window", window)):
            if value < 1:
                raise Refused(f"{name} must be at least 1, got {value}")
        super().__init__(size, rngs=rngs)
        self.rank, self.window = rank, window
        self.low_query, self.low_key = (
            Linear(size.dim, size.heads * rank, use_bias=False, dtype=size.dtype, rngs=rngs) for _ in range(2)
        )

    def from_queries(self, x):
        return {"low_q": self.low_query(x).reshape(*x.shape[:2], self.size.heads, self.rank)}

    def from_keys(self, x):
        return {"low_k": self.low_key(x).reshape(*x.shape[:2], self.size.heads, self.rank)}

    def parts(self, causal: bool) -> tuple[Pattern, Pattern]:
        """What the low-rank part and the band see."""
        return (Causal(), Band(self.window) & Causal()) if causal else (All(), Band(self.window))

    def blocks(self, T: int, S: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Queries and keys per block of the engine, for both parts."""
        near = min(128, max(16, -(-self.window // 8) * 8))
        return (min(256, _eights(T)), min(512, _eights(S))), (min(near, _eights(T)), min(near, _eights(S)))

    def attend(self, q, k, v, *, valid=None, documents=None, causal, bias=None, low_q, low_k):
        (far, near), (wide, narrow) = self.parts(causal), self.blocks(len(q), len(k))
        options: dict[str, Any] = {"valid": valid, "documents": documents, "bias": bias}
        out = jnp.asarray(block_sparse(low_q, low_k, v, pattern=far, blocks=wide, **options))
        return out + jnp.asarray(block_sparse(q, k, v, pattern=near, blocks=narrow, **options))

    def reference(self, q, k, v, *, valid=None, documents=None, causal, bias=None, low_q, low_k):
        far, near = self.parts(causal)
        options: dict[str, Any] = {"valid": valid, "documents": documents, "bias": bias}
        return dense(low_q, low_k, v, pattern=far, **options) + dense(q, k, v, pattern=near, **options)

    def cost(self, T: int, S: int) -> Cost:
        H, D = self.size.head, self.size.dim
        (far, near), (wide, narrow) = self.parts(False), self.blocks(T, S)
        flops = 2 * (self.rank + H) * live_pairs(far, T, S, *wide) + 4 * H * live_pairs(near, T, S, *narrow)
        memory = max(largest_array(far, T, S, H, wide), largest_array(near, T, S, H, narrow))
        return Cost(flops=flops + 2 * (T + S) * D * self.rank, memory=memory, state=S * (2 * H + D))


def _eights(length: int) -> int:
    return -(-length // 8) * 8
