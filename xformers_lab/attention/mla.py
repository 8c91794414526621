import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention import Call, Complexity, Cost
from xformers_lab.attention._base.projected import Projected
from xformers_lab.attention._engine.block_sparse.layout import live_pairs
from xformers_lab.attention._engine.softmax import masked_softmax, same_document
from xformers_lab.errors import Refused
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.normalisation import RMSNorm
from xformers_lab.nn.size import Size


class Mla(Projected):
    """Multi-head latent attention (DeepSeek-AI, 2024, arXiv 2405.04434, section 2.1).

    out_t = sum_s softmax_s((q_t . k_s + p_t . r_s) / sqrt(H + rotary)) v_s, where k_s and v_s of every head are linear
    in one latent vector c_s = RMSNorm(W x_s), and the key r_s, which carries the rotary position, is shared by all
    heads.

    Where queries are few (decoding) the matrices that expand the latent are applied to query and output instead, so no
    key is ever expanded: the same sums in another order. Position rotates p and r alone; kv_heads plays no part.
    Deviations from the paper: the default latent is no wider than all heads together.

    Options:
        latent: size of the latent that keys and values are expanded from; none: four heads', or all there are
        rotary: channels of the key with the position; none: half a head's
        query_latent: size of a latent for queries, 0 for none
    """

    kind = "multi-head"
    exact = True
    documents_apart = True
    complexity = Complexity(
        time="O(T S H)",
        memory="O(S)",
        decoding="one latent and one rotary key per token for all heads",
        memory_note="per row of blocks",
    )

    def __init__(
        self,
        size: Size,
        *,
        latent: int | None = None,
        rotary: int | None = None,
        query_latent: int = 0,
        rngs: nnx.Rngs,
    ):
        N, H, D = size.heads, size.head, size.dim
        self.latent = min(4, N) * H if latent is None else latent
        self.rotary = max(2, H // 4 * 2) if rotary is None else rotary
        if self.latent < 1 or query_latent < 0:
            raise Refused(f"latent must be at least 1 and query_latent 0, got {self.latent} and {query_latent}")
        if self.rotary < 2 or self.rotary % 2:
            raise Refused(f"rotary must be even and at least 2, for positions turn pairs, got {self.rotary}")
        super().__init__(size, rngs=rngs)
        linear = lambda wide, out: Linear(wide, out, use_bias=False, dtype=size.dtype, rngs=rngs)
        norm = lambda wide: RMSNorm(wide, dtype=size.dtype, rngs=rngs)
        self.query_down = linear(D, query_latent) if query_latent else None
        self.query_norm = norm(query_latent) if query_latent else None
        self.query = linear(query_latent or D, N * (H + self.rotary))
        self.down, self.norm = linear(D, self.latent + self.rotary), norm(self.latent)
        self.up = linear(self.latent, N * 2 * H)

    def scale_init(self, share: float) -> None:
        """Of the matrix that expands the latent, the columns of values alone."""
        super().scale_init(share)
        keys, values = self._expanding(self.up.kernel.dtype)
        self.up.kernel[...] = jnp.concatenate([keys, share * values], -1).reshape(self.up.kernel.shape)

    def project(self, x, source, turn_q, turn_k):
        """q (B, T, N, H + rotary), the rotary key (B, S, 1, rotary) and the latent (B, S, 1, latent)."""
        if self.query_down is not None and self.query_norm is not None:
            x = self.query_norm(self.query_down(x))
        q = self.query(x)
        q = q.reshape(*q.shape[:2], self.size.heads, -1)
        q = jnp.concatenate([q[..., : self.size.head], turn_q(q[..., self.size.head :])], -1)
        down = self.down(source)[:, :, None]
        return q, turn_k(down[..., self.latent :]), self.norm(down[..., : self.latent])

    def attend_heads(self, call: Call):
        q, k, v = call.q, call.k[:, :, :1], call.v[:, :, :1]
        if call.method == "reference":
            return self._by_definition(call), call.carry, Aux()
        if call.values is None and self._absorbs(q.shape[1], k.shape[1]):
            return self._absorbed(call.replace(k=k, v=v)), call.carry, Aux()
        (B, S), N, H = v.shape[:2], self.size.heads, self.size.head
        up = self.up.kernel[...].astype(v.dtype)
        expanded = (v.reshape(B * S, -1) @ up).reshape(B, S, N, 2 * H)
        keys = jnp.concatenate([expanded[..., :H], jnp.broadcast_to(k, (B, S, N, k.shape[3]))], -1)
        values = expanded[..., H:] if call.values is None else call.values
        return super().attend_heads(call.replace(k=keys, v=values))

    def values_of(self, call: Call):
        """What every head adds up is expanded from the latent; keys are, too, so that other values leave it."""
        return jnp.einsum("bsc,cnh->bsnh", call.v[:, :, 0], self._expanding(call.v.dtype)[1])

    def with_values(self, call: Call, values) -> Call:
        return call.replace(values=values)

    def _absorbed(self, call: Call):
        """One key head, the latent and the rotary key, for all queries, which are brought into the latent's space."""
        q, k, v, H = call.q, call.k, call.v, self.size.head
        to_key, to_value = self._expanding(q.dtype)
        inside = jnp.einsum("btnh,cnh->btnc", q[..., :H], to_key)
        keys = jnp.concatenate([v, k], -1)
        scale = (keys.shape[3] / q.shape[3]) ** 0.5
        wide = jnp.concatenate([inside, q[..., H:]], -1) * scale
        out, _, _ = super().attend_heads(call.replace(q=wide, k=keys))
        return jnp.einsum("btnc,cnh->btnh", out, to_value)

    def _by_definition(self, call: Call):
        """Every head's keys and values, and all its scores."""
        q, k, v, valid, causal, bias = call.q, call.k[:, :, 0], call.v[:, :, 0], call.valid, call.causal, call.bias
        (_, T, N, _), S, H = q.shape, k.shape[1], self.size.head
        to_key, to_value = self._expanding(v.dtype)
        at, keys = jnp.arange(T)[:, None] + S - T, jnp.arange(S)[None]
        seen = jnp.broadcast_to((keys <= at) | (not causal), (len(q), T, S))
        if call.documents is not None:
            seen = seen & jax.vmap(lambda documents: same_document(documents, at, keys))(call.documents)
        seen = seen if valid is None else seen & valid[:, None]
        out = []
        for n in range(N):
            s = jnp.einsum("bth,bsh->bts", q[:, :, n, :H], v @ to_key[:, n])
            s = (s + jnp.einsum("btr,bsr->bts", q[:, :, n, H:], k)).astype(jnp.float32) / q.shape[3] ** 0.5
            if bias is not None:
                s += jax.tree.map(lambda leaf, n=n: leaf[n], bias)(at, keys)
            values = v @ to_value[:, n] if call.values is None else call.values[:, :, n]
            out.append(masked_softmax(s, seen) @ values)
        return jnp.stack(out, 2).astype(v.dtype)

    def _expanding(self, dtype):
        """The matrices (latent, N, H) from the latent to keys and to values."""
        weight = self.up.kernel[...].astype(dtype).reshape(self.latent, self.size.heads, -1)
        return jnp.split(weight, 2, -1)

    def _absorbs(self, T: int, S: int) -> bool:
        """Whether products with the latent itself cost less than expanding it."""
        H = self.size.head
        return T * self.latent * (H + S) < S * H * (self.latent + T)

    def cost(self, T: int, S: int) -> Cost:
        H, C, R = self.size.head, self.latent, self.rotary
        pairs = live_pairs(self.pattern, T, S, *self.blocks(T, S, causal=False))
        absorbs = self._absorbs(T, S)
        flops = 4 * T * H * C + 2 * pairs * (2 * C + R) if absorbs else 4 * S * C * H + 2 * pairs * (2 * H + R)
        memory = max(self.largest(T, S), S * max(C + R, 2 * H))
        return Cost(flops=flops, memory=memory, state=S * (C + R) / self.size.heads)
