import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xformers_lab.errors import Refused
from xformers_lab.nn.size import Size
from xformers_lab.position import Position


class T5(Position):
    """A learned score per head and bucket of distances, shared by all layers (Raffel et al., 2020, arXiv 1910.10683,
    section 2.1).

    Half of the buckets hold one distance each, the other half grow logarithmically up to `farthest`; all further ones
    share the last. On both sides, the past and the future have half of the buckets each.

    Options:
        buckets: learned scores per head
        farthest: distance from which on all keys share a bucket
        sides: both: past and future keys have buckets of their own; past: all serve the past; none: past in a causal
            model, else both
    """

    def __init__(
        self,
        size: Size,
        *,
        buckets: int = 32,
        farthest: int = 128,
        sides: Literal["both", "past"] | None = None,
        causal: bool,
        rngs: nnx.Rngs,
    ):
        sides = sides or ("past" if causal else "both")
        one_side = buckets // (2 if sides == "both" else 1)
        if one_side < 2 or buckets % 2:
            raise Refused(f"buckets must be even and at least {4 if sides == 'both' else 2}, got {buckets}")
        if farthest <= one_side // 2:
            raise Refused(f"farthest={farthest} must be above {one_side // 2}, the distances with buckets of their own")
        super().__init__(size, rngs=rngs)
        self.farthest, self.sides = farthest, sides
        self.table = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (size.heads, buckets)), decays=False)

    def bias(self) -> "Buckets":
        return Buckets(self.table[...].astype(jnp.float32), self.farthest, self.sides == "both")


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
