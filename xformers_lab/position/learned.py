import jax
from flax import nnx

from xformers_lab.nn.embedding import ADDED, START, marked
from xformers_lab.nn.size import Size
from xformers_lab.position import Position


class Learned(Position):
    """A learned vector for every position, added to the embeddings (Gehring et al., 2017, arXiv 1705.03122).

    (x_t + p_t) / sqrt(3/2): with p half of x in mean square at the start, the sum has the size of x (nn/embedding.py).
    """

    embeds = True
    tables = ("table",)

    def __init__(self, size: Size, *, rngs: nnx.Rngs):
        super().__init__(size, rngs=rngs)
        self.scale = ADDED / START
        self.table = nnx.Param(nnx.initializers.normal(START)(rngs.params(), (size.length, size.dim)), decays=False)

    def embed(self, x: jax.Array, at: jax.Array, *, valid: jax.Array | None = None) -> jax.Array:
        return marked(x, self.table[at] * self.scale)
