import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.errors import Refused
from xformers_lab.nn.size import Size
from xformers_lab.position import Position
from xformers_lab.position._rows import row


class Shaw(Position):
    """Relative vectors of keys, and of values, one for each distance up to a limit (Shaw et al., 2018, arXiv
    1803.02155, equations 3 and 4).

    score + q_t . a_(clip(s - t, -reach, reach)) / sqrt(H), the vectors a being shared by all heads; with values=true
    v_s + b_(clip(s - t, -reach, reach)) in the place of v_s, for attention whose weights are at one place: that over a
    pattern of positions, such as full and local.
    Deviations from the paper: by default the vectors are shared by all layers, and those of values are left out; it has
    values=true:each_layer=true.

    Options:
        reach: distance from which on all keys on a side share a vector
        values: whether vectors are added to values, too
        each_layer: whether every layer has vectors of its own
    """

    key_terms = 0
    later_options: ClassVar = ("values", "each_layer")

    def __init__(self, size: Size, *, reach: int = 16, values: bool = False, each_layer: bool = False, rngs: nnx.Rngs):
        if reach < 1:
            raise Refused(f"reach must be at least 1, got {reach}")
        super().__init__(size, rngs=rngs)
        draw = lambda: nnx.initializers.normal(0.02)(rngs.params(), (2 * reach + 1, size.head))
        self.table = nnx.Param(draw(), decays=False)
        self.of_values = nnx.Param(draw(), decays=False) if values else None
        self.adds_to_values, self.each_layer = values, each_layer

    def of_queries(self, q: jax.Array, at: jax.Array) -> jax.Array:
        products = jnp.einsum("btnh,dh->btnd", q, self.table[...].astype(q.dtype), preferred_element_type=jnp.float32)
        return products * self.size.head**-0.5

    def of_keys(self, k: jax.Array, at: jax.Array) -> jax.Array:
        return jnp.zeros((*k.shape[:2], self.size.heads, 0))

    def compare(self, of_queries: jax.Array, of_keys: jax.Array, first: jax.Array) -> "Clipped":
        return Clipped(of_queries, first)

    def pair_values(self) -> "Moved | None":
        if self.of_values is None:
            return None
        table = self.of_values[...].astype(jnp.float32)
        return Moved(jnp.broadcast_to(table, (self.size.heads, *table.shape)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Clipped:
    """Scores to add: a query's (T, 2 reach + 1) for the clipped distance to the key."""

    table: jax.Array
    first: jax.Array

    def __call__(self, q_at: jax.Array, k_at: jax.Array) -> jax.Array:
        reach = self.table.shape[-1] // 2
        return self.table[row(q_at, self.first, self.table), jnp.clip(k_at - q_at, -reach, reach) + reach]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moved:
    """What weights make of a vector (2 reach + 1, H) for each clipped distance."""

    table: jax.Array

    def __call__(self, p: jax.Array, q_at: jax.Array, k_at: jax.Array) -> jax.Array:
        reach = len(self.table) // 2
        apart = jnp.broadcast_to(jnp.clip(k_at - q_at, -reach, reach) + reach, p.shape).reshape(-1, p.shape[-1])
        rows = p.astype(jnp.float32).reshape(apart.shape)
        of_distance = jnp.zeros((len(rows), 2 * reach + 1)).at[jnp.arange(len(rows))[:, None], apart].add(rows)
        return (of_distance @ self.table).reshape(*p.shape[:-1], -1)
