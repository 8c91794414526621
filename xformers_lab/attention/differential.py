from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.attention import Complexity, Cost, KeepsKeys
from xformers_lab.attention._engine.softmax import masked_softmax, same_document
from xformers_lab.attention.full import Full
from xformers_lab.errors import Refused
from xformers_lab.nn.layer_number import first_layer
from xformers_lab.nn.size import Size

EPSILON = 1e-5


class Differential(KeepsKeys, Full):
    """Differential attention (Ye et al., 2024, arXiv 2410.05258).

    out_t = (1 - lambda_init) RMSNorm(sum_s (p1_ts - lambda p2_ts) v_s), p1 and p2 the softmaxes of the two halves of a
    head's query and key, lambda = exp(a1 . b1) - exp(a2 . b2) + lambda_init with learned a and b, one for all heads.

    A bias is added to the scores of both halves.
    Deviations from the paper: lambda_init is the same in every layer unless it is depth. A head's halves are its first
    and third, and its second and fourth quarter of channels, because rotary positions turn channels that are half a
    head apart.

    Options:
        lambda_init: what is taken of the second softmax before training; depth: as in the paper, 0.8 - 0.6 exp(-0.3
            (l - 1)) in layer l: 0.2 in the first, 0.56 in the fourth, 0.8 at last
    """

    kind = "multi-head"
    exact = True
    complexity = Complexity(
        time="O(T S H)",
        memory="O(S)",
        decoding="every key and value",
        time_note=", as two softmaxes over heads of half the size",
        memory_note="per row of blocks",
    )

    def __init__(self, size: Size, *, lambda_init: float | Literal["depth"] = 0.5, rngs: nnx.Rngs):
        if size.head % 4:
            raise Refused(f"a head is split into quarters, and one of {size.head} (dim / heads) has none")
        if isinstance(lambda_init, float) and not 0 <= lambda_init < 1:
            raise Refused(f"lambda_init must be at least 0 and below 1, got {lambda_init:g}")
        super().__init__(size, rngs=rngs)
        self.lambda_init = lambda_init
        if lambda_init == "depth":
            self.layer = first_layer()
        self.vectors = nnx.Param(0.1 * jax.random.normal(rngs.params(), (2, 2, size.head // 2)), decays=False)
        self.gain = nnx.Param(jnp.ones(size.head), decays=False)

    def first_share(self):
        """lambda_init of this layer."""
        if isinstance(self.lambda_init, str):
            return 0.8 - 0.6 * jnp.exp(-0.3 * self.layer[...])
        return self.lambda_init

    def per_head(self):
        N = self.size.heads
        first, second = jnp.exp(self.vectors[...].prod(0).sum(-1))
        balance = first - second + self.first_share()
        return {"balance": jnp.broadcast_to(balance, N), "gain": jnp.broadcast_to(self.gain[...], (N, self.size.head))}

    def finished(self, mean, *, gain):
        size = jax.lax.rsqrt((mean**2).mean(-1, keepdims=True) + EPSILON)
        return (1 - self.first_share()) * gain * mean * size

    def attend(self, q, k, v, *, valid=None, documents=None, causal, bias=None, balance):
        # Values in float32: the difference of two rounded outputs would keep few of their bits.
        options = {"valid": valid, "documents": documents, "causal": causal, "bias": bias}
        wide = v.astype(jnp.float32)
        first, second = (
            super(Differential, self).attend(q, k, wide, **options) for q, k in zip(_halves(q), _halves(k), strict=True)
        )
        return first - balance * second

    def reference(self, q, k, v, *, valid=None, documents=None, causal, bias=None, balance):
        T, S, H = q.shape[0], k.shape[0], q.shape[1]
        at, keys = jnp.arange(T)[:, None] + S - T, jnp.arange(S)[None]
        seen = (keys <= at) | (not causal)
        seen = seen if documents is None else seen & same_document(documents, at, keys)
        seen = seen if valid is None else seen & valid
        score = 0 if bias is None else bias(at, keys)
        weights = jnp.zeros((T, S))
        for half, part in enumerate((1.0, -balance)):
            mine = jnp.arange(H) // (H // 4) % 2 == half
            s = jnp.dot(q * mine, (k * mine).T, preferred_element_type=jnp.float32) / (H / 2) ** 0.5 + score
            weights += part * masked_softmax(s, seen)
        return weights @ v.astype(jnp.float32)

    def cost(self, T: int, S: int) -> Cost:
        one = super().cost(T, S)
        return Cost(flops=1.5 * one.flops, memory=one.memory, state=one.state)


def _halves(x):
    """(T, H) -> the two heads of (T, H / 2)."""
    a, b, c, d = jnp.split(x, 4, -1)
    return jnp.concatenate([a, c], -1), jnp.concatenate([b, d], -1)
