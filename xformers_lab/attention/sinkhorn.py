from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.nn import logsumexp

from xformers_lab.attention import Complexity, Cost, Stepwise
from xformers_lab.attention._engine.by_content import batched, in_blocks, scores_at_once
from xformers_lab.attention._engine.softmax import MASKED, hiding, softmax_average
from xformers_lab.errors import Refused
from xformers_lab.nn.size import Size


class Sinkhorn(Stepwise):
    """Sparse Sinkhorn attention (Tay et al., 2020, arXiv 2002.11296, section 3).

    Queries of block i attend to the keys of block i and to those of sum_j R_ij block j, one block that a soft sorting
    of all blocks puts beside it: R = Sinkhorn((relu(m_i W) W')_j / temperature), rows and columns normalised in turn,
    with m_i the mean of the block's input in block i.

    Causally only blocks before i are sorted to i, m_i is the mean up to the first position of block i, and a column is
    divided by the sum over its rows up to i, so that nothing depends on what comes later. Gumbel noise is added to the
    logits in training alone. Padding counts as zero in a sorted block.
    Deviations from the paper: means and not sums of inputs, so that lengths do not set the scale; W has H columns; rows
    are normalised last, so that every sorted key is a mean. SortCut, which gives all queries the same sorted blocks, is
    left out.

    Options:
        block: positions in a block
        temperature: divides the logits, softer sorting where it is high
        iterations: how often columns and rows are normalised
        noise: what is added to the logits in training
    """

    kind = "sparse by content"
    exact = True
    accuracy = "over its keys"
    complexity = Complexity(
        time="O(T block H + T^2 H / block)",
        memory="O(T H + (T / block)^2)",
        decoding="every key and value and one sorted block",
        time_note=": sorting is a product of all blocks with R",
    )
    refuses: ClassVar = {"bias": "the keys of a sorted block are mixtures, which have no position"}

    def __init__(
        self,
        size: Size,
        *,
        block: int = 64,
        temperature: float = 0.75,
        iterations: int = 5,
        noise: Literal["gumbel", "none"] = "gumbel",
        rngs: nnx.Rngs,
    ):
        if block < 1 or iterations < 1:
            raise Refused(f"block and iterations must be at least 1, got {block} and {iterations}")
        if temperature <= 0:
            raise Refused(f"temperature must be above 0, got {temperature:g}")
        super().__init__(size, rngs=rngs)
        self.block, self.temperature, self.iterations, self.noise = block, temperature, iterations, noise
        N, D, H, blocks = size.heads, size.dim, size.head, -(-size.length // block)
        draw = lambda *shape: nnx.Param(jax.random.normal(rngs.params(), shape) * shape[1] ** -0.5, decays=True)
        self.first, self.second = draw(N, D, H), draw(N, H, blocks)

    def per_head(self):
        return {"first": self.first[...], "second": self.second[...]}

    def attend(self, q, k, v, *, valid=None, causal, x, first, second, key=None):
        return jax.checkpoint(self._attend, static_argnums=8)(q, k, v, valid, x, first, second, key, causal)

    def _attend(self, q, k, v, valid, x, first, second, key, causal):
        (T, H), S, B = q.shape, len(k), self.block
        valid = in_blocks(jnp.ones(S, bool) if valid is None else valid, B, False)
        keys, values, x = (jnp.where(valid[..., None], in_blocks(x, B), 0) for x in (k, v, x))
        logits = self._logits(self._means(x, valid, causal), first, second, len(keys), key)
        some = valid.any(1)
        able = some[:, None] & some
        able = jnp.tril(able, -1) if causal else able
        order = self._balanced(logits, able, causal)
        sort = lambda x: jnp.dot(order.astype(x.dtype), x.reshape(len(x), -1), preferred_element_type=jnp.float32)
        both = lambda x: jnp.concatenate([sort(x).reshape(x.shape).astype(x.dtype), x], 1)
        there = jnp.dot(able.astype(jnp.float32), valid.astype(jnp.float32)) > 0
        # Queries in the blocks of the keys; those before the first key are given block 0.
        low = (S - T) // B
        front = S - T - low * B
        asked = jnp.pad(q * H**-0.5, ((front, len(keys) * B - S), (0, 0))).reshape(-1, B, H)
        at = jnp.arange(low * B, len(keys) * B).reshape(-1, B, 1)
        block = jnp.maximum(jnp.arange(low, len(keys)), 0)

        def added(of_block):
            at, block, there, valid = of_block
            k_at = (block[:, None] * B + jnp.arange(B))[:, None]
            own = valid[:, None] & (k_at <= at) if causal else jnp.broadcast_to(valid[:, None], (*at.shape[:2], B))
            sorted_keys = jnp.broadcast_to(there[:, None] & (at >= 0) if causal else there[:, None], own.shape)
            return hiding(jnp.concatenate([sorted_keys, own], 2))

        of_block = at, block, there[block], valid[block]
        out, _ = batched(asked, both(keys)[block], both(values)[block], added, of_block)
        return out.reshape(-1, H)[front : front + T].astype(v.dtype)

    def _means(self, x, valid, causal: bool):
        """(blocks, B, D) with zeros for padding -> (blocks, D) in float32."""
        total, number = x.sum(1, dtype=jnp.float32), valid.sum(1)
        if causal:
            before = lambda x: jnp.cumsum(jnp.concatenate([jnp.zeros_like(x[:1]), x[:-1]]), 0)
            total, number = before(total) + x[:, 0], before(number) + valid[:, 0]
        return total / jnp.maximum(number, 1)[:, None]

    def _logits(self, means, first, second, blocks: int, key=None):
        """(rows, blocks) of the sorting network."""
        if blocks > second.shape[1]:
            raise Refused(
                f"sinkhorn sorts at most {second.shape[1]} blocks of {self.block}, for a model made for "
                f"{self.size.length} positions: got {blocks}; build it with a larger length"
            )
        logits = jax.nn.relu(means @ first) @ second[:, :blocks]
        if self.noise == "gumbel" and key is not None:
            logits += jax.random.gumbel(key, logits.shape)
        return logits / self.temperature

    def _balanced(self, logits, able, causal: bool):
        """What is left of exp(logits) after columns and rows were normalised in turn; zeros where not able."""
        kept = lambda r: jnp.where(able, r, MASKED)

        def normalise(r, _):
            columns = lax.cumlogsumexp(r, 0) if causal else logsumexp(r, 0, keepdims=True)
            r = kept(r - columns)
            return kept(r - logsumexp(r, 1, keepdims=True)), None

        return jnp.where(able, jnp.exp(lax.scan(normalise, kept(logits), length=self.iterations)[0]), 0)

    def reference(self, q, k, v, *, valid=None, causal, x, first, second, key=None):
        (T, H), S, B = q.shape, len(k), self.block
        valid = jnp.ones(S, bool) if valid is None else valid
        at, position = jnp.arange(T)[:, None] + S - T, jnp.arange(S)
        block = jnp.arange(-(-S // B))[:, None]
        member = (position // B == block) & valid
        pooled = (position <= block * B) & valid if causal else member
        pooled = pooled / jnp.maximum(pooled.sum(1, keepdims=True), 1)
        logits = self._logits(pooled @ jnp.where(valid[:, None], x, 0), first, second, len(block), key)
        some = member.any(1)
        able = some[:, None] & some & ((block > block.T) | (not causal))
        weight = jnp.where(able, jnp.exp(logits - lax.stop_gradient(logits.max())), 0)
        divided = lambda a, b: a / jnp.where(b > 0, b, 1)
        for _ in range(self.iterations):
            weight = divided(weight, jnp.cumsum(weight, 0) if causal else weight.sum(0))
            weight = divided(weight, weight.sum(1, keepdims=True))
        # Place o of sorted block i mixes the positions j B + o.
        place = jnp.arange(len(block) * B)
        source = (place[:, None] % B == position % B) & valid
        mixes = jnp.where(source, weight[place // B][:, position // B], 0)
        there = (source & able[place // B][:, position // B]).any(1)
        own = jnp.maximum(at, 0) // B
        seen_sorted = (place // B == own) & there & ((at >= 0) | (not causal))
        seen_own = (position // B == own) & valid & ((position <= at) | (not causal))
        keys, values = (jnp.concatenate([mixes @ jnp.where(valid[:, None], y, 0), y]) for y in (k, v))
        s = jnp.dot(q, keys.T, preferred_element_type=jnp.float32) * H**-0.5
        return softmax_average(s, jnp.concatenate([seen_sorted, seen_own], 1), values).astype(v.dtype)

    def cost(self, T: int, S: int) -> Cost:
        H, D, B = self.size.head, self.size.dim, self.block
        blocks, asked = -(-S // B), -(-S // B) - (S - T) // B
        flops = 4 * blocks**2 * B * H + 2 * blocks * (D * H + H * blocks + blocks * B) + 8 * asked * B * B * H
        memory = max(S * D, 2 * asked * B * H, scores_at_once(asked, B, 2 * B), self.iterations * blocks**2)
        state = 2 * (blocks + 1) * B * H + D + self.iterations * blocks + 1
        return Cost(flops=flops, memory=memory, state=state)

    @staticmethod
    def limit(length: int):
        return {"block": length}

    on_places = "its blocks go"

    def init_state(self, length: int, dtype=jnp.float32):
        """columns: what the rows so far add up to in each column, at each iteration."""
        blocks, B, H = -(-length // self.block), self.block, self.size.head
        rows = jnp.zeros((2, blocks, B, H), dtype)
        columns = jnp.full((self.iterations, blocks), MASKED)
        total, seen = jnp.zeros(self.size.dim), jnp.zeros((), jnp.int32)
        return {"kv": rows, "sorted": rows[:, 0], "columns": columns, "total": total, "seen": seen}

    def step(self, state, q, k, v, *, x, first, second):
        """The first token of a block sorts the blocks before it to its own."""
        at, (_, blocks, B, H) = state["seen"], state["kv"].shape
        own, total = at // B, state["total"] + x.astype(jnp.float32)
        row, columns, able = self._logits(total / (at + 1), first, second, blocks), [], jnp.arange(blocks) < own
        kept = lambda r: jnp.where(able, r, MASKED)
        row = kept(row)
        for before in state["columns"]:
            columns.append(jnp.logaddexp(before, row))
            row = kept(row - columns[-1])
            row = kept(row - logsumexp(row))
        order = jnp.where(able, jnp.exp(row), 0)
        kv = state["kv"].at[:, own, at % B].set(jnp.stack([k, v]))
        block = {"sorted": jnp.einsum("j,xjbh->xbh", order, kv).astype(kv.dtype), "columns": jnp.stack(columns)}
        block = {name: jnp.where(at % B == 0, new, state[name]) for name, new in block.items()}
        keys, values = jnp.concatenate([block["sorted"], kv[:, own]], 1)
        seen = jnp.concatenate([jnp.broadcast_to(own > 0, B), jnp.arange(B) <= at % B])
        out = softmax_average(jnp.dot(keys, q * H**-0.5, preferred_element_type=jnp.float32), seen, values)
        return out, block | {"kv": kv, "total": total, "seen": at + 1}
