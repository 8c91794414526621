import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from xformers_lab.errors import Refused
from xformers_lab.nn.embedding import ADDED, START, marked
from xformers_lab.nn.size import Size
from xformers_lab.position import Position


class Grid(Position):
    """Learned vectors of a position's row and of its column on a plane, added to the embeddings (Child et al., 2019,
    arXiv 1904.10509, section 5.3).

    x_t + rows[t // width] + columns[t mod width]: tables of rows + columns vectors in place of rows * columns. What
    stands in front of an image, a class token, has no place on the plane and gets nothing. Of all others the sum is
    divided by sqrt(3/2), which keeps its size (nn/embedding.py).

    Options:
        width: columns of the plane; none: the image's, or the root of the length, rounded up
    """

    embeds = True

    def __init__(self, size: Size, *, width: int | None = None, rngs: nnx.Rngs):
        super().__init__(size, rngs=rngs)
        length = size.length - size.ahead
        if width is None:
            width = dataclasses.replace(size, length=length, ahead=0).on_plane()[1]
        if not 1 <= width <= length:
            raise Refused(f"width must be from 1 to the length of {length}, got {width}")
        small = nnx.initializers.normal(START)
        draw = lambda count: nnx.Param(small(rngs.params(), (count, size.dim)), decays=False)
        self.width, self.scale = width, ADDED / (2**0.5 * START)
        self.rows, self.columns = draw(math.ceil(length / width)), draw(width)

    def embed(self, x: jax.Array, at: jax.Array, *, valid: jax.Array | None = None) -> jax.Array:
        place = at - self.size.ahead
        vectors = (self.rows[place // self.width] + self.columns[place % self.width]) * self.scale
        return jnp.where(place[:, None] < 0, x, marked(x, vectors))
