import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.errors import Refused
from xformers_lab.nn.size import Size
from xformers_lab.position import Position

# Of the logarithm's scale c at the start, as in the paper.
START = 0.1


class Fire(Position):
    """FIRE: a learned function of a distance that is measured by how far the query stands (Li et al., 2023, arXiv
    2310.04418, equations 7 and 8).

    score + f_n(log(c |t - s| + 1) / log(c max(t, L) + 1)), where f gives every head a number: a hidden layer of `width`
    rectified linear units, and a linear one. c and the threshold L are learned. Once t is beyond L, what f reads is
    between 0 and 1 however long the sequence is. It serves all layers.

    It costs O(T S width) of each head, in which nothing is a matrix product. t is a place in the row.
    Deviations from the paper: heads have hidden units of their own, for each is run by itself; the distance counts
        alike on both sides where both are seen.

    Options:
        width: hidden units of f
        threshold: L at the start
    """

    by_place = True

    def __init__(self, size: Size, *, width: int = 32, threshold: float = 512.0, rngs: nnx.Rngs):
        if width < 1:
            raise Refused(f"width must be at least 1, got {width}")
        if threshold <= 0:
            raise Refused(f"threshold must be above 0, got {threshold:g}")
        super().__init__(size, rngs=rngs)
        self.threshold = threshold
        # As PyTorch draws linear layers, which the paper uses: of 1 input, and of `width`.
        drawn = lambda inputs: nnx.Param(_uniform(rngs, (size.heads, width), inputs), decays=False)
        self.slopes, self.offsets, self.weights = drawn(1), drawn(1), drawn(width)
        self.offset = nnx.Param(_uniform(rngs, (size.heads,), width), decays=False)
        self.scale, self.share_of_threshold = (nnx.Param(jnp.asarray(x), decays=False) for x in (START, 1.0))

    def bias(self) -> "Function":
        wide = lambda x: jnp.broadcast_to(jnp.abs(x), (self.size.heads,))
        far = self.threshold * self.share_of_threshold[...]
        hidden = self.slopes[...], self.offsets[...], self.weights[...]
        return Function(*hidden, self.offset[...], wide(self.scale[...]), wide(far))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Function:
    """Scores to add: f of the progress from the query to the key."""

    slopes: jax.Array
    offsets: jax.Array
    weights: jax.Array
    offset: jax.Array
    scale: jax.Array
    threshold: jax.Array

    def __call__(self, q_at: jax.Array, k_at: jax.Array) -> jax.Array:
        size = jnp.log1p(self.scale * jnp.maximum(q_at, self.threshold))
        progress = jnp.log1p(self.scale * jnp.abs(q_at - k_at)) / size
        # Unit by unit, so that no array is `width` times as large as the scores.
        score = self.offset
        for unit in range(self.slopes.shape[-1]):
            score += self.weights[unit] * jax.nn.relu(self.slopes[unit] * progress + self.offsets[unit])
        return score


def _uniform(rngs: nnx.Rngs, shape: tuple[int, ...], inputs: int) -> jax.Array:
    most = inputs**-0.5
    return jax.random.uniform(rngs.params(), shape, minval=-most, maxval=most)
