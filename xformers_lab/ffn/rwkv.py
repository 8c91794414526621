import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.ffn import Ffn, hidden_size
from xformers_lab.nn.aux_results import Aux
from xformers_lab.nn.initial_scale import scale_init
from xformers_lab.nn.linear import Linear
from xformers_lab.nn.size import Size
from xformers_lab.nn.token_shift import TokenShift, one_before


class Rwkv(Ffn):
    """RWKV-4's channel mixing: a gated layer that also reads the position before (Peng et al., 2023, arXiv 2305.13048,
    section 3).

        k_t = relu(W_k (m_k * x_t + (1 - m_k) * x_(t-1)))^2
        y_t = sigmoid(W_r (m_r * x_t + (1 - m_r) * x_(t-1))) * (W_v k_t)

    m_k and m_r (D) are learned, W_k and W_v are ratio D wide, W_r is D x D. Before the first position, of a document
    too, and in place of padding stand zeros. Decoding keeps the D numbers of the position before, in every layer.
    Deviations from the paper: W_k, W_v and W_r are drawn as all linear layers are here, where the authors' code begins
        with W_v and W_r of zeros.

    Options:
        ratio: hidden width over model width
    """

    documents_apart = True
    looks_back = True

    def __init__(self, size: Size, *, ratio: float = 4.0, rngs: nnx.Rngs):
        linear = functools.partial(Linear, use_bias=False, dtype=size.dtype, rngs=rngs)
        hidden = hidden_size(size, ratio)
        self.up, self.down = linear(size.dim, hidden), linear(hidden, size.dim)
        self.receptance = linear(size.dim, size.dim)
        self.shift, self.dim = TokenShift(size, {"key": (1, 0), "receptance": (1, 0)}), size.dim

    def scale_init(self, share: float) -> None:
        scale_init(share, self.up, self.down)

    def __call__(
        self,
        x: jax.Array,
        *,
        valid: jax.Array | None = None,
        key: jax.Array | None = None,
        documents: jax.Array | None = None,
    ) -> tuple[jax.Array, Aux]:
        return self._behind(x, one_before(x, valid=valid, documents=documents), valid=valid, key=key), Aux()

    def _behind(self, x: jax.Array, before: jax.Array, **options: jax.Array | None) -> jax.Array:
        """The output of x (B, T, D) behind what stands before each."""
        hidden = jnp.square(jax.nn.relu(self.up(self.shift("key", x, before))))
        open_ = jax.nn.sigmoid(self.receptance(self.shift("receptance", x, before)))
        return open_ * self.last(hidden, **options)

    def init_cache(self, B: int, dtype: Any = jnp.float32) -> jax.Array:
        """The inputs of the position before, (B, D)."""
        return jnp.zeros((B, self.dim), dtype)

    def step(self, x: jax.Array, cache: jax.Array, **tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, cache = self.step_several(x[:, None], cache)
        return y[:, 0], cache

    def step_several(self, x: jax.Array, cache: jax.Array, **tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self._behind(x, one_before(x, first=cache)), x[:, -1].astype(cache.dtype)
