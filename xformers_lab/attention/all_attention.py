import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention import Complexity, Cost
from xformers_lab.attention._base.patterned import Patterned
from xformers_lab.attention._engine.pattern import All
from xformers_lab.errors import Refused
from xformers_lab.nn.initial_scale import scale_init
from xformers_lab.nn.size import Size


class AllAttention(Patterned):
    """All-attention: persistent vectors join the keys, so that no feed-forward layer is needed (Sukhbaatar et al.,
    2019, arXiv 1907.01470, equations 9 and 10).

    out_t = sum_s softmax_s(q_t . [M; k]_s / sqrt(H)) [N; v]_s, one softmax over the keys seen and the learned keys M
    and values N (vectors, H), which every query sees. Use it with ffn=none.

    A bias says nothing of persistent vectors, for they stand nowhere. A query that sees no key gives zeros, as
    everywhere in the lab, not what the persistent vectors say.
    Deviations from the paper: grouped-query heads share the vectors of their group.

    Options:
        vectors: persistent keys and values per head (none: 4 D, as many as a feed-forward layer has hidden units)
    """

    kind = "full"
    own_values = True
    exact = True
    complexity = Complexity(
        time="O(T (S + vectors) H)",
        memory="O(S + vectors)",
        decoding="every key and value",
        memory_note="per row of blocks",
    )

    def __init__(self, size: Size, *, vectors: int | None = None, rngs: nnx.Rngs):
        self.vectors = 4 * size.dim if vectors is None else vectors
        if self.vectors < 1:
            raise Refused(f"vectors must be at least 1, got {self.vectors}; attention=full has none")
        super().__init__(size, All(), rngs=rngs)
        draw = lambda: jax.random.normal(rngs.params(), (size.key_heads, self.vectors, size.head))
        self.keys, self.values = nnx.Param(draw(), decays=True), nnx.Param(draw(), decays=True)

    def scale_init(self, share: float) -> None:
        super().scale_init(share)
        scale_init(share, self.values)

    def per_head(self):
        times = self.size.heads // self.size.key_heads
        return {name: jnp.repeat(getattr(self, name)[...], times, 0) for name in ("keys", "values")}

    def attend(self, q, k, v, *, valid=None, causal, bias=None, keys, values):
        return self._joined(super().attend, q, k, v, valid, causal, bias, keys, values)

    def reference(self, q, k, v, *, valid=None, causal, bias=None, keys, values):
        return self._joined(super().reference, q, k, v, valid, causal, bias, keys, values)

    def _joined(self, attend, q, k, v, valid, causal: bool, bias, keys, values):
        """Persistent vectors stand before all keys, where every causal query sees them."""
        T, S = q.shape[0], k.shape[0]
        wide = None if valid is None else jnp.concatenate([jnp.ones(self.vectors, bool), valid])
        join = lambda first, then: jnp.concatenate([first.astype(then.dtype), then])
        bias = None if bias is None else Nowhere(bias, jnp.float32(self.vectors))
        out = attend(q, join(keys, k), join(values, v), valid=wide, causal=causal, bias=bias)
        valid = jnp.ones(S, bool) if valid is None else valid
        if causal:
            sees = (jnp.cumsum(valid)[jnp.clip(jnp.arange(T) + S - T, 0)] > 0) & (jnp.arange(T) + S - T >= 0)
        else:
            sees = jnp.broadcast_to(valid.any(), (T,))
        return jnp.where(sees[:, None], out, 0).astype(v.dtype)

    def attend_cached(self, q, keys, values, at, positions, seen, bias):
        own = lambda name, then: jnp.broadcast_to(getattr(self, name)[...].astype(then.dtype), (len(then), *shape))
        shape = self.keys.shape
        keys, values = (
            jnp.concatenate([own(name, then), then], 2) for name, then in (("keys", keys), ("values", values))
        )
        positions = jnp.concatenate([jnp.arange(self.vectors), positions + self.vectors])
        seen = jnp.concatenate([jnp.ones((len(seen), self.vectors), bool), seen], 1)
        if bias is not None:
            bias = Nowhere(bias, jnp.full(q.shape[1], self.vectors, jnp.float32))
        return super().attend_cached(q, keys, values, at + self.vectors, positions, seen, bias)

    def cost(self, T: int, S: int) -> Cost:
        own = super().cost(T, S + self.vectors)
        return dataclasses.replace(own, state=own.state - 2 * self.vectors * self.size.head)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Nowhere:
    """A bias of keys behind the first `rows`, which stand nowhere: 0 for those."""

    bias: Any
    rows: jax.Array

    def __call__(self, q_at, k_at):
        rows = self.rows.astype(q_at.dtype)
        own = self.bias(q_at - rows, jnp.maximum(k_at - rows, 0))
        return jnp.where(k_at >= rows, own, 0)
