import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from xformers_lab.errors import Refused
from xformers_lab.ffn import Ffn
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.initial_scale import scale_init
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.normalisation import LayerNorm
from xformers_lab.nn.size import Size


class ProductKey(Ffn):
    """Product-key memory: a sparse read of many learned vectors (Lample et al., 2019, arXiv 1907.05242).

    y = sum over the best `top` slots of softmax(score) value. A slot is a pair (i, j) of two lists of `side` sub-keys,
    its score is q_1 . a_i + q_2 . b_j, so the best of side^2 slots are among the best of either list.
    The query is normalised over its channels, where the paper normalises over the batch, so that a token's output
    depends on itself alone.

    Options:
        side: sub-keys per half; there are side^2 slots
        top: slots that one read sums up
        reads: independent queries per token, summed
        key: channels of a query
    """

    documents_apart = True

    def __init__(self, size: Size, *, side: int = 64, top: int = 16, reads: int = 4, key: int = 64, rngs: nnx.Rngs):
        if side < 1 or reads < 1 or not 1 <= top <= side:
            raise Refused(f"top must be from 1 to side and reads at least 1: top={top}, side={side}, reads={reads}")
        if key < 2 or key % 2:
            raise Refused(f"key must be even and at least 2, its halves score apart, got {key}")
        self.side, self.top, self.reads = side, top, reads
        self.query = Linear(size.dim, reads * key, dtype=size.dtype, rngs=rngs)
        self.norm = LayerNorm(key, rngs=rngs)
        draw = lambda std, *shape: nnx.Param(nnx.initializers.normal(std)(rngs.params(), shape), decays=True)
        self.keys = draw((key // 2) ** -0.5, 2, reads, side, key // 2)
        self.values = draw(size.dim**-0.5, side * side, size.dim)

    def scale_init(self, share: float) -> None:
        scale_init(share, self.values)

    def __call__(
        self, x: jax.Array, *, valid: jax.Array | None = None, key: jax.Array | None = None
    ) -> tuple[jax.Array, Aux]:
        B, T, D = x.shape
        q = self.query(x).reshape(B * T, self.reads, 2, -1).astype(jnp.float32)
        q = self.norm(q.reshape(B * T, self.reads, -1)).reshape(q.shape)
        scores = jnp.einsum("nrsd,srkd->snrk", q, self.keys[...])
        (a, i), (b, j) = lax.top_k(scores[0], self.top), lax.top_k(scores[1], self.top)
        pairs = (a[..., :, None] + b[..., None, :]).reshape(B * T, self.reads, -1)
        score, at = lax.top_k(pairs, self.top)
        slot = jnp.take_along_axis(i, at // self.top, -1) * self.side + jnp.take_along_axis(j, at % self.top, -1)
        weight = jax.nn.softmax(score).astype(x.dtype)
        read = lambda slot, weight: weight.reshape(-1) @ self.values[slot.reshape(-1)].astype(x.dtype)
        return jax.vmap(read)(slot, weight).reshape(B, T, D), Aux()
