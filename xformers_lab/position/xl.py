import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.errors import Refused
from xformers_lab.nn.size import Size
from xformers_lab.position import Position
from xformers_lab.position._rows import products, row


class Xl(Position):
    """Transformer-XL: sinusoids of the distance, seen by content (Dai et al., 2019, arXiv 1901.02860, section 3.3).

    score = (q_t . k_s + u_n . k_s + (q_t + v_n) . W_n R_(t-s)) / sqrt(H), R_d = (sin(d w_i), cos(d w_i)) with w_i =
    base^(-2i/C), i < C/2. As sines of differences are sums of products, q_t . W R_(t-s) is a dot product of a vector of
    t and one of s, computed block by block; the paper's shift of a T x S array is not needed. Both directions of
    distance differ, so it serves encoders as well (as in XLNet).
    Deviations from the paper: u, v and W are shared by all layers; by default R has as many channels as a head, where
    the paper has dim, which costs as much as all heads' products for every one of them.

    Options:
        base: the longest wavelength is base * 2 pi
        channels: size of R, none: as many as a head has
    """

    key_terms = 1

    def __init__(self, size: Size, *, base: float = 10_000.0, channels: int | None = None, rngs: nnx.Rngs):
        if base <= 1:
            raise Refused(f"base must be above 1, got {base}")
        if channels is not None and (channels < 2 or channels % 2):
            raise Refused(f"channels come as sine and cosine, so they are even and at least 2, got {channels}")
        super().__init__(size, rngs=rngs)
        C = size.head + size.head % 2 if channels is None else channels
        self.waves = tuple(base ** (-2 * i / C) for i in range(C // 2))
        small = lambda: nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (size.heads, size.head)), decays=False)
        self.u, self.v = small(), small()
        scaled = nnx.initializers.lecun_normal()(rngs.params(), (C, size.heads * size.head))
        self.projection = nnx.Param(scaled.reshape(C, size.heads, size.head), decays=True)

    def of_queries(self, q: jax.Array, at: jax.Array) -> jax.Array:
        """(q + v) W, its sine and cosine parts turned by the query's position."""
        q = (q + self.v[...][None, None].astype(q.dtype)).astype(jnp.float32) * self.size.head**-0.5
        sines, cosines = jnp.split(jnp.einsum("btnh,cnh->btnc", q, self.projection[...]), 2, -1)
        angle = (at[:, None] * jnp.array(self.waves)[None])[None, :, None]
        sin, cos = jnp.sin(angle), jnp.cos(angle)
        return jnp.concatenate([sines * sin + cosines * cos, cosines * sin - sines * cos], -1)

    def of_keys(self, k: jax.Array, at: jax.Array) -> jax.Array:
        k = jnp.repeat(k, self.size.heads // k.shape[2], 2)
        scores = jnp.einsum("bsnh,nh->bsn", k, self.u[...].astype(k.dtype), preferred_element_type=jnp.float32)
        return scores[..., None] * self.size.head**-0.5

    def compare(self, of_queries: jax.Array, of_keys: jax.Array, first: jax.Array) -> "Turned":
        return Turned(of_queries, of_keys[..., 0], first, self.waves)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Turned:
    """Scores to add: a query's vector (T, C) times the waves at the key's position, and the key's own score (S,)."""

    queries: jax.Array
    keys: jax.Array
    first: jax.Array
    waves: tuple[float, ...] = dataclasses.field(metadata={"static": True})

    def __call__(self, q_at: jax.Array, k_at: jax.Array) -> jax.Array:
        angle = k_at[..., None] * jnp.array(self.waves).reshape(*[1] * k_at.ndim, -1)
        waves = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)
        scores = products(self.queries[row(q_at, self.first, self.queries)], waves, q_at, k_at)
        return scores + self.keys[jnp.clip(k_at, 0, len(self.keys) - 1)]
