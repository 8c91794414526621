import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention import Call, Complexity, Cost
from xformers_lab.attention._base.patterned import Patterned, near_block
from xformers_lab.attention._engine.block_sparse import block_sparse
from xformers_lab.attention._engine.block_sparse.chunks import heads_at_once, largest_array
from xformers_lab.attention._engine.block_sparse.layout import live_pairs
from xformers_lab.attention._engine.dense import scores
from xformers_lab.attention._engine.pattern import Band, Global, Pattern
from xformers_lab.attention._engine.softmax import softmax_average
from xformers_lab.errors import Refused
from xformers_lab.nn.buckets import Buckets
from xformers_lab.nn.normalisation import RMSNorm
from xformers_lab.nn.plan import plan_of
from xformers_lab.nn.size import Size

BUCKETS, FARTHEST = 32, 128


class TransientGlobal(Patterned):
    """Transient global attention of LongT5 (Guo et al., 2021, arXiv 2112.07916, section 3.1.2).

    out_t = sum_s softmax_s(q_t . [K; k]_s / sqrt(H) + b) [V; v]_s over |t - s| <= window and over every block: K and V
    are the keys and values, by the projections of all others, of blocks of the input, each the sum of its `block`
    positions at unit root mean square times learned weights.

    Positions behind the last whole block belong to that one; a text shorter than a block has none. What is added to
    the scores of blocks, b, is learned for each head in T5's buckets of distances in blocks; a bias of the model is
    for near keys alone, and rotary positions leave K as if all stood at position 0.
    Deviations from the paper: scores are divided by sqrt(H); every layer has its own b, which begins as 0, where the
        paper has one for all layers.

    Options:
        window: keys seen on each side of a query, besides itself
        block: positions that are summed up to one key more
    """

    kind = "sparse by position"
    exact = True
    accuracy = "on its pattern"
    complexity = Complexity(
        time="O(T (window + S / block) H)",
        memory="O(S H)",
        memory_note="per row of blocks",
    )
    refuses: ClassVar = {
        "causal": "a block's sum holds positions behind the query",
        "documents": "its blocks are places of the row",
        "map": "the values of blocks are made of their input, not of their positions' values",
    }

    def __init__(self, size: Size, *, window: int = 127, block: int = 16, rngs: nnx.Rngs):
        if window < 1:
            raise Refused(f"window must be at least 1, got {window}")
        if block < 1:
            raise Refused(f"block must be at least 1, got {block}")
        super().__init__(size, Band(window), rngs=rngs)
        self.window, self.summed_up = window, block
        self.unit = RMSNorm(size.dim, dtype=size.dtype, rngs=rngs)
        self.table = nnx.Param(jnp.zeros((size.heads, BUCKETS)), decays=False)

    def drawn(self, causal: bool, head: int = 0):
        """Nothing: sums of blocks are no positions."""
        return None

    @staticmethod
    def limit(length: int):
        return {"window": length, "block": length + 1}

    def per_head(self):
        return {"of_blocks": Buckets(self.table[...], FARTHEST, both=True)}

    def from_keys(self, x):
        return {"blocks_seen": self._blocks_of(x, None)}

    def of_tokens(self, call: Call):
        """Only what is valid is summed up."""
        heads_first = lambda leaf: jnp.swapaxes(leaf, 1, 2)
        return {"blocks_seen": jax.tree.map(heads_first, self._blocks_of(call.x, call.valid))}

    def _blocks_of(self, x, valid):
        """Keys and values (B, M, N, H) of the M blocks of x (B, S, D)."""
        B, S, D = x.shape
        if self.summed_up > S:
            none = jnp.zeros((B, 0, self.size.heads, self.size.head), x.dtype)
            return {"k": none, "v": none}
        x = x if valid is None else jnp.where(valid[..., None], x, 0)
        rows = jnp.pad(x, ((0, 0), (0, -S % self.summed_up), (0, 0))).reshape(B, -1, self.summed_up, D)
        sums, row = rows.sum(2, dtype=jnp.float32), jnp.arange(rows.shape[1])[:, None]
        whole = _whole_blocks(S, valid, self.summed_up)
        whole = jnp.broadcast_to(whole, (B,))[:, None, None]
        rest = jnp.where(row >= whole, sums, 0).sum(1, keepdims=True)
        sums = (sums + jnp.where(row == whole - 1, rest, 0))[:, : S // self.summed_up]
        unit = self.unit(sums.astype(x.dtype))
        times = self.size.heads // self.size.key_heads
        project = lambda linear: jnp.repeat(self.heads_of(linear(unit)).astype(x.dtype), times, 2)
        return {"k": project(self.key), "v": project(self.value)}

    def attend(self, q, k, v, *, valid=None, bias=None, of_blocks, blocks_seen):
        T, S, M = q.shape[0], k.shape[0], blocks_seen["k"].shape[0]
        whole = _whole_blocks(S, valid, self.summed_up)
        # A number like any other leaf of a bias, which are differentiated.
        bias = Sided(bias, of_blocks, whole.astype(jnp.float32), M, self.summed_up)
        known = None if valid is None else jnp.concatenate([jnp.arange(M) < whole, valid])
        joined = lambda of_blocks, rows: jnp.concatenate([of_blocks.astype(rows.dtype), rows])
        k, v = joined(blocks_seen["k"], k), joined(blocks_seen["v"], v)
        return block_sparse(q, k, v, pattern=self._seen(M), valid=known, bias=bias, blocks=self._in_blocks(T, S + M))

    def reference(self, q, k, v, *, valid=None, bias=None, of_blocks, blocks_seen):
        T, S, M = q.shape[0], k.shape[0], blocks_seen["k"].shape[0]
        at, keys = jnp.arange(T)[:, None] + S - T, jnp.arange(S)[None]
        whole, number = _whole_blocks(S, valid, self.summed_up), jnp.arange(M)[None]
        own = jnp.minimum(jnp.maximum(at, 0) // self.summed_up, whole - 1)
        s = jnp.concatenate([scores(q, blocks_seen["k"]) + of_blocks(own, number), scores(q, k, bias)], 1)
        near = (abs(at - keys) <= self.window) & (True if valid is None else valid)
        seen = jnp.concatenate([jnp.broadcast_to(number < whole, (T, M)), near], 1)
        return softmax_average(s, seen, jnp.concatenate([blocks_seen["v"].astype(v.dtype), v]))

    def _seen(self, M: int) -> Pattern:
        """The keys of blocks stand in front of all others."""
        return Band(self.window) | Global(M, queries=False) if M else Band(self.window)

    def _in_blocks(self, T: int, S: int) -> tuple[int, int]:
        block = near_block(self.window, causal=False)
        return (block, block) if min(T, S) > block else super().blocks(T, S, causal=False)

    def heads_at_once(self, T: int, S: int, causal: bool) -> int:
        M = S // self.summed_up
        return heads_at_once(plan_of(self.size), self._seen(M), T, S + M, self._in_blocks(T, S + M))

    def cost(self, T: int, S: int) -> Cost:
        D, H, M = self.size.dim, self.size.head, S // self.summed_up
        pattern, blocks = self._seen(M), self._in_blocks(T, S + M)
        flops = 4 * H * live_pairs(pattern, T, S + M, *blocks) + 4 * M * D * H
        return Cost(flops=flops, memory=largest_array(pattern, T, S + M, H, blocks), state=0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sided:
    """A bias of the keys behind `rows` blocks, and that of blocks, by distances in blocks; `whole` () of them exist."""

    bias: Any
    of_blocks: Buckets
    whole: jax.Array
    rows: int = dataclasses.field(metadata={"static": True})
    size: int = dataclasses.field(metadata={"static": True})

    def __call__(self, q_at, k_at):
        at = q_at - self.rows
        own = jnp.minimum(jnp.maximum(at, 0) // self.size, self.whole.astype(at.dtype) - 1)
        near = 0 if self.bias is None else self.bias(at, jnp.maximum(k_at - self.rows, 0))
        return jnp.where(k_at < self.rows, self.of_blocks(own, k_at), near)


def _whole_blocks(S: int, valid, size: int):
    """How many blocks of so many positions (S,) end before the last valid one, or with it; of valid (B, S) one each."""
    if valid is None:
        return jnp.int32(S // size)
    length = jnp.where(valid, jnp.arange(1, S + 1), 0).max(-1)
    return length // size
