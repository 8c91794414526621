import jax
from flax import nnx

from xformers_lab.errors import Refused
from xformers_lab.nn.embedding import marked
from xformers_lab.nn.size import Size
from xformers_lab.position import Position
from xformers_lab.position._waves import waves


class Sinusoidal(Position):
    """Fixed sines and cosines added to the embeddings (Vaswani et al., 2017, arXiv 1706.03762, section 3.5).

    Channel 2i holds sin(t / base^(2i/D)), channel 2i + 1 the cosine. Tokens are of unit size, as the paper's are by its
    sqrt(D) (section 3.4); the sum is divided by sqrt(3/2), which brings it back to that.

    Options:
        base: the longest wavelength is base * 2 pi
    """

    embeds = True
    adds_waves = True

    def __init__(self, size: Size, *, base: float = 10_000.0, rngs: nnx.Rngs):
        if base <= 1:
            raise Refused(f"base must be above 1, got {base}")
        super().__init__(size, rngs=rngs)
        self.base = base

    def embed(self, x: jax.Array, at: jax.Array, *, valid: jax.Array | None = None) -> jax.Array:
        return marked(x, waves(at, self.size.dim, self.base))
