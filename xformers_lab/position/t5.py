from typing import Literal

import jax.numpy as jnp
from flax import nnx

from xformers_lab.errors import Refused
from xformers_lab.nn.buckets import Buckets
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

    def bias(self) -> Buckets:
        return Buckets(self.table[...].astype(jnp.float32), self.farthest, self.sides == "both")
