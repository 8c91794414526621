import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.nn.size import Size
from xformers_lab.position import Position


class Alibi(Position):
    """ALiBi: scores fall linearly with distance, at a fixed slope per head (Press et al., 2021, arXiv 2108.12409).

    score - slope_n |t - s| with slope_n = 2^(-8 n / N) for n = 1..N where N is a power of two; otherwise the slopes of
    the power of two below N, and then every second one of the power of two above it. The paper is causal; here
    the distance counts alike on both sides.
    """

    def __init__(self, size: Size, *, rngs: nnx.Rngs):
        super().__init__(size, rngs=rngs)
        self.slopes = tuple(slopes(size.heads))

    def bias(self) -> "Fall":
        return Fall(jnp.asarray(self.slopes, jnp.float32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fall:
    """Scores to add: -slope times the distance."""

    slope: jax.Array

    def __call__(self, q_at: jax.Array, k_at: jax.Array) -> jax.Array:
        return -self.slope * jnp.abs(q_at - k_at)


def slopes(heads: int) -> list[float]:
    """One slope per head, the steepest first within each power of two."""
    whole = 2 ** math.floor(math.log2(heads))
    below = [2 ** (-8 * n / whole) for n in range(1, whole + 1)]
    above = [2 ** (-8 * n / (2 * whole)) for n in range(1, 2 * whole + 1)]
    return below + above[::2][: heads - whole]
