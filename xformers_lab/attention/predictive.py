import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from xformers_lab.attention import Call, Complexity, Cost, MultiHead, ShiftedBias
from xformers_lab.attention._engine.dense import scores
from xformers_lab.attention._engine.heads import over_heads
from xformers_lab.attention._engine.products import products, weighted
from xformers_lab.attention._engine.query_blocks import by_blocks, masked, widened
from xformers_lab.attention._engine.softmax import masked_softmax, softmax_average
from xformers_lab.errors import Refused
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.plan import plan_of
from xformers_lab.nn.size import Size


class Predictive(MultiHead):
    """Predictive attention, later called evolving attention (Wang et al., 2021, arXiv 2102.12895).

    I_l = a A_(l-1) + (1 - a) q k^T / sqrt(H), A_l = b relu(conv(I_l)) + (1 - b) I_l, out = softmax(A_l) v. A
    convolution over the map of queries and keys, whose channels are the heads, predicts the scores of a layer from
    those of the layer below; the first layer is full attention.

    A score bias is added to A and not handed on.
    Deviations from the paper: causally the kernel has no rows for later queries and reads zeros where a query sees no
        key, so that no later key can reach an earlier query; padded rows and columns are zeros to it too.

    Options:
        residual: a, the share of the layer below
        convolved: b, the share of the convolution
        kernel: rows and columns of the convolution, odd
    """

    kind = "prior"
    exact = True
    complexity = Complexity(
        time="O(T S (H + N kernel^2))",
        memory="O(T S)",
        decoding="every key and value and the newest kernel // 2 rows of I",
        memory_note=", for the scores are what layers hand on",
    )
    refuses: ClassVar = {
        "cross": "the convolution reads the rows of neighbouring queries, so the queries must be those of the keys",
    }

    def __init__(self, size: Size, *, residual: float = 0.2, convolved: float = 0.1, kernel: int = 3, rngs: nnx.Rngs):
        for name, share in (("residual", residual), ("convolved", convolved)):
            if not 0 <= share <= 1:
                raise Refused(f"{name} is a share between 0 and 1, got {share}")
        if kernel < 1 or kernel % 2 == 0:
            raise Refused(f"kernel must be odd and at least 1, got {kernel}: try {max(kernel, 0) + 1}")
        super().__init__(size, rngs=rngs)
        self.residual, self.convolved, self.around = residual, convolved, kernel // 2
        self.kernel = nnx.Param(
            nnx.initializers.he_normal()(rngs.params(), (kernel, kernel, size.heads, size.heads)), decays=True
        )
        self.level = nnx.Param(jnp.zeros(size.heads), decays=False)

    keeps_keys = False

    @classmethod
    def carries(cls) -> bool:
        return True

    def init_carry(self, T: int, S: int):
        return jnp.zeros((T, S), jnp.float32)

    def initial_carry(self, B: int, T: int, S: int):
        """The scores of every head, and how many layers there are below."""
        return super().initial_carry(B, T, S), jnp.zeros((), jnp.int32)

    def attend_heads(self, call: Call):
        q, k, v, valid, causal, carry = call.q, call.k, call.v, call.valid, call.causal, call.carry
        (B, T), S = q.shape[:2], k.shape[1]
        if T != S:
            raise Refused(f"predictive reads the scores of neighbouring queries: {T} queries need {T} keys, got {S}")
        below, layers = self.initial_carry(B, T, S) if carry is None else carry
        valid = jnp.ones((B, S), bool) if valid is None else valid
        plan = plan_of(self.size)
        if call.method == "reference":
            new = self._by_definition(q, k, valid, causal, below, layers)
        else:
            readable = valid[:, None, None] & valid[:, None, :, None]
            readable = readable & jnp.tri(T, dtype=bool) if causal else readable
            evolved = jax.checkpoint(lambda s, below: self._evolved(self._blend(s, below), readable, causal))
            dots = functools.partial(_dot_products, causal=causal)
            s = over_heads(dots, q, k, v, None, None, None, plan=plan)[1]
            new = lax.cond(layers == 0, lambda s, below: s, evolved, s, below)

        def attended(q, k, v, s, valid, bias):
            def block(s, at, keys):
                p = masked_softmax(masked(s[:, :keys], at, valid, causal, bias))
                return weighted(p, v[:keys]).astype(v.dtype)

            return by_blocks(block, s, S, causal), None

        def defined(q, k, v, s, valid, bias):
            seen = (jnp.tri(T, dtype=bool) if causal else jnp.ones((T, T), bool)) & valid[None]
            s = s if bias is None else s + bias(jnp.arange(T)[:, None], jnp.arange(S)[None])
            return softmax_average(s, seen, v), None

        one = attended if call.method == "attend" else defined
        out, _ = over_heads(one, q, k, v, new, valid, call.bias, plan=plan)
        return out, (new, layers + 1), Aux()

    def _blend(self, s, below):
        return self.residual * below + (1 - self.residual) * s

    def _evolved(self, blend, readable, causal: bool):
        """A of I (B, N, T, S) where readable (B, 1, T, S) marks what the convolution may read."""
        r = self.around
        kernel = self.kernel[: r + 1] if causal else self.kernel[...]
        return self._add_convolution(blend, jnp.where(readable, blend, 0), kernel, (r, 0 if causal else r))

    def _add_convolution(self, blend, read, kernel, rows: tuple[int, int]):
        columns = (self.around, self.around)
        shape = ("NCHW", "HWIO", "NCHW")
        convolved = lax.conv_general_dilated(read, kernel, (1, 1), (rows, columns), dimension_numbers=shape)
        convolved = jax.nn.relu(convolved + self.level[:, None, None])
        return self.convolved * convolved + (1 - self.convolved) * blend

    def _by_definition(self, q, k, valid, causal: bool, below, layers):
        """A (B, N, T, S), tap by tap."""
        T, r = q.shape[1], self.around
        k = jnp.repeat(k, q.shape[2] // k.shape[2], 2)
        s = jax.vmap(jax.vmap(scores))(jnp.swapaxes(q, 1, 2), jnp.swapaxes(k, 1, 2))
        blend = self.residual * below + (1 - self.residual) * s
        t, u = jnp.arange(T)[:, None], jnp.arange(T)[None]
        there = valid[:, None, :, None] & valid[:, None, None] & ((u <= t) | (not causal))
        read = jnp.pad(jnp.where(there, blend, 0), ((0, 0), (0, 0), (r, r), (r, r)))
        convolved = self.level[:, None, None]
        for down in range(r + 1 if causal else 2 * r + 1):
            for right in range(2 * r + 1):
                tap = read[:, :, down : down + T, right : right + T]
                convolved = convolved + jnp.einsum("bits,io->bots", tap, self.kernel[down, right])
        evolved = self.convolved * jnp.maximum(convolved, 0) + (1 - self.convolved) * blend
        return jnp.where(layers == 0, s, evolved)

    def cost(self, T: int, S: int) -> Cost:
        H, N, r = self.size.head, self.size.heads, self.around
        taps = (2 * r + 1) ** 2
        return Cost(flops=(4 * H + 2 * N * taps) * T * S, memory=T * S, state=(2 * H + r) * S)

    @staticmethod
    def limit(length: int):
        """The first layer predicts nothing."""
        return {}

    def init_cache(self, B: int, length: int, dtype=jnp.float32):
        rows = jnp.zeros((B, self.size.heads, self.around, length), jnp.float32)
        return super().init_cache(B, length, dtype) | {"rows": rows}

    def decode_heads(self, cache, call: Call):
        pairs, q, bias = (("k", call.k), ("v", call.v)), call.q, call.bias
        k, v = (jnp.concatenate([cache[name][:, 1:], new[:, None]], 1) for name, new in pairs)
        (B, S), N, seen = k.shape[:2], q.shape[1], cache["seen"] + 1
        below, layers = self.initial_carry(B, 1, S) if call.carry is None else call.carry
        valid = jnp.arange(S) >= S - seen
        dots, plan = functools.partial(_dot_products, causal=True), plan_of(self.size)
        s = over_heads(dots, q[:, None], k, v, None, None, None, plan=plan)[1]
        blend = self._blend(s, below)
        # Positions have moved on by one since the rows of earlier queries were kept.
        kept = jnp.pad(cache["rows"][..., 1:], ((0, 0), (0, 0), (0, 0), (0, 1)))
        read = jnp.concatenate([kept, jnp.where(valid, blend, 0)], 2)
        evolved = self._add_convolution(blend, read, self.kernel[: self.around + 1], (0, 0))
        new = jnp.where(layers == 0, s, evolved)

        if bias is not None:  # the newest row stands last, whatever its position
            bias = ShiftedBias(bias, jnp.full(N, S - seen))

        def one(q, k, v, s, of_sample, bias):
            s = s if bias is None else s + bias(jnp.full((1, 1), S - 1), jnp.arange(S)[None])
            return softmax_average(s, valid, v), None

        out = over_heads(one, q[:, None], k, v, new, None, bias, plan=plan)[0]
        cache = {"k": k, "v": v, "seen": seen, "rows": read[:, :, 1:]}
        return out.reshape(B, N, -1), cache, (new, layers + 1)


def _dot_products(q, k, v, *_, causal: bool):
    """Scores (T, S), zeros among those that no query may see."""
    S = k.shape[0]
    block = lambda q, at, keys: widened(products(q * q.shape[-1] ** -0.5, k[:keys]), S)
    return q, by_blocks(block, q, S, causal)
