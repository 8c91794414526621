import jax.numpy as jnp
from flax import nnx
from jax import lax

from xformers_lab.attention import Complexity, Cost, Stepwise
from xformers_lab.attention._engine.by_content import ROWS, batched, count, grouped, in_blocks, merged, scores_at_once
from xformers_lab.attention._engine.dense import scores
from xformers_lab.attention._engine.softmax import EMPTY, MASKED, hiding, softmax_average
from xformers_lab.errors import Refused
from xformers_lab.nn.size import Size


class Moba(Stepwise):
    """Mixture of block attention, MoBA (Lu et al., 2025, arXiv 2502.13189, section 2.2).

    out_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s over the keys of the query's own block and of those `chosen` - 1
    other blocks whose mean key has the largest product with q_t; causally of blocks before it, and s <= t. Every query
    of every head chooses for itself; blocks of equal products are taken in order.

    The choice has no gradient. A score bias counts in the softmax, not in the choice.
    Deviations from the paper: blocks are small, for sequences of some thousand positions (the paper's hold 512 and
    more); without causality any other block may be chosen; means are over positions that are no padding.

    Options:
        block: positions in a block
        chosen: blocks that a query sees, its own among them
    """

    kind = "sparse by content"
    exact = True
    accuracy = "over the chosen blocks"
    complexity = Complexity(
        time="O(T chosen block H + T S H / block)",
        memory="O(T chosen H)",
        decoding="every key and value, and a sum for each block",
    )

    def __init__(self, size: Size, *, block: int = 64, chosen: int = 3, rngs: nnx.Rngs):
        if block < 1:
            raise Refused(f"block must be at least 1, got {block}")
        if chosen < 1:
            raise Refused(f"chosen must be at least 1, the query's own block, got {chosen}")
        super().__init__(size, rngs=rngs)
        self.block, self.chosen = block, chosen

    def attend(self, q, k, v, *, valid=None, causal, bias=None):
        (T, H), S = q.shape, len(k)
        B, choices, C = self._geometry(S)
        at = jnp.arange(T) + S - T
        valid = in_blocks(jnp.ones(S, bool) if valid is None else valid, B, False)
        keys, values = in_blocks(k, B), in_blocks(v, B)
        means = _means(lax.stop_gradient(keys), valid)
        rows = lax.stop_gradient(q).astype(jnp.float32), jnp.maximum(at, 0) // B
        choose = lambda rows: _choose(rows[0], rows[1], means, valid.any(1), choices, causal)
        chosen = lax.map(choose, rows, batch_size=ROWS)
        groups = grouped(chosen.reshape(-1), len(keys), C)

        def added(of_block):
            q_at, block, valid = of_block
            k_at = (block[:, None] * B + jnp.arange(B))[:, None]
            hidden = hiding(valid[:, None] & (k_at <= q_at) if causal else valid[:, None])
            return hidden if bias is None else hidden + bias(q_at, k_at)

        sent = groups.sent(q * H**-0.5, choices), groups.sent(at, choices)[..., None]
        block = groups.block
        out, lse = batched(sent[0], keys[block], values[block], added, (sent[1], block, valid[block]))
        out, lse = groups.returned(out, choices), groups.returned(lse, choices, EMPTY)
        return merged(out, lse, 1).astype(v.dtype)

    def _geometry(self, S: int) -> tuple[int, int, int]:
        """Positions in a block, blocks a query sees, and queries in a group."""
        B = min(self.block, S)
        return B, min(self.chosen, -(-S // B)), max(8, B // 2)

    def reference(self, q, k, v, *, valid=None, causal, bias=None):
        T, S = q.shape[0], k.shape[0]
        valid = jnp.ones(S, bool) if valid is None else valid
        at, keys = jnp.arange(T)[:, None] + S - T, jnp.arange(S)[None]
        block, own = keys // self.block, jnp.maximum(at, 0) // self.block
        number = jnp.arange(-(-S // self.block))
        member = (number[:, None] == block) & valid
        mean = member @ k.astype(jnp.float32) / jnp.maximum(member.sum(1, keepdims=True), 1)
        gate = q.astype(jnp.float32) @ mean.T
        gate = jnp.where((number < own if causal else number != own) & member.any(1), gate, MASKED)
        first, second = gate[:, None], gate[:, :, None]
        ahead = (first > second) | ((first == second) & (number < number[:, None]))
        chosen = ((ahead.sum(2) < self.chosen - 1) & (gate > EMPTY)) | (number == own)
        seen = jnp.take_along_axis(chosen, jnp.broadcast_to(block, (T, S)), 1) & valid
        return softmax_average(scores(q, k, bias), seen & (keys <= at) if causal else seen, v)

    def cost(self, T: int, S: int) -> Cost:
        H, (B, choices, C) = self.size.head, self._geometry(S)
        blocks = -(-S // B)
        n = count(T * choices, blocks, C)
        flops = 2 * T * blocks * H + 4 * n * C * B * H
        memory = max(n * B * H, n * C * H, scores_at_once(n, C, B), min(T, ROWS) * blocks)
        whole = -(-S // self.block)
        return Cost(flops=flops, memory=memory, state=2 * whole * self.block * H + whole * H + 1)

    @staticmethod
    def limit(length: int):
        return {"chosen": length}

    on_places = "its blocks go"

    def init_state(self, length: int, dtype=jnp.float32):
        """Blocks stand at multiples of their size, so each key has a place of its own."""
        blocks, H = -(-length // self.block), self.size.head
        rows = jnp.zeros((blocks, self.block, H), dtype)
        return {"k": rows, "v": rows, "sums": jnp.zeros((blocks, H)), "seen": jnp.zeros((), jnp.int32)}

    def step(self, state, q, k, v, *, bias=None):
        at, (blocks, B, H) = state["seen"], state["k"].shape
        own, choices = at // B, min(self.chosen, blocks)
        keys, values = (state[name].at[own, at % B].set(new) for name, new in (("k", k), ("v", v)))
        sums = state["sums"].at[own].add(k.astype(jnp.float32))
        there = jnp.arange(blocks) <= own
        chosen = _choose(q.astype(jnp.float32), own, sums / B, there, choices, True)
        k_at = (chosen[:, None] * B + jnp.arange(B)).reshape(1, -1)
        near = lambda x: x.at[chosen].get(mode="fill", fill_value=0).reshape(-1, H)
        s = jnp.dot(q[None] * H**-0.5, near(keys).T, preferred_element_type=jnp.float32)
        s = s if bias is None else s + bias(at[None, None], k_at)
        out = softmax_average(s, (k_at <= at) & jnp.repeat(chosen < blocks, B), near(values))[0]
        return out, {"k": keys, "v": values, "sums": sums, "seen": at + 1}


def _means(keys, valid):
    """(blocks, B, H) and (blocks, B) -> (blocks, H) in float32, over valid positions."""
    total = jnp.where(valid[..., None], keys, 0).sum(1, dtype=jnp.float32)
    return total / jnp.maximum(valid.sum(1), 1)[:, None]


def _choose(q, own, means, there, choices: int, causal: bool):
    """The blocks (choices,) of one query (H,): its own first; `blocks` in place of one that is not to be had."""
    blocks = len(means)
    number = jnp.arange(blocks)
    gate = jnp.where((number < own if causal else number != own) & there, means @ q, MASKED)
    best, chosen = lax.top_k(gate, choices - 1)
    return jnp.concatenate([own[None], jnp.where(best > EMPTY, chosen, blocks)])
