import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.errors import Refused
from xformers_lab.nn.size import Size
from xformers_lab.position import Position
from xformers_lab.position._rows import row


class Shaw(Position):
    """Relative vectors of keys, one for each distance up to a limit (Shaw et al., 2018, arXiv 1803.02155, equation 4).

    score + q_t . a_(clip(s - t, -reach, reach)) / sqrt(H), the vectors a being shared by all heads.
    Deviations from the paper: the vectors are shared by all layers, and those that it also adds to the values are left
    out, for they need the weights themselves, which blockwise mechanisms do not have at one place.

    Options:
        reach: distance from which on all keys on a side share a vector
    """

    key_terms = 0

    def __init__(self, size: Size, *, reach: int = 16, rngs: nnx.Rngs):
        if reach < 1:
            raise Refused(f"reach must be at least 1, got {reach}")
        super().__init__(size, rngs=rngs)
        self.table = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (2 * reach + 1, size.head)), decays=False)

    def of_queries(self, q: jax.Array, at: jax.Array) -> jax.Array:
        products = jnp.einsum("btnh,dh->btnd", q, self.table[...].astype(q.dtype), preferred_element_type=jnp.float32)
        return products * self.size.head**-0.5

    def of_keys(self, k: jax.Array, at: jax.Array) -> jax.Array:
        return jnp.zeros((*k.shape[:2], self.size.heads, 0))

    def compare(self, of_queries: jax.Array, of_keys: jax.Array, first: jax.Array) -> "Clipped":
        return Clipped(of_queries, first)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Clipped:
    """Scores to add: a query's (T, 2 reach + 1) for the clipped distance to the key."""

    table: jax.Array
    first: jax.Array

    def __call__(self, q_at: jax.Array, k_at: jax.Array) -> jax.Array:
        reach = self.table.shape[-1] // 2
        return self.table[row(q_at, self.first, self.table), jnp.clip(k_at - q_at, -reach, reach) + reach]
