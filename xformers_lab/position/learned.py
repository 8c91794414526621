import jax
from flax import nnx

from xformers_lab.nn.size import Size
from xformers_lab.position import Position


class Learned(Position):
    """A learned vector for every position, added to the embeddings (Gehring et al., 2017, arXiv 1705.03122)."""

    embeds = True

    def __init__(self, size: Size, *, rngs: nnx.Rngs):
        super().__init__(size, rngs=rngs)
        self.table = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (size.length, size.dim)))

    def embed(self, x: jax.Array, at: jax.Array, *, valid: jax.Array | None = None) -> jax.Array:
        return x + self.table[at].astype(x.dtype)
