from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xformers_lab.attention import Call, Complexity, Cost, MultiHead, why_not
from xformers_lab.attention._engine.heads import over_heads
from xformers_lab.attention._engine.linear.recurrence import linear_recurrence
from xformers_lab.attention._engine.slots import attended
from xformers_lab.errors import Refused
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.normalisation import LayerNorm
from xformers_lab.nn.plan import plan_of
from xformers_lab.nn.size import Size

EXACT: dict[str, Any] = {"preferred_element_type": jnp.float32}


class Luna(MultiHead):
    """Luna, linear unified nested attention (Ma et al., 2021, arXiv 2106.01540).

    Y = attention(P, k, v) packs the sequence, out = attention(q, K Y, V Y) unpacks it, and the layer above takes P + Y:
    learned points P in the first layer, what was packed so far in the others. Causally nothing is packed into P; with
    weights a_s = elu(P . k_s / sqrt(H)) + 1 and means over s <= t, c_t = softmax(mean_s (q_t . K v_s) a_s / sqrt(H))
    and out_t = mean_s (c_t . a_s) V v_s.

    Deviations from the paper: keys and values have projections of their own in both attentions (an option of the
    authors' code, which ties them), and P is normalised where it asks, not after it is added to (another option there).
    Layers above the first have points that they do not use.

    Options:
        packed: rows of P
        chunk: positions whose causal products are computed together
    """

    kind = "memory compression"
    exact = False
    accuracy = ": positions exchange nothing that does not pass through P"
    complexity = Complexity(
        time="O(T packed H)",
        memory="O(T (H + packed))",
        decoding="two H x packed matrices",
        time_note=", chunked where causal",
    )
    refuses: ClassVar = {
        "bias": "a packed row has no position",
        "map": "what it unpacks are projections of packed rows, which mix heads and channels of values",
    }

    def __init__(self, size: Size, *, packed: int = 32, chunk: int = 64, rngs: nnx.Rngs):
        if packed < 1:
            raise Refused(f"packed must be at least 1, got {packed}")
        if chunk < 1:
            raise Refused(f"chunk must be at least 1, got {chunk}")
        super().__init__(size, rngs=rngs)
        self.chunk = chunk
        self.points = nnx.Param(jax.random.normal(rngs.params(), (packed, size.dim)), decays=False)
        self.norm = LayerNorm(size.dim, dtype=size.dtype, rngs=rngs)
        linear = lambda width: Linear(size.dim, width, use_bias=False, dtype=size.dtype, rngs=rngs)
        self.pack_query = linear(size.dim)
        self.unpack_key, self.unpack_value = (linear(size.key_heads * size.head) for _ in range(2))

    keeps_keys = False

    @classmethod
    def carries(cls) -> bool:
        return True

    def init_carry(self, T: int, S: int):
        """Of one sequence: P, set by the first layer, and how many layers have run."""
        return {"packed": jnp.zeros(self.points.shape, self.size.dtype), "layers": jnp.int32(0)}

    def initial_carry(self, B: int, T: int, S: int):
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (B, *leaf.shape)), self.init_carry(T, S))

    def attend_heads(self, call: Call):
        if call.bias is not None:
            raise Refused(why_not(type(self), "bias"))
        q, k, v, valid, method, carry = call.q, call.k, call.v, call.valid, call.method, call.carry
        carry = self.initial_carry(q.shape[0], q.shape[1], k.shape[1]) if carry is None else carry
        P, asked = self._asked(carry, k.dtype)
        if call.causal:
            function = jax.checkpoint(self._causal) if method == "attend" else self._causal_by_definition
            keys, values = self._unpacking(v)
            one = lambda q, k, _, own, valid, __: (function(q, k, own[0], own[1], own[2], valid), None)
            own = [jnp.swapaxes(y, 1, 2) for y in (asked, self._repeated(keys), self._repeated(values))]
            out = over_heads(one, q, k, v, own, valid, None, plan=plan_of(self.size))[0]
        else:
            how = {"method": method, "plan": plan_of(self.size)}
            packed = attended(asked, k, v, valid, **how)
            out, P = attended(q, *self._unpacking(packed), **how), P + packed.reshape(P.shape)
        new = {"packed": P, "layers": carry["layers"] + 1}
        return out.astype(v.dtype), jax.tree.map(lambda new, old: new.astype(old.dtype), new, carry), Aux()

    def _asked(self, carry, dtype):
        """P (B, packed, D), and its queries (B, packed, N, H)."""
        first = (carry["layers"] == 0)[:, None, None]
        P = jnp.where(first, self.points[...], carry["packed"])
        return P, self._heads(self.pack_query(self.norm(P)), dtype)

    def _heads(self, y, dtype):
        return y.reshape(*y.shape[:-1], -1, self.size.head).astype(dtype)

    def _unpacking(self, v):
        """Keys and values to unpack, (..., K, H) each, from values or packed values (..., K or N, H)."""
        flat = self._repeated(v).reshape(*v.shape[:-2], -1)
        return [self._heads(linear(flat), v.dtype) for linear in (self.unpack_key, self.unpack_value)]

    def _repeated(self, y):
        """(..., K or N, H) -> (..., N, H)."""
        return jnp.repeat(y, self.size.heads // y.shape[-2], -2)

    def _causal(self, q, k, asked, keys, values, valid):
        """One head: asked (packed, H) are the packing queries, keys and values (S, H) those to unpack."""
        T, H = q.shape
        seen = jnp.ones(len(k), bool) if valid is None else valid
        a, scale = _weights(k, asked, seen).astype(q.dtype), (H**-0.5 / _seen_so_far(seen, T))[:, None]
        keys, values = (jnp.where(seen[:, None], x, 0) for x in (keys, values))
        c = jax.nn.softmax(linear_recurrence(q, keys, a, chunk=self.chunk)[0] * scale, -1).astype(q.dtype)
        out = linear_recurrence(c, a, values, chunk=self.chunk)[0] * scale * H**0.5
        return out.astype(values.dtype)

    def _causal_by_definition(self, q, k, asked, keys, values, valid):
        T, S, H = len(q), len(k), self.size.head
        seen = jnp.tri(T, S, S - T) * (1 if valid is None else valid)
        mean = seen / jnp.maximum(seen.sum(1, keepdims=True), 1)
        a = jax.nn.elu(k @ asked.T / H**0.5) + 1
        c = jax.nn.softmax((q @ keys.T / H**0.5 * mean) @ a, -1)
        return ((c @ a.T * mean) @ values).astype(values.dtype)

    def cost(self, T: int, S: int) -> Cost:
        D, H, N, p = self.size.dim, self.size.head, self.size.heads, self.points.shape[0]
        inside = 2 * p * D * (D + 2 * self.size.key_heads * H) / N
        return Cost(flops=4 * p * H * (S + T) + inside, memory=max(T, S) * max(2 * H, p), state=2 * H * p)

    def init_cache(self, B: int, length: int, dtype=jnp.float32):
        state = jnp.zeros((2, B, self.size.heads, self.size.head, self.points.shape[0]), jnp.float32)
        return {"sums": state, "seen": jnp.zeros((), jnp.int32)}

    def decode_heads(self, cache, call: Call):
        """The sums over all tokens so far of K v_s a_s^T and V v_s a_s^T, one H x packed matrix each for every head."""
        if call.bias is not None:
            raise Refused(why_not(type(self), "bias"))
        q, v = call.q, call.v
        carry = self.initial_carry(len(q), 1, 1) if call.carry is None else call.carry
        P, asked = self._asked(carry, v.dtype)
        k, *new = map(self._repeated, (call.k, *self._unpacking(v)))
        a = jax.nn.elu(jnp.einsum("bnh,bpnh->bnp", k, asked, **EXACT) * self.size.head**-0.5) + 1
        sums, seen = cache["sums"] + jnp.stack(new)[..., None] * a[:, :, None], cache["seen"] + 1
        keys, values = sums / seen
        c = jax.nn.softmax(jnp.einsum("bnh,bnhp->bnp", q, keys, **EXACT) * self.size.head**-0.5, -1)
        out = jnp.einsum("bnp,bnhp->bnh", c, values, **EXACT).astype(v.dtype)
        carry = {"packed": P.astype(carry["packed"].dtype), "layers": carry["layers"] + 1}
        return out, {"sums": sums, "seen": seen}, carry


def _weights(k, asked, seen):
    """(S, packed) of how much of each position goes into each row; zeros for padding."""
    s = jnp.dot(k, asked.T, **EXACT) * k.shape[1] ** -0.5
    return jnp.where(seen[:, None], jax.nn.elu(s) + 1, 0)


def _seen_so_far(seen, T: int):
    """(T,): how many valid positions come up to that of each of T queries at the end, at least 1."""
    S = len(seen)
    total = jnp.cumsum(seen)[np.clip(np.arange(S - T, S), 0, None)]
    return jnp.maximum(total, 1)
