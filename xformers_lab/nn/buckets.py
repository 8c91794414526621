"""Learned scores by distance, in buckets that grow with it, as T5 has them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Buckets:
    """Scores to add: one of a table, chosen by the distance."""

    table: jax.Array
    farthest: int = dataclasses.field(metadata={"static": True})
    both: bool = dataclasses.field(metadata={"static": True})

    def __call__(self, q_at: jax.Array, k_at: jax.Array) -> jax.Array:
        return self.table[bucket(q_at - k_at, self.table.shape[-1], self.farthest, self.both)]


def bucket(back: jax.Array | np.ndarray, buckets: int, farthest: int, both: bool) -> jax.Array:
    """The bucket of a key that is `back` positions before the query (negative: after it)."""
    start = 0
    if both:
        buckets //= 2
        start = jnp.where(back < 0, buckets, 0)
        back = jnp.abs(back)
    back = jnp.maximum(back, 0)
    near = buckets // 2
    growth = jnp.log(jnp.maximum(back, near) / near) / jnp.log(farthest / near)
    far = near + (growth * (buckets - near)).astype(jnp.int32)
    return start + jnp.where(back < near, back, jnp.minimum(far, buckets - 1))
