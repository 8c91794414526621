import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.errors import Refused
from xformers_lab.nn.embedding import ADDED, marked
from xformers_lab.nn.size import Size
from xformers_lab.position import Position


class Conv(Position):
    """A depthwise convolution of the embeddings tells tokens where they are, by what stands beside them and by the
    zeros before the first (conditional positions: Chu et al., 2021, arXiv 2102.10882; on text: Mohamed et al., 2019,
    arXiv 1904.11660).

    x_t + sum_j w_j * x_(t+j), over the `width` tokens around t, or in a causal model the last `width`, divided by
    sqrt(3/2), which keeps its size (nn/embedding.py). Padding counts as zeros.
    Deviations from the papers: one convolution on the embeddings, no block of several before the first layer nor one
    behind it.

    Options:
        width: tokens that a convolution sees
    """

    embeds = True

    def __init__(self, size: Size, *, width: int = 3, causal: bool, rngs: nnx.Rngs):
        if width < 2 or (not causal and width % 2 == 0):
            raise Refused(
                f"width must be at least 2, and odd where both sides are seen, got {width}: use {max(3, width + 1)}"
            )
        super().__init__(size, rngs=rngs)
        self.before = width - 1 if causal else width // 2
        self.after = width - 1 - self.before
        draw = nnx.initializers.normal(ADDED * width**-0.5)
        self.weights = nnx.Param(draw(rngs.params(), (width, size.dim)), decays=False)

    def embed(self, x: jax.Array, at: jax.Array, *, valid: jax.Array | None = None) -> jax.Array:
        T, real = x.shape[1], x if valid is None else jnp.where(valid[..., None], x, 0)
        wide = jnp.pad(real, [(0, 0), (self.before, self.after), (0, 0)])
        weights = self.weights[:, None, None].astype(x.dtype)
        return marked(x, sum((wide[:, j : j + T] * weights[j] for j in range(len(weights))), jnp.zeros_like(x)))
