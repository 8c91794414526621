from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention import Call, Complexity, Cost, MultiHead, why_not
from xformers_lab.errors import Refused
from xformers_lab.nn.absent import Absent, Same
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.initial_scale import scale_init
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.size import Size

# Positions whose running sums are one product with a triangle of ones.
CHUNK = 64


class Average(MultiHead):
    """Average attention network (Zhang, Xiong and Su, 2018, arXiv 1805.00631).

    g_t = FFN(mean_(s <= t) x_s), (i_t, f_t) = sigmoid(W [x_t; g_t]), out_t = i_t * x_t + f_t * g_t. Every position so
    far weighs the same; a feed-forward network and gates do the rest. Not causally, the mean is that of all positions.

    The mean counts valid positions only; a query that sees none gives zeros.
    Deviations from the paper: none; it has neither heads nor projections, so heads and kv_heads change nothing.

    Options:
        widen: hidden units of the feed-forward network, for each of D channels
    """

    kind = "without attention"
    exact = True
    complexity = Complexity(
        time="O(T D^2)",
        memory="O(T D)",
        decoding="a sum of D numbers and a count, whatever the length",
    )
    refuses: ClassVar = {
        "bias": "it has no scores",
        "map": "its mean is of the block's input, which has no values, and passes a feed-forward network",
    }

    def __init__(self, size: Size, *, widen: int = 4, rngs: nnx.Rngs):
        if widen < 1:
            raise Refused(f"widen must be at least 1, got {widen}")
        super().__init__(size, rngs=rngs)
        D = size.dim
        self.query, self.out = Absent(D, size.dtype), Same()
        self.key, self.value = (Absent(size.key_heads * size.head, size.dtype) for _ in range(2))
        linear = lambda inputs, outputs: Linear(inputs, outputs, dtype=size.dtype, rngs=rngs)
        self.widen, self.grow, self.shrink = widen, linear(D, widen * D), linear(widen * D, D)
        self.gates = linear(2 * D, 2 * D)

    keeps_keys = False

    def scale_init(self, share: float) -> None:
        """Its values are its input; what makes something of their mean is a feed-forward network."""
        scale_init(share, self.grow, self.shrink)

    def attend_heads(self, call: Call):
        if call.bias is not None:
            raise Refused(why_not(self, "bias"))
        x, x_q, valid = call.x, call.queries_input, call.valid
        assert x is not None
        (B, T), S = call.q.shape[:2], x.shape[1]
        counted = jnp.ones((B, S), jnp.float32) if valid is None else valid.astype(jnp.float32)
        x = x if valid is None else jnp.where(valid[:, :, None], x, 0)
        total, count = (_by_definition if call.method == "reference" else _sums)(x, counted, T, call.causal)
        out = self._gated(x_q, (total / jnp.maximum(count, 1)[..., None]).astype(x.dtype))
        out = jnp.where(count[..., None] > 0, out, 0).astype(call.v.dtype)
        return out.reshape(call.q.shape), call.carry, Aux()

    def _gated(self, x, mean):
        g = self.shrink(jax.nn.relu(self.grow(mean)))
        kept, taken = jnp.split(jax.nn.sigmoid(self.gates(jnp.concatenate([x, g.astype(x.dtype)], -1))), 2, -1)
        return kept * x + taken * g

    def cost(self, T: int, S: int) -> Cost:
        D, N = self.size.dim, self.size.heads
        return Cost(flops=(4 * self.widen + 8) * T * D * D / N, memory=T * self.widen * D / N, state=(D + 1) / N)

    def init_cache(self, B: int, length: int, dtype=jnp.float32):
        return {"sum": jnp.zeros((B, self.size.dim), jnp.float32), "seen": jnp.zeros((), jnp.int32)}

    def decode_heads(self, cache, call: Call):
        if call.bias is not None:
            raise Refused(why_not(self, "bias"))
        x = call.x
        assert x is not None
        cache = {"sum": cache["sum"] + x, "seen": cache["seen"] + 1}
        out = self._gated(x, (cache["sum"] / cache["seen"]).astype(x.dtype))
        return out.astype(call.v.dtype).reshape(call.q.shape), cache, call.carry

    def decode_heads_several(self, cache, call: Call):
        if call.bias is not None:
            raise Refused(why_not(self, "bias"))
        x = call.x
        assert x is not None
        total = cache["sum"][:, None] + jnp.cumsum(x, 1, dtype=jnp.float32)
        count = cache["seen"] + 1 + jnp.arange(x.shape[1])
        out = self._gated(x, (total / count[:, None]).astype(x.dtype))
        cache = {"sum": total[:, -1], "seen": count[-1]}
        return out.astype(call.v.dtype).reshape(call.q.shape), cache


def _sums(x, counted, T: int, causal: bool):
    """Sums (B, T, D) of x (B, S, D) over what each of T queries sees, and how many that are (B, T)."""
    B, S, D = x.shape
    if not causal:
        total = jnp.broadcast_to(x.sum(1, dtype=jnp.float32, keepdims=True), (B, T, D))
        return total, jnp.broadcast_to(counted.sum(1, keepdims=True), (B, T))
    C = min(CHUNK, S)
    pad = -S % C
    chunks = jnp.pad(x, ((0, 0), (0, pad), (0, 0))).reshape(B, -1, C, D)
    inside = jnp.einsum("cs,bmsd->bmcd", jnp.tri(C, dtype=x.dtype), chunks, preferred_element_type=jnp.float32)
    ends = inside[:, :, -1]
    total = (inside + (jnp.cumsum(ends, 1) - ends)[:, :, None]).reshape(B, -1, D)[:, :S]
    late = lambda y: jnp.pad(y, [(0, 0), (max(T - S, 0), 0)] + [(0, 0)] * (y.ndim - 2))[:, -T:]
    return late(total), late(jnp.cumsum(counted, 1))


def _by_definition(x, counted, T: int, causal: bool):
    S = x.shape[1]
    seen = jnp.tri(T, S, S - T) if causal else jnp.ones((T, S))
    return jnp.einsum("ts,bsd->btd", seen, x.astype(jnp.float32)), jnp.einsum("ts,bs->bt", seen, counted)
