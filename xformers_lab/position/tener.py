import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.errors import Refused
from xformers_lab.nn.size import Size
from xformers_lab.position import Position
from xformers_lab.position.xl import Turned


class Tener(Position):
    """TENER: sinusoids of the distance with its direction, and scores that are not scaled (Yan et al., 2019, arXiv
    1911.04474, sections 3.2 and 3.3).

    score = q_t . k_s + u_n . k_s + (q_t + v_n) . R_(t-s), R_d = (sin(d w_i), cos(d w_i)) with w_i = base^(-2i/H), i <
    H/2. It is position=xl without the matrix in front of R, so that sines tell the two directions apart as they are,
    and without the division by sqrt(H), for sharper weights. As there, a dot product of a vector of t and one of s is
    computed block by block, O(T S H), and a T x S array is never built.

    Deviations from the paper: keys are projected, for that is attention's; R's sines and cosines come after each other,
    not in turn; u and v are shared by all layers.

    Options:
        base: the longest wavelength is base * 2 pi
    """

    key_terms = 1

    def __init__(self, size: Size, *, base: float = 10_000.0, rngs: nnx.Rngs):
        if base <= 1:
            raise Refused(f"base must be above 1, got {base}")
        if size.head % 2:
            raise Refused(f"heads have {size.head} channels, and here they come as sine and cosine: use an even size")
        super().__init__(size, rngs=rngs)
        H = size.head
        # Mechanisms divide products by this.
        self.share = H**0.5
        self.waves = tuple(base ** (-2 * i / H) for i in range(H // 2))
        small = lambda: nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (size.heads, H)), decays=False)
        self.u, self.v = small(), small()

    def of_queries(self, q: jax.Array, at: jax.Array) -> jax.Array:
        """q + v, its sine and cosine parts turned by the query's position."""
        sines, cosines = jnp.split((q + self.v[...][None, None].astype(q.dtype)).astype(jnp.float32), 2, -1)
        angle = (at[:, None] * jnp.array(self.waves)[None])[None, :, None]
        sin, cos = jnp.sin(angle), jnp.cos(angle)
        return jnp.concatenate([sines * sin + cosines * cos, cosines * sin - sines * cos], -1)

    def of_keys(self, k: jax.Array, at: jax.Array) -> jax.Array:
        k = jnp.repeat(k, self.size.heads // k.shape[2], 2)
        u = self.u[...].astype(k.dtype)
        return jnp.einsum("bsnh,nh->bsn", k, u, preferred_element_type=jnp.float32)[..., None]

    def compare(self, of_queries: jax.Array, of_keys: jax.Array, first: jax.Array) -> Turned:
        return Turned(of_queries, of_keys[..., 0], first, self.waves)
