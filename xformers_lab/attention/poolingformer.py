from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xformers_lab.attention import Call, Complexity, Cost, MultiHead
from xformers_lab.attention._engine.block_sparse import block_sparse
from xformers_lab.attention._engine.block_sparse.chunks import largest_array
from xformers_lab.attention._engine.block_sparse.layout import live_pairs
from xformers_lab.attention._engine.heads import over_heads
from xformers_lab.attention._engine.softmax import MASKED, masked_softmax, softmax_average
from xformers_lab.attention._engine.windows import Windows, count, windows
from xformers_lab.attention.local import Local
from xformers_lab.errors import Refused
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.plan import plan_of
from xformers_lab.nn.size import Size


class Poolingformer(Local):
    """Poolingformer (Zhang et al., 2021, arXiv 2105.04371, section 3).

    y = attention over keys at most `window` away, z = attention of queries from y over pooled keys and values from y at
    most `reach` away, out = y + z. A pooled key stands for `kernel` positions, one every `stride`.

    Causally only those pooled that end at the query's position or before, so that the first queries have the first
    level alone. A score bias is added in the first level; rotary positions turn it alone.
    Deviations from the paper: pools are the same for all queries, and one is seen where it lies in the window as a
    whole; padded positions are left out of a pool. Heads are joined before the second level without a projection.

    Options:
        window: keys seen on each side of a query in the first level
        reach: how far on each side the second level sees, at least kernel - 1; 0: no second level
        kernel: positions in a pool, at least stride
        stride: positions from one pool to the next
        pool: mean, max, or ldconv: weights softmax(W x) of the x in a pool's middle
    """

    kind = "memory compression"
    exact = True
    accuracy = "within its two windows"
    complexity = Complexity(
        time="O(T (window + reach / stride) H + T D^2)",
        memory="O(T D)",
        decoding="window + 1 keys and values and reach / stride pooled ones",
    )
    refuses: ClassVar = {
        "map": "the queries of the second level are outputs of the first, so weights depend on the values",
        "cross": "the keys of the second level are outputs of the first, so the queries must be those of the keys",
    }

    def __init__(
        self,
        size: Size,
        *,
        window: int = 64,
        reach: int = 256,
        kernel: int = 5,
        stride: int = 4,
        pool: Literal["mean", "max", "ldconv"] = "ldconv",
        rngs: nnx.Rngs,
    ):
        if reach < 0:
            raise Refused(f"reach must be at least 0, got {reach}")
        if stride < 1:
            raise Refused(f"stride must be at least 1, got {stride}")
        if kernel < stride:
            raise Refused(f"kernel must be at least stride, or positions are lost: got {kernel} and {stride}")
        if 0 < reach < kernel - 1:
            raise Refused(
                f"reach must be 0 or at least kernel - 1 = {kernel - 1}, or no pool lies before a query: got {reach}"
            )
        if not reach and (kernel, stride, pool) != (5, 4, "ldconv"):
            raise Refused("kernel, stride and pool are options of the second level, and reach=0 leaves it out")
        super().__init__(size, window=window, rngs=rngs)
        self.reach, self.kernel, self.stride, self.pool = reach, kernel, stride, pool
        linear = lambda heads: Linear(size.dim, heads * size.head, use_bias=False, dtype=size.dtype, rngs=rngs)
        heads = (size.heads, size.key_heads, size.key_heads) if reach else ()
        self.second = nnx.List([linear(number) for number in heads])
        shape, learned = (2, size.key_heads, size.head, kernel), reach and pool == "ldconv"
        self.weigh = (
            nnx.Param(jax.random.normal(rngs.params(), shape) * size.head**-0.5, decays=True) if learned else None
        )

    def attend_heads(self, call: Call):
        T, S = call.q.shape[1], call.k.shape[1]
        if T != S:
            raise Refused(f"poolingformer pools the outputs of its first level: {T} queries need {T} keys, got {S}")
        y, carry, aux = super().attend_heads(call)
        if not self.reach:
            return y, carry, aux
        second = self._second_level if call.method == "attend" else self._by_definition
        q, k, v = self._projected(y)
        return (y + second(q, k, v, call.valid, call.causal)).astype(y.dtype), carry, aux

    def _projected(self, y):
        """Queries, keys and values of the second level from the first's outputs (B, T, N, H)."""
        flat = y.reshape(*y.shape[:2], -1)
        return [linear(flat).reshape(*y.shape[:2], -1, self.size.head).astype(y.dtype) for linear in self.second]

    def _second_level(self, q, k, v, valid, causal: bool):
        S, slots = k.shape[1], count(k.shape[1], self.kernel, self.stride)
        there = jnp.ones((1, S), bool) if valid is None else valid
        there = jax.vmap(self._windows)(there)  # (B or 1, slots, kernel)
        keys, values = (jax.checkpoint(self._pools, static_argnums=2)(x, there, i) for i, x in enumerate((k, v)))
        pattern, blocks = self._seen(S, causal), self._second_blocks(S, slots)

        def one(q, k, v, _, valid, __):
            return block_sparse(q, k, v, pattern=pattern, valid=valid, blocks=blocks), None

        some = None if valid is None else there.any(2)
        return over_heads(one, q, keys, values, None, some, None, plan=plan_of(self.size))[0]

    def _windows(self, x):
        return windows(x, self.kernel, self.stride)

    def _pools(self, x, there, which: int):
        """(B, S, K, H) -> (B, slots, K, H)."""
        return self._pooled(jax.vmap(self._windows)(x), there, which)

    def _pooled(self, x, there, which: int):
        """(B, slots, kernel, K, H), there (B or 1, slots, kernel) -> (B, slots, K, H); zeros of nothing."""
        inside = there[..., None, None]
        x = jnp.where(inside, x, 0)
        if self.pool == "max":
            return jnp.where(there.any(2)[..., None, None], jnp.where(inside, x, MASKED).max(2), 0).astype(x.dtype)
        if self.weigh is None:
            weights = there / jnp.maximum(there.sum(2, keepdims=True), 1)
            return (x.astype(jnp.float32) * weights[..., None, None]).sum(2).astype(x.dtype)
        wide = x.astype(jnp.float32)
        s = jnp.einsum("bmkh,khc->bmkc", wide[:, :, self.kernel // 2], self.weigh[which])
        return jnp.einsum("bmkc,bmckh->bmkh", masked_softmax(s, there[:, :, None]), wide).astype(x.dtype)

    def _seen(self, S: int, causal: bool):
        """What the second level's queries see of the pools."""
        ahead = 0 if causal else self.reach
        return Windows(self.kernel, self.stride, count(S, self.kernel, self.stride), S, self.reach, ahead)

    def _second_blocks(self, S: int, slots: int) -> tuple[int, int]:
        """Queries and pools per block, of about 128 positions each, so that blocks of a band advance together."""
        pools = max(1, min(slots, 128 // self.stride))
        return min(S, pools * self.stride), pools

    def _by_definition(self, q, k, v, valid, causal: bool):
        (B, S), slots = k.shape[:2], count(k.shape[1], self.kernel, self.stride)
        member = np.arange(slots)[:, None] * self.stride + np.arange(self.kernel)  # (slots, kernel)
        exists = jnp.asarray(member < S)
        there = exists & (jnp.ones((B, S), bool) if valid is None else valid)[:, np.minimum(member, S - 1)]
        keys, values = (self._pooled(x[:, np.minimum(member, S - 1)], there, i) for i, x in enumerate((k, v)))
        apart = member - np.arange(S)[:, None, None]  # (T, slots, kernel)
        near = (apart <= 0) & (apart >= -self.reach) if causal else (abs(apart) <= self.reach) | (member >= S)
        seen = near.all(2) & there.any(2)[:, None]
        times = q.shape[2] // k.shape[2]
        keys, values = (jnp.repeat(x, times, 2) for x in (keys, values))
        head = lambda q, k, v, seen: softmax_average(q @ k.T * self.size.head**-0.5, seen, v)
        return jax.vmap(jax.vmap(head, (1, 1, 1, None), 1))(q, keys, values, seen)

    @staticmethod
    def limit(length: int):
        return {"window": length, "reach": 0}

    def cost(self, T: int, S: int) -> Cost:
        first = super().cost(T, S)
        if not self.reach:
            return first
        H, N, K, slots = self.size.head, self.size.heads, self.size.key_heads, count(S, self.kernel, self.stride)
        blocks = self._second_blocks(S, slots)
        pattern = self._seen(S, False)
        pairs, learned = live_pairs(pattern, S, slots, *blocks), 0 if self.weigh is None else slots * self.kernel
        projected = 2 * S * self.size.dim * (N + 2 * K) * H
        return Cost(
            flops=first.flops + 4 * H * pairs + (projected + 8 * learned * H * K) / N,
            memory=max(first.memory, largest_array(pattern, S, slots, H, blocks), slots * self.kernel * H),
            state=first.state + 2 * H * (self.kernel + self._ring(S)),
        )

    def _ring(self, length: int) -> int:
        """Pools that decoding keeps: those in reach and one that has just been left."""
        return min(count(length, self.kernel, self.stride), self.reach // self.stride + 2)

    def init_cache(self, B: int, length: int, dtype=jnp.float32):
        cache = super().init_cache(B, length, dtype)
        if not self.reach:
            return cache
        rows = lambda number: jnp.zeros((2, B, number, self.size.key_heads, self.size.head), dtype)
        return cache | {"newest": rows(self.kernel), "pools": rows(self._ring(length))}

    decode_heads_several = MultiHead.decode_heads_several

    def decode_heads(self, cache, call: Call):
        """The second level keeps the newest keys and values until a pool is full, and a ring of pools."""
        at = cache["seen"]
        second = {name: cache[name] for name in cache if name in ("newest", "pools")}
        first = {name: cache[name] for name in cache if name not in second}
        y, first, carry = super().decode_heads(first, call)
        if not self.reach:
            return y, first, carry
        q, *new = (x[:, 0] for x in self._projected(y[:, None]))
        newest = jnp.concatenate([second["newest"][:, :, 1:], jnp.stack(new)[:, :, None]], 2)
        there = jnp.ones((1, 1, self.kernel), bool)
        made = jnp.stack([self._pooled(x[:, None], there, i)[:, 0] for i, x in enumerate(newest)])
        # Pool c is full at position c stride + kernel - 1; slot s holds the newest that is s modulo the ring's size.
        slot, latest = jnp.arange(R := second["pools"].shape[2]), (at - self.kernel + 1) // self.stride
        number = latest - (latest - slot) % R
        fresh = (number * self.stride == at - self.kernel + 1) & (number >= 0)
        pools = jnp.where(fresh[:, None, None], made[:, :, None], second["pools"])
        seen = (number >= 0) & (number * self.stride >= at - self.reach)
        one = lambda q, k, v: softmax_average(k @ q * self.size.head**-0.5, seen, v)
        group = jax.vmap(one, (0, None, None))
        grouped = q.reshape(len(q), self.size.key_heads, -1, self.size.head)
        z = jax.vmap(jax.vmap(group, (0, 1, 1)))(grouped, *pools).reshape(y.shape)
        return (y + z).astype(call.v.dtype), first | {"newest": newest, "pools": pools}, carry
