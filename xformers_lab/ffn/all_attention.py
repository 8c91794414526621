import functools

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.errors import Refused
from xformers_lab.ffn import Ffn
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.initial_scale import scale_init
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.size import Size


class AllAttention(Ffn):
    """The feed-forward layer as attention to persistent vectors (Sukhbaatar et al., 2019, arXiv 1907.01470, section
    3.1).

    y_t = W_o concat_h softmax(q_th M_h^T / sqrt(H)) N_h with q_t = W_q x_t and learned keys M_h and values N_h
    (vectors, H), the same at every position. It stands behind any attention; the paper goes one step further
    and joins both into one softmax, which is attention=all_attention with ffn=none.

    Options:
        vectors: persistent keys and values per head (none: 4 D, as many as a feed-forward layer has hidden units)
    """

    documents_apart = True

    def __init__(self, size: Size, *, vectors: int | None = None, rngs: nnx.Rngs):
        vectors = 4 * size.dim if vectors is None else vectors
        if vectors < 1:
            raise Refused(f"vectors must be at least 1, got {vectors}; ffn=none has no such layer")
        linear = functools.partial(Linear, use_bias=False, dtype=size.dtype, rngs=rngs)
        self.query, self.down = linear(size.dim, size.heads * size.head), linear(size.heads * size.head, size.dim)
        draw = lambda: jax.random.normal(rngs.params(), (size.heads, vectors, size.head))
        self.keys, self.values, self.size = nnx.Param(draw(), decays=True), nnx.Param(draw(), decays=True), size

    def scale_init(self, share: float) -> None:
        scale_init(share, self.values, self.down)

    def __call__(
        self, x: jax.Array, *, valid: jax.Array | None = None, key: jax.Array | None = None
    ) -> tuple[jax.Array, Aux]:
        q = self.query(x).reshape(*x.shape[:2], self.size.heads, self.size.head) * self.size.head**-0.5
        keys, values = self.keys[...].astype(x.dtype), self.values[...].astype(x.dtype)
        p = jax.nn.softmax(jnp.einsum("btnh,nmh->bntm", q, keys, preferred_element_type=jnp.float32))
        y = jnp.einsum("bntm,nmh->btnh", p.astype(x.dtype), values)
        return self.last(y.reshape(*x.shape[:2], -1), valid=valid, key=key), Aux()
